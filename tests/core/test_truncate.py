"""Truncate, punch and growth: sizes, blocks, and I6, the bytes past the end."""

import errno

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.device import HolePolicyName
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.messages import Access, Extents, Fallocate, Fstat, Read, Truncate, Write
from simulation.client import PAGE_SIZE, Failed, Load, Store
from simulation.world import World

PAST_END = Failed(errno.EFAULT)
P = PAGE_SIZE


@pytest.fixture(params=["zero", "page-cache"])
def world(request: pytest.FixtureRequest) -> World:
    """Two clients; each has handle 1 to the same file and has mapped 8 pages of it, as VMA 1 and 2."""
    policy: HolePolicyName = request.param
    world = World(policy, pmem_pages=16, dram_pages=8)
    for number in (0, 1):
        world.add_client()
        world.open(number, "file")
    for number in (0, 1):
        assert world.map(number, 1, 8) == number + 1
    return world


def truncate(world: World, size_bytes: int) -> None:
    world.call(0, Truncate(0, 1, size_bytes))
    world.check()


def write(world: World, offset_bytes: int, data: bytes) -> None:
    world.call(0, Write(0, 1, offset_bytes, 0, data))


def read(world: World, offset_bytes: int = 0, length_bytes: int = 8 * P) -> bytes:
    return bytes(world.call(1, Read(0, 1, offset_bytes, length_bytes)))


def blocks(world: World) -> int:
    return int(world.call(0, Fstat(0, 1))["blocks"])


def poke(world: World, vma_id: int, offset_bytes: int, data: bytes) -> None:
    """Store bytes through a mapping, anywhere in a page that has a block."""
    world.access(vma_id - 1, Load(vma_id, offset_bytes // P))
    translation = world.clients[vma_id - 1].windows[vma_id].translations[offset_bytes // P]
    assert translation.access & Access.WRITE, "the page has no block"
    world.pmem.write(translation.pfn * P + offset_bytes % P, data)


def test_growing_takes_no_block(world: World) -> None:
    truncate(world, OFFSET_BYTES_MAX)
    assert blocks(world) == 0
    assert world.call(0, Fstat(0, 1))["size_bytes"] == OFFSET_BYTES_MAX
    assert read(world, OFFSET_BYTES_MAX - 3, 10) == bytes(3)


def test_shrinking_frees_what_lies_past_the_end(world: World) -> None:
    write(world, 0, b"x" * 5 * P)
    truncate(world, 2 * P + 1)
    assert blocks(world) == 3
    truncate(world, 2 * P)
    assert blocks(world) == 2
    truncate(world, 0)
    assert blocks(world) == 0
    assert world.coordinator.fs.device.frames.free_pages == 16


def test_pages_past_the_end_are_a_bus_error_until_the_file_grows_and_after_it_shrinks(world: World) -> None:
    assert world.access(1, Load(2, 0)) == PAST_END
    truncate(world, 2 * P + 1)
    assert [world.access(1, Load(2, pgoff)) for pgoff in range(4)] == [0, 0, 0, PAST_END]
    assert world.access(1, Store(2, 2, 5)) is None
    truncate(world, 2 * P)
    assert [world.access(1, Load(2, pgoff)) for pgoff in range(4)] == [0, 0, PAST_END, PAST_END]
    assert world.access(1, Store(2, 2, 5)) == PAST_END
    truncate(world, 4 * P)
    assert [world.access(1, Load(2, pgoff)) for pgoff in range(4)] == [0, 0, 0, 0]


def test_cut_bytes_do_not_come_back(world: World) -> None:
    write(world, 0, b"x" * 2 * P)
    truncate(world, 10)
    truncate(world, 2 * P)
    assert read(world) == b"x" * 10 + bytes(2 * P - 10)


def test_what_was_stored_past_the_end_does_not_become_part_of_the_file(world: World) -> None:
    """By growing with truncate, by a write behind it, and by a write into the same page."""
    write(world, 0, b"x" * 10)
    poke(world, 2, 20, b"junk")
    truncate(world, P)
    assert read(world) == b"x" * 10 + bytes(P - 10)

    truncate(world, 10)
    poke(world, 2, 20, b"junk")
    write(world, 3 * P, b"y")
    assert read(world) == b"x" * 10 + bytes(3 * P - 10) + b"y"

    truncate(world, 10)
    poke(world, 2, 12, b"junkjunkjunk")
    write(world, 16, b"z")
    assert read(world) == b"x" * 10 + bytes(6) + b"z"
    truncate(world, P)
    assert read(world) == b"x" * 10 + bytes(6) + b"z" + bytes(P - 17)


def test_the_tail_is_zero_in_a_mapping_after_a_truncate(world: World) -> None:
    write(world, 0, b"x" * P)
    world.access(1, Load(2, 0))
    truncate(world, 4)
    assert world.access(1, Load(2, 0)) == int.from_bytes(b"xxxx", "little")
    assert world.pmem.read(world.clients[1].windows[2].translations[0].pfn * P, P) == b"xxxx" + bytes(P - 4)


def test_truncate_to_the_same_size_changes_nothing(world: World) -> None:
    write(world, 0, b"x" * P)
    unmaps = world.coordinator.fs.counters["unmaps"]
    truncate(world, P)
    assert read(world) == b"x" * P
    assert world.coordinator.fs.counters["unmaps"] == unmaps


@pytest.mark.parametrize("how", ["truncate", "write"])
def test_growing_within_the_last_page_zeroes_all_of_its_tail(world: World, how: str) -> None:
    """I6: what was stored behind the end through a mapping is gone after any change of the size, not only up to it."""
    write(world, 0, b"x" * 16)
    write(world, P - 1, b"y")
    inode = world.coordinator.fs.lookup("file")
    inode.size_bytes = 16  # as if the last byte had been stored through a mapping
    if how == "truncate":
        truncate(world, 1024)
    else:
        write(world, 512, b"z")
    truncate(world, P)
    assert read(world)[P - 1 :] == b"\0"


def test_a_punch_takes_whole_pages_and_zeroes_the_rest(world: World) -> None:
    write(world, 0, b"x" * 5 * P)
    for vma_id in (1, 2):
        world.access(vma_id - 1, Load(vma_id, 2))
    world.call(0, Fallocate(0, 1, PUNCH_HOLE, P + 10, 2 * P))
    assert read(world) == b"x" * (P + 10) + bytes(2 * P) + b"x" * (2 * P - 10)
    assert blocks(world) == 4
    assert [world.access(number, Load(number + 1, 2)) for number in (0, 1)] == [0, 0]
    world.check()


@pytest.mark.parametrize(
    ("offset_bytes", "length_bytes"),
    [(0, 1), (5, P - 5), (P - 1, 2), (0, P), (P, 2 * P), (1, 5 * P), (0, OFFSET_BYTES_MAX)],
)
def test_a_punched_range_reads_as_zero_and_nothing_else_does(
    world: World, offset_bytes: int, length_bytes: int
) -> None:
    content = bytes(1 + at % 251 for at in range(5 * P))
    write(world, 0, content)
    world.call(0, Fallocate(0, 1, PUNCH_HOLE, offset_bytes, length_bytes))
    end = min(offset_bytes + length_bytes, 5 * P)
    assert read(world) == content[:offset_bytes] + bytes(end - offset_bytes) + content[end:]
    whole = max(0, end // P - -(-offset_bytes // P))
    assert blocks(world) == 5 - whole
    world.check()


def test_a_punch_does_not_change_the_size(world: World) -> None:
    write(world, 0, b"x" * P)
    world.call(0, Fallocate(0, 1, PUNCH_HOLE, 0, 100 * P))
    assert world.call(0, Fstat(0, 1))["size_bytes"] == P


@pytest.mark.parametrize(
    ("offset_bytes", "length_bytes", "code"), [(0, 0, errno.EINVAL), (2, OFFSET_BYTES_MAX - 1, errno.EFBIG)]
)
def test_a_punch_that_is_refused(world: World, offset_bytes: int, length_bytes: int, code: int) -> None:
    with pytest.raises(OSError) as caught:
        world.call(0, Fallocate(0, 1, PUNCH_HOLE, offset_bytes, length_bytes))
    assert caught.value.errno == code
    world.check_quiescent()


def test_a_freed_block_goes_to_another_file_without_its_bytes(world: World) -> None:
    write(world, 0, b"x" * 8 * P)
    assert world.access(1, Load(2, 7)) == int.from_bytes(b"x" * 8, "little")
    truncate(world, P)
    other = world.open(0, "other")
    world.call(0, Write(0, other, 0, 0, b"y" * 15 * P))
    assert world.access(1, Load(2, 7)) == PAST_END
    assert world.access(1, Load(2, 0)) == int.from_bytes(b"x" * 8, "little")
    assert sum(world.call(0, Extents(0, other, 0))[1::3]) == 15
    world.check()


def test_only_processes_that_have_the_pages_mapped_are_asked(world: World) -> None:
    truncate(world, 8 * P)
    world.access(0, Store(1, 1, 5))
    world.clients[1].windows.clear()
    unmaps = world.coordinator.fs.counters["unmaps"]
    truncate(world, 7 * P)
    truncate(world, 6 * P)
    asked = world.coordinator.fs.counters["unmaps"] - unmaps
    assert asked == 0, "nobody had those pages mapped"
    truncate(world, 0)
    assert world.coordinator.fs.counters["unmaps"] == unmaps + 1
