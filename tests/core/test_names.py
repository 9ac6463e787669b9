"""Names: open, stat, list, rename, unlink; and a file without a name."""

import errno

import pytest

from dax_mp.limits import LIST_ENTRIES_MAX
from dax_mp.messages import (
    Close,
    Fstat,
    Link,
    List,
    Mmap,
    Munmap,
    Open,
    OpenFlag,
    Rename,
    RenameFlag,
    Stat,
    Truncate,
    Unlink,
    Write,
)
from simulation.client import PAGE_SIZE, Failed, Load, Store, page_bytes
from simulation.world import READ_WRITE, World, read_page, write_page

CREATE, EXCLUSIVE, TRUNCATE, EPHEMERAL, TMPFILE = map(int, OpenFlag)


@pytest.fixture
def world() -> World:
    world = World("zero", pmem_pages=8)
    world.add_client()
    world.add_client()
    return world


def names(world: World, after: str = "") -> list[str]:
    return names_of(world, 0, after)


def names_of(world: World, client: int, after: str = "") -> list[str]:
    return [entry["name"] for entry in world.call(client, List(0, after))]


def error_of(world: World, request: object) -> int | None:
    with pytest.raises(OSError) as caught:
        world.call(0, request)  # type: ignore[arg-type]
    return caught.value.errno


def free_pages(world: World) -> int:
    return world.coordinator.fs.device.frames.free_pages


def test_open_creates_only_when_told(world: World) -> None:
    assert error_of(world, Open(0, "a", 0)) == errno.ENOENT
    assert error_of(world, Open(0, "a", EXCLUSIVE)) == errno.ENOENT
    assert error_of(world, Open(0, "a", TRUNCATE)) == errno.ENOENT
    assert names(world) == []
    handle, ino, size_bytes = world.call(0, Open(0, "a", CREATE | EXCLUSIVE))
    assert size_bytes == 0
    assert error_of(world, Open(0, "a", CREATE | EXCLUSIVE)) == errno.EEXIST
    again, same_ino, _ = world.call(1, Open(0, "a", CREATE))
    assert same_ino == ino
    assert world.call(0, Open(0, "a", 0))[0] != handle
    assert again == 1, "handles are each session's own"


def test_open_truncates(world: World) -> None:
    world.call(0, write_page(world.open(0, "a"), 0, 5))
    vma_id = world.map(0, 1, 1)
    assert world.access(0, Load(vma_id, 0)) == 5
    assert world.call(1, Open(0, "a", TRUNCATE))[2] == 0
    assert world.access(0, Load(vma_id, 0)) == Failed(errno.EFAULT)
    assert free_pages(world) == 8
    world.check()


@pytest.mark.parametrize("name", ["a/b", "/", "a\0b", ".", ".."])
def test_names_that_are_none(world: World, name: str) -> None:
    assert error_of(world, Open(0, name, CREATE)) == errno.EINVAL
    world.open(0, "a")
    assert error_of(world, Rename(0, "a", name, 0)) == errno.EINVAL
    assert names(world) == ["a"]
    world.check_quiescent()


def test_stat(world: World) -> None:
    world.call(0, write_page(world.open(0, "a"), 2, 5))
    world.map(0, 1, 1)
    world.map(0, 1, 1)
    times = dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), 0)
    expected = {"ino": 1, "name": "a", "size_bytes": 3 * PAGE_SIZE, "blocks": 1, "nlink": 1, **times}
    assert world.call(1, Stat(0, "a")) == expected | {"mappers": [{"pid": 1000, "vmas": 2}]}
    assert world.call(0, Fstat(0, 1)) == world.call(1, Stat(0, "a"))
    assert error_of(world, Stat(0, "b")) == errno.ENOENT
    assert error_of(world, Fstat(0, 2)) == errno.EBADF


def test_list_goes_on_after_a_name(world: World) -> None:
    for number in range(LIST_ENTRIES_MAX + 3):
        world.coordinator.fs.create(f"{number:05}")
    first = names(world)
    assert len(first) == LIST_ENTRIES_MAX
    rest = names(world, after=first[-1])
    assert first + rest == [f"{number:05}" for number in range(LIST_ENTRIES_MAX + 3)]
    assert names(world, after=rest[-1]) == []
    assert names(world, after="00000~") == names(world, after="00000")


def test_rename(world: World) -> None:
    world.call(0, write_page(world.open(0, "a"), 0, 5))
    world.call(0, Rename(0, "a", "b", 0))
    assert names(world) == ["b"]
    assert world.call(0, Fstat(0, 1))["name"] == "b"
    world.call(0, Rename(0, "b", "b", 0))
    assert names(world) == ["b"]
    assert error_of(world, Rename(0, "a", "c", 0)) == errno.ENOENT
    assert error_of(world, Rename(0, "a", "a", 0)) == errno.ENOENT


def test_rename_over_a_file_that_nobody_has_open_frees_it(world: World) -> None:
    world.call(0, write_page(world.open(0, "old"), 0, 5))
    world.call(0, write_page(world.open(0, "new"), 0, 6))
    world.call(0, Close(0, 2))
    assert free_pages(world) == 6
    world.call(0, Rename(0, "old", "new", 0))
    assert (names(world), free_pages(world)) == (["new"], 7)
    assert world.call(0, read_page(1, 0)) == page_bytes(5)
    world.check()


def test_rename_over_a_file_that_is_mapped_leaves_it_to_its_users(world: World) -> None:
    world.call(0, write_page(world.open(0, "old"), 0, 5))
    handle = world.open(1, "new")
    world.call(1, write_page(handle, 0, 6))
    vma_id = world.map(1, handle, 1)
    world.call(0, Rename(0, "old", "new", 0))
    assert world.access(1, Load(vma_id, 0)) == 6
    assert world.call(1, Fstat(0, handle)) | {"mappers": None} == {
        "ino": 2,
        "name": None,
        "size_bytes": PAGE_SIZE,
        "blocks": 1,
        "nlink": 0,
        **dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), 0),
        "mappers": None,
    }
    world.call(1, Close(0, handle))
    assert free_pages(world) == 6
    world.call(1, Munmap(0, vma_id))
    assert free_pages(world) == 7
    world.check()
    world.check_quiescent()


def test_an_unlinked_file_lives_until_its_last_user_is_gone(world: World) -> None:
    """Handles and VMAs, of living processes and of one that is killed."""
    for client in (0, 1):
        world.open(client, "a")
        assert world.map(client, 1, 4) == client + 1
    world.call(0, Unlink(0, "a"))
    assert error_of(world, Unlink(0, "a")) == errno.ENOENT
    world.call(0, Truncate(0, 1, 4 * PAGE_SIZE))
    assert world.access(0, Store(1, 3, 5)) is None
    assert world.access(1, Load(2, 3)) == 5
    other = world.call(0, Open(0, "a", CREATE))
    assert other[1] == 2 and other[2] == 0, "the name is free for a new file"
    world.call(0, Close(0, 1))
    world.call(0, Munmap(0, 1))
    assert world.call(1, read_page(1, 3)) == page_bytes(5)
    assert set(world.coordinator.fs.inodes) == {1, 2}
    world.kill(1)
    assert set(world.coordinator.fs.inodes) == {2}
    assert free_pages(world) == 8
    world.check()
    world.check_quiescent()


def test_a_file_without_users_goes_with_its_name(world: World) -> None:
    world.call(0, write_page(world.open(0, "a"), 0, 5))
    world.call(0, Close(0, 1))
    assert free_pages(world) == 7
    world.call(0, Unlink(0, "a"))
    assert free_pages(world) == 8
    assert not world.coordinator.fs.inodes


def test_a_handle_is_good_until_it_is_closed(world: World) -> None:
    world.open(0, "a")
    world.call(0, Close(0, 1))
    for request in (Close(0, 1), Fstat(0, 1), Truncate(0, 1, 5), Write(0, 1, 0, 0, b"x"), read_page(1, 0)):
        assert error_of(world, request) == errno.EBADF
    assert world.open(0, "a") == 2, "a handle is not used twice"
    world.check_quiescent()


# --- a file that has no name yet --------------------------------------------------------------------------------------


def test_a_file_without_a_name_goes_with_its_last_user(world: World) -> None:
    handle, _, _ = world.call(0, Open(0, "a", TMPFILE))
    world.call(0, write_page(handle, 0, 5))
    stat = world.call(0, Fstat(0, handle))
    assert (stat["name"], stat["nlink"], names(world)) == (None, 0, [])
    vma_id = int(world.call(0, Mmap(0, handle, 0, 1, READ_WRITE, 0)))
    world.call(0, Close(0, handle))
    assert free_pages(world) == 7
    world.call(0, Munmap(0, vma_id))
    assert free_pages(world) == 8
    world.check()


def test_nothing_is_left_of_a_file_without_a_name_whose_maker_is_killed(world: World) -> None:
    handle, _, _ = world.call(0, Open(0, "a", TMPFILE))
    world.call(0, write_page(handle, 0, 5))
    assert free_pages(world) == 7
    world.kill(0)
    assert free_pages(world) == 8
    assert not world.coordinator.fs.inodes
    world.check()


def test_link_gives_a_file_a_name(world: World) -> None:
    handle, ino, _ = world.call(0, Open(0, "a", TMPFILE))
    other, other_ino, _ = world.call(0, Open(0, "a", TMPFILE))
    assert ino != other_ino
    world.call(0, Link(0, handle, "a", RenameFlag.NOREPLACE))
    assert world.call(1, Stat(0, "a"))["ino"] == ino
    assert error_of(world, Link(0, handle, "b", 0)) == errno.EMLINK
    assert error_of(world, Link(0, other, "a", RenameFlag.NOREPLACE)) == errno.EEXIST
    assert error_of(world, Link(0, other, "a/b", 0)) == errno.EINVAL
    assert error_of(world, Link(0, 99, "b", 0)) == errno.EBADF
    world.call(0, Link(0, other, "a", 0))
    assert names(world) == ["a"]
    assert world.call(1, Stat(0, "a"))["ino"] == other_ino
    world.kill(0)
    assert names_of(world, 1) == ["a"]
    assert list(world.coordinator.fs.inodes) == [other_ino]
    world.check()


def test_an_ephemeral_file_that_is_linked_loses_its_name_with_its_last_user(world: World) -> None:
    handle, _, _ = world.call(0, Open(0, "a", TMPFILE | EPHEMERAL))
    world.call(0, Link(0, handle, "a", 0))
    assert names(world) == ["a"]
    world.kill(0)
    assert names_of(world, 1) == []
    world.check()


def test_an_unlinked_file_can_be_linked_again(world: World) -> None:
    handle = world.open(0, "a")
    world.call(0, write_page(handle, 0, 5))
    world.call(0, Unlink(0, "a"))
    world.call(0, Link(0, handle, "b", 0))
    world.call(0, Close(0, handle))
    assert names(world) == ["b"]
    assert free_pages(world) == 7
    world.check()
