"""Every operation on the contents of a file, at random, against a plain byte array; and each one's errors.

Two clients have the file mapped and store past its end as well: what lies there must never come into the file (I6).
"""

import errno
import random
from contextlib import suppress
from typing import Any

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.device import HolePolicyName
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.messages import (
    BeginRead,
    BeginWrite,
    CopyRange,
    EndIo,
    Extents,
    Fallocate,
    FallocateMode,
    Fstat,
    Read,
    Seek,
    Truncate,
    Whence,
    Write,
)
from simulation.client import PAGE_SIZE, Load, Store
from simulation.world import World

P = PAGE_SIZE
KEEP_SIZE, COLLAPSE, ZERO, INSERT = (
    int(mode)
    for mode in (
        FallocateMode.KEEP_SIZE,
        FallocateMode.COLLAPSE_RANGE,
        FallocateMode.ZERO_RANGE,
        FallocateMode.INSERT_RANGE,
    )
)
PAGES = 8
OPERATIONS = (
    *("write", "append", "truncate", "allocate", "allocate+", "punch", "zero", "zero+", "collapse", "insert"),
    *("store", "load", "copy", "direct", "direct-part", "direct-append", "pollute"),
)


@pytest.mark.parametrize("frames", range(8, 16))
@pytest.mark.parametrize("shift_bytes", [0, 5])
def test_a_copy_that_meets_a_full_device_reports_what_was_copied_and_leaves_no_other_block(
    frames: int, shift_bytes: int
) -> None:
    """The source has pages 0 to 2 and 4 to 6: a piece alone may fit, and stayed in the target, past its end too."""
    world = make_world("zero", frames)
    for first in (0, 4):
        world.call(0, Write(0, 1, first * P, 0, bytes(range(1, 49)) * (3 * P // 48)))
    target = world.open(0, "target")
    world.call(0, Truncate(0, target, 3))
    request = CopyRange(0, 1, 0, target, 2 * P + shift_bytes, 7 * P)
    free_before = world.coordinator.fs.device.frames.free_pages
    copied = 0
    with suppress(OSError):
        copied = world.call(0, request)
    status = world.call(0, Fstat(0, target))
    assert status["size_bytes"] == (2 * P + shift_bytes + copied if copied else 3)
    source = world.call(0, Read(0, 1, 0, copied))
    assert world.call(0, Read(0, target, 2 * P + shift_bytes, 8 * P)) == source
    last = (2 * P + shift_bytes + copied - 1) // P
    flat = world.call(0, Extents(0, target, 0))
    assert all(pgoff + length - 1 <= last for pgoff, length in zip(flat[::3], flat[1::3], strict=True))
    assert status["blocks"] == free_before - world.coordinator.fs.device.frames.free_pages
    full = 6 if not shift_bytes else 8
    assert copied == 7 * P or status["blocks"] == free_before < full
    world.check()


def test_zero_range_that_meets_a_full_device_changes_nothing() -> None:
    world = make_world("zero", 8)
    content = bytes(range(1, 49)) * (4 * P // 48)
    world.call(0, Write(0, 1, 0, 0, content))
    world.call(0, Fallocate(0, world.open(0, "other"), 0, 0, 3 * P))
    assert error_of(world, Fallocate(0, 1, ZERO, 5, 7 * P)) == errno.ENOSPC
    assert world.call(0, Read(0, 1, 0, 9 * P)) == content
    assert world.call(0, Fstat(0, 1))["blocks"] == -(-len(content) // P)
    world.call(0, Fallocate(0, 1, ZERO, 5, 5 * P - 5))  # the blocks that are there stay, and one comes
    assert world.call(0, Read(0, 1, 0, 9 * P)) == content[:5] + bytes(5 * P - 5)
    assert world.call(0, Fstat(0, 1))["blocks"] == 5
    world.check()


def make_world(policy: HolePolicyName = "zero", frames: int = 64) -> World:
    world = World(policy, pmem_pages=frames)
    for _ in range(2):
        client = world.add_client()
        assert world.open(client, "file") == 1
        world.map(client, 1, PAGES)
    return world


def size(world: World) -> int:
    return int(world.call(0, Fstat(0, 1))["size_bytes"])


def content(world: World, client: int = 0) -> bytes:
    return bytes(world.call(client, Read(0, 1, 0, 1 << 20)))


def blocks(world: World) -> int:
    return int(world.call(0, Fstat(0, 1))["blocks"])


def error_of(world: World, request: Any) -> int | None:
    with pytest.raises(OSError) as caught:
        world.call(0, request)
    return caught.value.errno


def direct_write(world: World, offset: int, data: bytes, done: int, append: int = 0) -> int:
    """A long write as the library makes it, of which `done` bytes get done. Returns where it began."""
    io_id, start, _, flat = world.call(1, BeginWrite(0, 1, offset, append, len(data)))
    position = 0
    for address, length in zip(flat[::2], flat[1::2], strict=True):
        stored = data[position : position + min(length, max(0, done - position))]
        world.pmem.write(address, stored)
        position += length
    assert position == len(data)
    world.call(1, EndIo(0, io_id, done))
    return int(start)


def direct_read(world: World, offset: int, length: int) -> bytes:
    io_id, flat = world.call(1, BeginRead(0, 1, offset, length))
    parts = [
        world.pmem.read(address, count) if address else bytes(count)
        for address, count in zip(flat[::2], flat[1::2], strict=True)
    ]
    world.call(1, EndIo(0, io_id, 0))
    return b"".join(parts)


class Model:
    """The file as bytes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, offset: int, data: bytes) -> None:
        self.resize(max(len(self.data), offset + len(data)))
        self.data[offset : offset + len(data)] = data

    def resize(self, size_bytes: int) -> None:
        del self.data[size_bytes:]
        self.data += bytes(size_bytes - len(self.data))

    def zero(self, offset: int, length: int) -> None:
        end = min(offset + length, len(self.data))
        self.data[offset:end] = bytes(max(0, end - offset))


def step(world: World, model: Model, rng: random.Random) -> str:
    limit = PAGES * P
    offset, length = rng.randrange(limit), rng.randrange(1, 3 * P)
    page, count = rng.randrange(PAGES), rng.randrange(1, 3)
    data = rng.randbytes(length)
    match rng.choice(OPERATIONS):
        case "write":
            world.call(0, Write(0, 1, offset, 0, data))
            model.write(offset, data)
        case "append" if len(model.data) + length < 2 * limit:
            world.call(1, Write(0, 1, 0, 1, data))
            model.write(len(model.data), data)
        case "truncate":
            world.call(0, Truncate(0, 1, offset))
            model.resize(offset)
        case "allocate":
            world.call(0, Fallocate(0, 1, 0, offset, length))
            model.resize(max(len(model.data), offset + length))
        case "allocate+":
            world.call(0, Fallocate(0, 1, KEEP_SIZE, offset, length))
        case "punch":
            world.call(1, Fallocate(0, 1, PUNCH_HOLE, offset, length))
            model.zero(offset, length)
        case "zero":
            world.call(0, Fallocate(0, 1, ZERO, offset, length))
            model.resize(max(len(model.data), offset + length))
            model.zero(offset, length)
        case "zero+":
            world.call(0, Fallocate(0, 1, ZERO | KEEP_SIZE, offset, length))
            model.zero(offset, length)
        case "collapse" if (page + count) * P < len(model.data):
            world.call(0, Fallocate(0, 1, COLLAPSE, page * P, count * P))
            del model.data[page * P : (page + count) * P]
        case "insert" if page * P < len(model.data) < limit:
            world.call(1, Fallocate(0, 1, INSERT, page * P, count * P))
            model.data[page * P : page * P] = bytes(count * P)
        case "store" if page * P + 8 <= len(model.data):
            value = rng.randrange(1, 1 << 32)
            assert world.access(0, Store(1, page, value)) is None
            model.write(page * P, value.to_bytes(8, "little"))
        case "load" if page * P + 8 <= len(model.data):
            assert world.access(1, Load(2, page)) == int.from_bytes(model.data[page * P : page * P + 8], "little")
        case "copy":
            source, target = rng.randrange(limit), offset
            if abs(source - target) >= length:
                copied = world.call(0, CopyRange(0, 1, source, 1, target, length))
                assert copied == max(0, min(length, len(model.data) - source))
                if copied:
                    model.write(target, bytes(model.data[source : source + copied]))
        case "direct":
            assert direct_write(world, offset, data, length) == offset
            model.write(offset, data)
        case "direct-part":
            done = rng.randrange(length + 1)
            direct_write(world, offset, data, done)
            if done:
                model.write(offset, data[:done])
        case "direct-append" if len(model.data) + length < 2 * limit:
            assert direct_write(world, 0, data, length, append=1) == len(model.data)
            model.write(len(model.data), data)
        case "pollute" if len(model.data) % P and world.access(0, Load(1, len(model.data) // P)) is not None:
            last = len(model.data) // P
            if last < PAGES and len(model.data) % P <= P - 8:
                pollute(world, last, len(model.data) % P, rng.randrange(1, 256))
        case other:
            return f"{other}, not possible"
    return f"size {len(model.data)}"


def pollute(world: World, pgoff: int, from_byte: int, value: int) -> None:
    """Store past the end of the file through the mapping of client 0, as any thread of it can."""
    assert world.access(0, Store(1, pgoff, world.access(0, Load(1, pgoff)))) is None
    translation = world.clients[0].windows[1].translations[pgoff]
    world.pmem.write(translation.pfn * P + from_byte, bytes([value]) * (P - from_byte))


@pytest.mark.parametrize("policy", ["zero", "page-cache"])
@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_operations(policy: HolePolicyName, seed: int) -> None:
    world, model, rng = make_world(policy), Model(), random.Random(seed)
    for number in range(400):
        what = step(world, model, rng)
        where = f"step {number}: {what}"
        assert size(world) == len(model.data), where
        assert content(world) == bytes(model.data), where
        assert direct_read(world, 0, 1 << 20) == bytes(model.data), where
        world.check()
    world.call(0, Truncate(0, 1, 0))
    assert blocks(world) == 0


def test_fallocate_takes_blocks_that_read_as_holes() -> None:
    world = make_world()
    world.call(0, Write(0, 1, P, 0, b"x" * P))
    world.call(0, Fallocate(0, 1, 0, 0, 4 * P))
    assert (size(world), blocks(world)) == (4 * P, 4)
    assert world.call(0, Extents(0, 1, 0))[:2] == [1, 1]
    assert world.call(0, Seek(0, 1, 2 * P, Whence.HOLE)) == 2 * P
    assert world.access(0, Load(1, 2)) == 0
    assert world.access(1, Store(2, 2, 7)) is None
    assert world.access(0, Load(1, 2)) == 7
    assert blocks(world) == 4


def test_a_store_to_what_is_allocated_finds_space_on_a_full_device() -> None:
    world = make_world(frames=4)
    world.call(0, Fallocate(0, 1, 0, 0, 2 * P))
    handle = world.open(1, "other")
    world.call(1, Write(0, handle, 0, 0, bytes(2 * P)))
    assert world.access(0, Store(1, 1, 3)) is None
    assert world.access(0, Load(1, 1)) == 3
    assert error_of(world, Write(0, 1, 2 * P, 0, b"x")) == errno.ENOSPC


def test_fallocate_without_space_takes_nothing() -> None:
    world = make_world(frames=4)
    assert error_of(world, Fallocate(0, 1, 0, 0, 5 * P)) == errno.ENOSPC
    assert (size(world), blocks(world)) == (0, 0)


def test_blocks_past_the_end_are_kept_and_go_with_a_truncate() -> None:
    world = make_world()
    world.call(0, Write(0, 1, 0, 0, b"x"))
    world.call(0, Fallocate(0, 1, KEEP_SIZE, 0, 4 * P))
    assert (size(world), blocks(world)) == (1, 4)
    world.call(0, Truncate(0, 1, 0))
    assert blocks(world) == 0


@pytest.mark.parametrize(
    ("mode", "offset", "length", "code"),
    [
        (0, 0, 0, errno.EINVAL),
        (PUNCH_HOLE, 0, 0, errno.EINVAL),
        (int(FallocateMode.PUNCH_HOLE), 0, P, errno.EOPNOTSUPP),
        (PUNCH_HOLE | ZERO, 0, P, errno.EOPNOTSUPP),
        (4, 0, P, errno.EOPNOTSUPP),
        (COLLAPSE | KEEP_SIZE, 0, P, errno.EINVAL),
        (INSERT | KEEP_SIZE, 0, P, errno.EINVAL),
        (0, OFFSET_BYTES_MAX, 1, errno.EFBIG),
        (COLLAPSE, 1, P, errno.EINVAL),
        (COLLAPSE, 0, P + 1, errno.EINVAL),
        (COLLAPSE, P, 3 * P, errno.EINVAL),
        (INSERT, 1, P, errno.EINVAL),
        (INSERT, 4 * P, P, errno.EINVAL),
        (INSERT, 0, OFFSET_BYTES_MAX // P * P, errno.EFBIG),
    ],
)
def test_what_fallocate_refuses(mode: int, offset: int, length: int, code: int) -> None:
    world = make_world()
    world.call(0, Write(0, 1, 0, 0, bytes(range(4)) * P))
    before = content(world)
    assert error_of(world, Fallocate(0, 1, mode, offset, length)) == code
    assert content(world) == before


def test_a_file_cannot_be_copied_onto_itself_where_the_ranges_overlap() -> None:
    world = make_world()
    world.call(0, Write(0, 1, 0, 0, b"abcd"))
    assert error_of(world, CopyRange(0, 1, 0, 1, 3, 4)) == errno.EINVAL


def test_a_hole_copied_onto_a_hole_stays_one() -> None:
    world = make_world()
    other = world.open(0, "other")
    world.call(0, Write(0, 1, 4 * P, 0, b"x"))
    assert world.call(0, CopyRange(0, 1, 0, other, 0, 8 * P)) == 4 * P + 1
    assert world.call(0, Fstat(0, other))["blocks"] == 1
    assert world.call(0, Read(0, other, 0, 8 * P)) == bytes(4 * P) + b"x"
