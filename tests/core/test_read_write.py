"""read(2), write(2), lseek(2), and what happens when the device is full."""

import errno

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.coordinator import Coordinator
from dax_mp.device import Device
from dax_mp.errors import os_error
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.memory import ByteArrayMemory
from dax_mp.messages import Extents, Fallocate, Fstat, Read, Seek, Truncate, Whence, Write
from dax_mp.validate import validate
from simulation.client import PAGE_SIZE, Failed, Load, Store, page_bytes
from simulation.world import World, read_page, write_page


class SparseMemory(ByteArrayMemory):
    """The memory of a sparse region: a page takes backing when it is first written to, and there is an end to that."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.backed: set[int] = set()
        self.backing_left_pages = size_bytes // PAGE_SIZE

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        self._back(offset_bytes, length_bytes)
        super().zero(offset_bytes, length_bytes)

    def write(self, offset_bytes: int, data: bytes | memoryview) -> None:
        self._back(offset_bytes, len(data))
        super().write(offset_bytes, data)

    def _back(self, offset_bytes: int, length_bytes: int) -> None:
        for page in range(offset_bytes // PAGE_SIZE, -(-(offset_bytes + length_bytes) // PAGE_SIZE)):
            if page not in self.backed:
                if not self.backing_left_pages:
                    raise os_error(errno.ENOSPC)
                self.backing_left_pages -= 1
                self.backed.add(page)


@pytest.fixture
def world() -> World:
    world = World("zero", pmem_pages=8)
    world.add_client()
    world.open(0, "file")
    return world


def sparse_world(pmem_pages: int) -> tuple[World, SparseMemory]:
    world = World("zero", pmem_pages)
    memory = SparseMemory(len(world.pmem.data))
    world.pmem = memory
    world.coordinator = Coordinator(Device(PAGE_SIZE, memory, pmem_pages), 1.0)
    return world, memory


def write(world: World, offset_bytes: int, data: bytes, handle: int = 1) -> int:
    return int(world.call(0, Write(0, handle, offset_bytes, 0, data)))


def read(world: World, offset_bytes: int, length_bytes: int, handle: int = 1) -> bytes:
    return bytes(world.call(0, Read(0, handle, offset_bytes, length_bytes)))


def size(world: World, handle: int = 1) -> int:
    return int(world.call(0, Fstat(0, handle))["size_bytes"])


def blocks(world: World, handle: int = 1) -> int:
    return int(world.call(0, Fstat(0, handle))["blocks"])


def test_what_was_written_is_read(world: World) -> None:
    assert write(world, 10, b"hello") == 15
    assert read(world, 0, 100) == bytes(10) + b"hello"
    assert read(world, 12, 2) == b"ll"
    assert read(world, 15, 1) == b""
    assert read(world, 1000, 1) == b""


def test_a_write_past_the_end_leaves_a_hole(world: World) -> None:
    write(world, 0, b"a")
    assert write(world, 3 * PAGE_SIZE + 5, b"b") == 3 * PAGE_SIZE + 6
    assert blocks(world) == 2
    assert read(world, 0, 4 * PAGE_SIZE) == b"a" + bytes(3 * PAGE_SIZE + 4) + b"b"


def test_a_write_over_holes_and_blocks(world: World) -> None:
    write(world, PAGE_SIZE, b"x" * PAGE_SIZE)
    write(world, 3 * PAGE_SIZE, b"y" * PAGE_SIZE)
    data = bytes(range(1, 251))
    write(world, PAGE_SIZE // 2, data)
    assert read(world, PAGE_SIZE // 2, len(data)) == data
    assert read(world, 0, PAGE_SIZE // 2) == bytes(PAGE_SIZE // 2)
    validate(world.coordinator.fs, world.coordinator.sessions)


def test_append_goes_to_the_end_wherever_it_is_then(world: World) -> None:
    write(world, 0, b"abc")
    assert world.call(0, Write(0, 1, 999, 1, b"def")) == 6
    assert read(world, 0, 10) == b"abcdef"


def test_nothing_written_is_nothing_changed(world: World) -> None:
    assert write(world, 500, b"") == 500
    assert (size(world), blocks(world)) == (0, 0)


def test_a_write_that_would_end_past_the_last_offset(world: World) -> None:
    with pytest.raises(OSError) as caught:
        write(world, OFFSET_BYTES_MAX - 1, b"ab")
    assert caught.value.errno == errno.EFBIG
    assert (size(world), blocks(world)) == (0, 0)


def test_a_write_ends_at_the_last_offset(world: World) -> None:
    assert write(world, OFFSET_BYTES_MAX - 1, b"a") == OFFSET_BYTES_MAX
    assert read(world, OFFSET_BYTES_MAX - 1, 5) == b"a"
    assert blocks(world) == 1


def test_a_write_that_does_not_fit_writes_nothing(world: World) -> None:
    write(world, 4 * PAGE_SIZE, b"z")
    for offset_bytes, length_pages in ((0, 9), (5 * PAGE_SIZE, 8), (4 * PAGE_SIZE, 9)):
        with pytest.raises(OSError) as caught:
            write(world, offset_bytes, b"n" * (length_pages * PAGE_SIZE))
        assert caught.value.errno == errno.ENOSPC
        assert (size(world), blocks(world)) == (4 * PAGE_SIZE + 1, 1)
        assert read(world, 0, 9 * PAGE_SIZE) == bytes(4 * PAGE_SIZE) + b"z"
    world.check_quiescent()


@pytest.mark.parametrize("fragmented", [False, True])
@pytest.mark.parametrize("backing_left_pages", range(5))
def test_backing_that_is_full_in_the_middle_of_a_write(backing_left_pages: int, fragmented: bool) -> None:
    """Nothing is written, and no frame is lost, however many extents have been zeroed by then."""
    world, memory = sparse_world(8)
    world.add_client()
    world.open(0, "file")
    other = world.open(0, "other")
    write(world, 0, b"a")
    if fragmented:  # the free frames lie apart
        write(world, 0, b"b" * 7 * PAGE_SIZE, other)
        for page in (0, 2, 4, 6):
            world.call(0, Fallocate(0, other, PUNCH_HOLE, page * PAGE_SIZE, PAGE_SIZE))
    frames = world.coordinator.fs.device.frames
    memory.backed = set(range(9)) - {frame for start, end, _ in frames.free for frame in range(start, end)}
    memory.backing_left_pages = backing_left_pages
    free_pages = frames.free_pages
    data = b"c" * 4 * PAGE_SIZE
    if backing_left_pages < 4:
        with pytest.raises(OSError) as caught:
            write(world, PAGE_SIZE, data)
        assert caught.value.errno == errno.ENOSPC
        assert frames.free_pages == free_pages
        assert (size(world), blocks(world)) == (1, 1)
        validate(world.coordinator.fs, world.coordinator.sessions)
        memory.backing_left_pages = 4
    write(world, PAGE_SIZE, data)
    assert read(world, 0, 5 * PAGE_SIZE) == b"a" + bytes(PAGE_SIZE - 1) + data
    validate(world.coordinator.fs, world.coordinator.sessions)
    world.check_quiescent()


def test_backing_that_is_full_at_a_store() -> None:
    world, memory = sparse_world(8)
    world.add_client()
    handle = world.open(0, "file")
    world.call(0, Truncate(0, handle, PAGE_SIZE))
    vma_id = world.map(0, handle, 1)
    memory.backing_left_pages = 0
    assert world.access(0, Store(vma_id, 0, 5)) == Failed(errno.ENOSPC)
    assert world.coordinator.fs.device.frames.free_pages == 8
    assert blocks(world) == 0
    assert world.access(0, Load(vma_id, 0)) == 0
    memory.backing_left_pages = 1
    assert world.access(0, Store(vma_id, 0, 5)) is None
    assert world.call(0, read_page(handle, 0)) == page_bytes(5)
    world.check_quiescent()


def test_a_store_when_no_block_is_free(world: World) -> None:
    other = world.open(0, "other")
    write(world, 0, bytes(8 * PAGE_SIZE), other)
    world.call(0, Truncate(0, 1, PAGE_SIZE))
    vma_id = world.map(0, 1, 1)
    assert world.access(0, Load(vma_id, 0)) == 0
    assert world.access(0, Store(vma_id, 0, 5)) == Failed(errno.ENOSPC)
    assert world.access(0, Load(vma_id, 0)) == 0
    world.call(0, Fallocate(0, other, PUNCH_HOLE, 0, PAGE_SIZE))
    assert world.access(0, Store(vma_id, 0, 5)) is None
    assert world.access(0, Load(vma_id, 0)) == 5
    world.check()


def test_a_block_has_no_old_bytes(world: World) -> None:
    write(world, 0, b"\xff" * 8 * PAGE_SIZE)
    world.call(0, Truncate(0, 1, 0))
    for page in range(8):
        write(world, page * PAGE_SIZE + 7, b"n")
    assert read(world, 0, 8 * PAGE_SIZE) == (bytes(7) + b"n" + bytes(PAGE_SIZE - 8)) * 7 + bytes(7) + b"n"


def test_a_file_written_in_any_order_lies_in_one_extent(world: World) -> None:
    for page in (0, 3, 1, 5, 2, 4):
        world.call(0, write_page(1, page, 1))
    flat = world.call(0, Extents(0, 1, 0))
    assert flat[:2] == [0, 6] and len(flat) == 3
    assert world.call(0, Extents(0, 1, 4)) == [4, 2, flat[2] + 4]
    assert world.call(0, Extents(0, 1, 6)) == []


def test_a_file_whose_first_block_is_not_its_first_page_lies_in_two_extents_at_most(world: World) -> None:
    for page in (3, 1, 2, 0, 5, 4):
        world.call(0, write_page(1, page, page))
    assert len(world.call(0, Extents(0, 1, 0))) <= 3 * 2
    assert [world.call(0, read_page(1, page)) for page in range(6)] == [page_bytes(page) for page in range(6)]


def test_seek_finds_data_and_holes(world: World) -> None:
    write(world, PAGE_SIZE, b"x" * PAGE_SIZE)
    write(world, 3 * PAGE_SIZE, b"y" * 10)
    world.call(0, Truncate(0, 1, 5 * PAGE_SIZE + 5))

    def seek(offset_bytes: int, whence: Whence) -> int | None:
        try:
            return int(world.call(0, Seek(0, 1, offset_bytes, whence)))
        except OSError as error:
            assert error.errno == errno.ENXIO  # noqa: PT017
            return None

    data, hole = Whence.DATA, Whence.HOLE
    p = PAGE_SIZE
    assert [seek(at, data) for at in (0, p, p + 9, 2 * p, 3 * p + 1, 4 * p, 5 * p + 5)] == [
        *(p, p, p + 9, 3 * p, 3 * p + 1),
        *(None, None),
    ]
    assert [seek(at, hole) for at in (0, 7, p, 2 * p + 3, 3 * p, 5 * p + 4, 5 * p + 5)] == [
        *(0, 7, 2 * p, 2 * p + 3, 4 * p, 5 * p + 4),
        None,
    ]
    world.call(0, Truncate(0, 1, 3 * p + 10))
    assert seek(3 * p + 2, hole) == 3 * p + 10  # the end counts as a hole
    with pytest.raises(OSError) as caught:
        world.call(0, Seek(0, 1, 0, 0))
    assert caught.value.errno == errno.EINVAL


def test_a_page_that_was_only_read_is_a_hole(world: World) -> None:
    world.call(0, Truncate(0, 1, PAGE_SIZE))
    world.access(0, Load(world.map(0, 1, 1), 0))
    assert world.call(0, Seek(0, 1, 0, Whence.HOLE)) == 0


def test_an_empty_file_has_neither_data_nor_hole(world: World) -> None:
    for whence in Whence:
        with pytest.raises(OSError) as caught:
            world.call(0, Seek(0, 1, 0, whence))
        assert caught.value.errno == errno.ENXIO
