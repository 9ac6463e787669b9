"""mtime, ctime and atime: which of them each operation sets, as DAX does (xfstests generic/080, 215), and relatime."""

from typing import Any

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.messages import (
    BeginRead,
    BeginWrite,
    CopyRange,
    EndIo,
    Extents,
    Fallocate,
    FallocateMode,
    Fstat,
    Fsync,
    Getxattr,
    Link,
    List,
    Mmap,
    Msync,
    Open,
    OpenFlag,
    Read,
    Removexattr,
    Rename,
    Seek,
    Setxattr,
    Truncate,
    Unlink,
    Utime,
    Write,
)
from simulation.client import PAGE_SIZE, Load, Store
from simulation.world import World

P = PAGE_SIZE
START, LATER = 1000, 2000
DAY_NS = 24 * 3600 * 10**9


@pytest.fixture
def world() -> World:
    """Handle 1 is a file of four pages, the first of them with a block; VMA 1 has it mapped. Its times are START."""
    world = World(pmem_pages=16)
    world.add_client()
    world.coordinator.fs.now_ns = START
    assert world.open(0, "file") == 1
    world.call(0, Write(0, 1, 0, 0, bytes(P)))
    world.call(0, Truncate(0, 1, 4 * P))
    world.call(0, Setxattr(0, 1, "here", b""))
    world.map(0, 1, 4)
    assert times(world) == {"atime": START, "mtime": START, "ctime": START}
    world.coordinator.fs.now_ns = LATER
    return world


def times(world: World, handle: int = 1) -> dict[str, int]:
    stat = world.call(0, Fstat(0, handle))
    return {kind: stat[f"{kind}_ns"] for kind in ("atime", "mtime", "ctime")}


def changed(world: World) -> set[str]:
    return {kind for kind, time_ns in times(world).items() if time_ns == LATER}


CONTENTS: dict[str, Any] = {
    "write": Write(0, 1, 0, 0, b"x"),
    "append": Write(0, 1, 0, 1, b"x"),
    "truncate down": Truncate(0, 1, 5),
    "truncate up": Truncate(0, 1, 9 * P),
    "truncate to the same": Truncate(0, 1, 4 * P),
    "open": Open(0, "file", int(OpenFlag.TRUNCATE)),
    "fallocate": Fallocate(0, 1, 0, 0, P),
    "keep size": Fallocate(0, 1, int(FallocateMode.KEEP_SIZE), 9 * P, P),
    "punch": Fallocate(0, 1, PUNCH_HOLE, 0, P),
    "zero": Fallocate(0, 1, int(FallocateMode.ZERO_RANGE), 0, P),
    "collapse": Fallocate(0, 1, int(FallocateMode.COLLAPSE_RANGE), 0, P),
    "insert": Fallocate(0, 1, int(FallocateMode.INSERT_RANGE), 0, P),
    "long write": BeginWrite(0, 1, 0, 0, P),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_what_changes_the_contents_sets_mtime_and_ctime(world: World, what: str) -> None:
    world.call(0, CONTENTS[what])
    assert changed(world) == {"mtime", "ctime"}


def test_a_long_write_counts_at_its_end_too(world: World) -> None:
    io_id = world.call(0, BeginWrite(0, 1, P, 0, P))[0]
    world.coordinator.fs.now_ns = LATER + 1
    world.call(0, EndIo(0, io_id, P))
    assert times(world)["mtime"] == LATER + 1


@pytest.mark.parametrize("pgoff", [0, 1])
def test_a_store_through_a_mapping_counts_at_its_write_fault(world: World, pgoff: int) -> None:
    if pgoff:
        assert world.access(0, Load(1, 3)) == 0
        assert changed(world) == set()
    assert world.access(0, Store(1, pgoff, 7)) is None
    assert changed(world) == {"mtime", "ctime"}


def test_a_store_through_a_mapping_counts_at_msync(world: World) -> None:
    world.call(0, Msync(0, 1))
    assert changed(world) == set(), "nothing is mapped that could have been stored to"
    world.access(0, Store(1, 0, 7))
    world.coordinator.fs.now_ns = LATER + 1
    world.access(0, Store(1, 0, 8))
    assert times(world)["mtime"] == LATER
    world.call(0, Fsync(0, 1))
    assert times(world)["mtime"] == LATER
    world.call(0, Msync(0, 1))
    assert (times(world)["mtime"], times(world)["ctime"]) == (LATER + 1, LATER + 1)


def test_a_private_store_does_not_count(world: World) -> None:
    vma_id = world.map(0, 1, 4, private=True)
    world.call(0, Utime(0, 1, 0, 5, 6))
    world.access(0, Store(vma_id, 0, 7))
    world.call(0, Msync(0, vma_id))
    assert times(world)["mtime"] == 6


@pytest.mark.parametrize(
    "request_", [Rename(0, "file", "other", 0), Unlink(0, "file"), Setxattr(0, 1, "a", b""), Removexattr(0, 1, "here")]
)
def test_what_changes_the_rest_sets_ctime(world: World, request_: Any) -> None:
    world.call(0, request_)
    assert changed(world) == {"ctime"}


def test_a_link_sets_ctime_and_so_does_being_replaced(world: World) -> None:
    handle = world.call(0, Open(0, "file", int(OpenFlag.TMPFILE)))[0]
    world.coordinator.fs.now_ns = LATER + 1
    world.call(0, Link(0, handle, "file", 0))
    assert times(world, handle) == {"atime": LATER, "mtime": LATER, "ctime": LATER + 1}
    assert times(world) == {"atime": START, "mtime": START, "ctime": LATER + 1}


@pytest.mark.parametrize("request_", [Read(0, 1, 0, 1), BeginRead(0, 1, 0, P), Mmap(0, 1, 0, 1, 1, 0)])
def test_a_read_or_a_mapping_sets_atime(world: World, request_: Any) -> None:
    world.call(0, request_)
    assert changed(world) == {"atime"}


def test_a_copy_reads_one_and_writes_the_other(world: World) -> None:
    target = world.open(0, "target")
    world.coordinator.fs.now_ns = LATER + 1
    world.call(0, CopyRange(0, 1, 0, target, 0, P))
    assert times(world) == {"atime": LATER + 1, "mtime": START, "ctime": START}
    assert times(world, target) == {"atime": LATER, "mtime": LATER + 1, "ctime": LATER + 1}


def test_relatime(world: World) -> None:
    """A second read does not count, until the file has changed or a day has passed."""
    fs = world.coordinator.fs
    for now_ns, expected in ((3000, 3000), (4000, 3000), (3000 + DAY_NS - 1, 3000), (3000 + DAY_NS, 3000 + DAY_NS)):
        fs.now_ns = now_ns
        world.call(0, Read(0, 1, 0, 1))
        assert times(world)["atime"] == expected
    fs.now_ns += 5
    world.call(0, Write(0, 1, 0, 0, b"x"))
    fs.now_ns += 5
    world.call(0, Read(0, 1, 0, 1))
    assert times(world)["atime"] == fs.now_ns


@pytest.mark.parametrize(
    "request_",
    [
        Fstat(0, 1),
        List(0, ""),
        Seek(0, 1, 0, 3),
        Extents(0, 1, 0),
        Fsync(0, 1),
        Getxattr(0, 1, "here"),
        Open(0, "file", 0),
    ],
)
def test_what_only_looks_sets_nothing(world: World, request_: Any) -> None:
    world.call(0, request_)
    assert changed(world) == set()


def test_what_fails_sets_nothing(world: World) -> None:
    for request in (
        Fallocate(0, 1, 0, 0, 64 * P),
        Fallocate(0, 1, int(FallocateMode.COLLAPSE_RANGE), 0, 4 * P),
        Write(0, 1, P, 0, bytes(64 * P)),
        Removexattr(0, 1, "not here"),
    ):
        with pytest.raises(OSError):
            world.call(0, request)
    assert changed(world) == set()


def test_utime(world: World) -> None:
    world.call(0, Utime(0, 1, 0, 5, 6))
    assert times(world) == {"atime": 5, "mtime": 6, "ctime": LATER}
    world.call(0, Utime(0, 1, 1, 5, 6))
    assert times(world) == {"atime": LATER, "mtime": LATER, "ctime": LATER}


def test_extents_with_those_that_are_unwritten(world: World) -> None:
    world.call(0, Fallocate(0, 1, 0, 0, 4 * P))
    written = world.call(0, Extents(0, 1, 0))
    unwritten = world.call(0, Extents(0, 1, 0, 1))
    assert (written[:2], unwritten[:2]) == ([0, 1], [1, 3])
    assert world.call(0, Extents(0, 1, 2, 1))[:2] == [2, 2]
