"""What a file can do at an offset, beside the system call of the same name on a file of tmpfs."""

import ctypes
import errno
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

import dax_mp
from coordinator_process import Serve, wait_until
from dax_mp.limits import IO_CHUNK_BYTES_MAX, XATTR_BYTES_MAX, XATTRS_PER_FILE_MAX
from dax_mp.messages import FallocateMode
from script_process import Script

PAGE: Final = os.sysconf("SC_PAGESIZE")
KEEP_SIZE: Final = FallocateMode.KEEP_SIZE
OFF_T_MAX: Final = (1 << 63) - 1

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Shm:
    """A file of tmpfs with the operations of a DaxFile, each one system call."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def pread(self, length: int, offset: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def pwrite(self, data: Any, offset: int) -> int:
        return os.pwrite(self.fd, data, offset)

    def preadv(self, buffers: Any, offset: int) -> int:
        return os.preadv(self.fd, buffers, offset)

    def pwritev(self, buffers: Any, offset: int) -> int:
        return os.pwritev(self.fd, buffers, offset)

    def fallocate(self, offset: int, length: int, keep_size: bool = False) -> None:
        self._fallocate(int(KEEP_SIZE) if keep_size else 0, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        self._fallocate(int(FallocateMode.PUNCH_HOLE | KEEP_SIZE), offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        if not -OFF_T_MAX <= offset <= OFF_T_MAX or not -OFF_T_MAX <= length <= OFF_T_MAX:
            raise OverflowError
        if _libc.fallocate(self.fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
            raise OSError(ctypes.get_errno(), "fallocate")

    def copy_range(self, offset: int, target: "Shm", target_offset: int, length: int) -> int:
        return os.copy_file_range(self.fd, target.fd, length, offset, target_offset)


@pytest.fixture
def shm() -> Iterator[Shm]:
    path = f"/dev/shm/dax-mp-test-{os.getpid()}"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.unlink(path)
    yield Shm(fd)
    os.close(fd)


@pytest.fixture
def file(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    with session.open("file", "x+") as file:
        yield file


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "returned", call()
    except OSError as error:
        return "OSError", error.errno
    except Exception as error:
        return type(error).__name__, None


def read_into(file: Any, sizes: list[int], offset: int) -> tuple[int, list[bytes]]:
    buffers = [bytearray(size) for size in sizes]
    return file.preadv(buffers, offset), [bytes(buffer) for buffer in buffers]


Call = Callable[[Any], Any]

CALLS: Final[dict[str, Call]] = {
    "pread": lambda file: file.pread(10, 5),
    "pread nothing": lambda file: file.pread(0, 5),
    "pread at the end": lambda file: file.pread(10, 3 * PAGE - 3),
    "pread past the end": lambda file: file.pread(10, 1 << 40),
    "pread a negative length": lambda file: file.pread(-1, 0),
    "pread at a negative offset": lambda file: file.pread(1, -1),
    "pread at 2**63": lambda file: file.pread(1, 1 << 63),
    "pread at a str": lambda file: file.pread(1, "0"),
    "pread at a float": lambda file: file.pread(1, 1.0),
    "pwrite": lambda file: file.pwrite(b"data", 5),
    "pwrite nothing": lambda file: file.pwrite(b"", 1 << 40),
    "pwrite past the end": lambda file: file.pwrite(b"data", 5 * PAGE + 1),
    "pwrite a bytearray": lambda file: file.pwrite(bytearray(b"data"), 5),
    "pwrite a str": lambda file: file.pwrite("data", 5),
    "pwrite at a negative offset": lambda file: file.pwrite(b"x", -1),
    "pwrite at 2**63": lambda file: file.pwrite(b"x", 1 << 63),
    "pwrite at 2**63 - 1": lambda file: outcome(lambda: file.pwrite(b"x", OFF_T_MAX))[0],
    "preadv": lambda file: read_into(file, [3, 0, 7], 5),
    "preadv at the end": lambda file: read_into(file, [3, 10], 3 * PAGE - 5),
    "preadv into nothing": lambda file: read_into(file, [], 5),
    # -1 would be the position: glibc's preadv is preadv2 without flags
    "preadv into bytes": lambda file: file.preadv([b"read only"], 0),
    "preadv at a negative offset": lambda file: read_into(file, [1], -2),
    "pwritev": lambda file: file.pwritev([b"one", b"", bytearray(b"two")], 3),
    "pwritev nothing": lambda file: file.pwritev([], 3),
    "pwritev a str": lambda file: file.pwritev(["x"], 3),
    "pwritev at a negative offset": lambda file: file.pwritev([b"x"], -2),
    "fallocate": lambda file: file.fallocate(0, 5 * PAGE),
    "fallocate, the size kept": lambda file: file.fallocate(PAGE, 5 * PAGE, keep_size=True),
    "fallocate of no length": lambda file: file.fallocate(0, 0),
    "fallocate of a negative length": lambda file: file.fallocate(0, -1),
    "fallocate at a negative offset": lambda file: file.fallocate(-1, 1),
    "fallocate past the largest offset": lambda file: file.fallocate(OFF_T_MAX, 1),
    "fallocate at 2**63": lambda file: file.fallocate(1 << 63, 1),
    "punch_hole": lambda file: file.punch_hole(5, 2 * PAGE),
    "punch_hole past the end": lambda file: file.punch_hole(5, 20 * PAGE),
    "punch_hole of no length": lambda file: file.punch_hole(5, 0),
    "punch_hole at a negative offset": lambda file: file.punch_hole(-5, 10),
    "copy_range": lambda file: file.copy_range(5, file, 2 * PAGE + 3, PAGE + 1),
    "copy_range past the end": lambda file: file.copy_range(3 * PAGE - 4, file, 0, 100),
    "copy_range of nothing": lambda file: file.copy_range(0, file, PAGE, 0),
    "copy_range over itself": lambda file: file.copy_range(0, file, 10, 100),
    "copy_range at a negative offset": lambda file: file.copy_range(-100, file, PAGE, 10),
}


@pytest.mark.parametrize("name", CALLS)
def test_as_the_system_call(file: dax_mp.DaxFile, shm: Shm, name: str) -> None:
    """The same result or mistake, and the same contents afterwards."""
    data = os.urandom(3 * PAGE)
    for twin in (file, shm):
        twin.pwrite(data, 0)
    assert outcome(lambda: CALLS[name](file)) == outcome(lambda: CALLS[name](shm))
    size = os.fstat(shm.fd).st_size
    assert file.size == size
    assert file.pread(size, 0) == shm.pread(size, 0)


def test_zero_range(file: dax_mp.DaxFile) -> None:
    file.pwrite(b"x" * (3 * PAGE), 0)
    file.zero_range(10, PAGE)
    assert file.pread(3 * PAGE, 0) == b"x" * 10 + bytes(PAGE) + b"x" * (2 * PAGE - 10)
    file.zero_range(2 * PAGE, 3 * PAGE, keep_size=True)
    assert file.size == 3 * PAGE
    file.zero_range(2 * PAGE, 3 * PAGE)
    assert (file.size, file.stat().blocks) == (5 * PAGE, 5)
    assert file.pread(3 * PAGE, 2 * PAGE) == bytes(3 * PAGE)


def test_collapse_and_insert_range(file: dax_mp.DaxFile) -> None:
    pages = [bytes([number]) * PAGE for number in range(5)]
    file.write(b"".join(pages))
    file.collapse_range(PAGE, 2 * PAGE)
    assert file.pread(9 * PAGE, 0) == pages[0] + pages[3] + pages[4]
    file.insert_range(PAGE, PAGE)
    assert file.pread(9 * PAGE, 0) == pages[0] + bytes(PAGE) + pages[3] + pages[4]
    for call in (file.collapse_range, file.insert_range):
        for offset, length in ((1, PAGE), (0, 1), (0, 0), (-PAGE, PAGE), (0, -PAGE), (4 * PAGE, PAGE)):
            assert outcome(functools.partial(call, offset, length)) == ("OSError", errno.EINVAL)
    assert outcome(lambda: file.collapse_range(0, 4 * PAGE)) == ("OSError", errno.EINVAL)
    assert file.size == 4 * PAGE


def test_copy_range_between_files(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    """Longer than one message carries; a file of another session is refused."""
    data = os.urandom(2 * IO_CHUNK_BYTES_MAX + 4321)
    file.write(data)
    with session.open("target", "x+") as target:
        assert file.copy_range(1, target, 7, 1 << 40) == len(data) - 1
        assert target.pread(1 << 30, 0) == bytes(7) + data[1:]
    with dax_mp.connect(session.endpoint) as other, other.open("file") as same:
        assert outcome(lambda: same.copy_range(0, file, PAGE, 1)) == ("OSError", errno.EXDEV)


def test_the_mode_decides(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    file.write(b"data")
    with session.open("file", "r") as reader, session.open("file", "a") as writer:
        calls: list[Callable[[], Any]] = [
            lambda: reader.pwrite(b"x", 0),
            lambda: reader.pwritev([b"x"], 0),
            lambda: reader.writev([b"x"]),
            lambda: reader.fallocate(0, 1),
            lambda: reader.punch_hole(0, 1),
            lambda: reader.zero_range(0, 1),
            lambda: reader.collapse_range(0, PAGE),
            lambda: reader.insert_range(0, PAGE),
            lambda: reader.setxattr("user.x", b""),
            lambda: reader.removexattr("user.x"),
            lambda: file.copy_range(0, reader, 0, 1),
            lambda: writer.pread(1, 0),
            lambda: writer.preadv([bytearray(1)], 0),
            lambda: writer.readv([bytearray(1)]),
            lambda: writer.copy_range(0, file, 0, 1),
        ]
        for call in calls:
            assert outcome(call) == ("OSError", None)  # io.UnsupportedOperation
    assert file.pread(9, 0) == b"data"


def test_closed(session: dax_mp.Session) -> None:
    file = session.open("file", "x+")
    file.close()
    calls: list[Callable[[], Any]] = [
        lambda: file.pread(1, 0),
        lambda: file.pwrite(b"x", 0),
        lambda: file.preadv([bytearray(1)], 0),
        lambda: file.pwritev([b"x"], 0),
        lambda: file.fallocate(0, 1),
        lambda: file.punch_hole(0, 1),
        lambda: file.setxattr("user.x", b""),
        lambda: file.getxattr("user.x"),
        file.listxattr,
        lambda: file.copy_range(0, file, 1, 1),
    ]
    for call in calls:
        assert outcome(call) == ("ValueError", None)


def test_vectors_at_the_position(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    assert file.writev([b"one", b"two"]) == 6
    assert file.tell() == 6
    file.seek(1)
    buffers = [bytearray(2), bytearray(9)]
    assert file.readv(buffers) == 5
    assert buffers == [b"ne", b"two" + bytes(6)]
    assert file.tell() == 6
    with session.open("file", "a") as log:
        file.pwrite(b"between", 6)
        assert log.writev([b"at", b"end"]) == 5
        assert log.tell() == file.size == 18


def test_vectors_longer_than_a_message(file: dax_mp.DaxFile) -> None:
    parts = [os.urandom(size) for size in (10, IO_CHUNK_BYTES_MAX + 1, 0, IO_CHUNK_BYTES_MAX, 77)]
    assert file.pwritev(parts, 3) == sum(map(len, parts))
    buffers = [bytearray(len(part)) for part in parts]
    assert file.preadv(buffers, 3) == sum(map(len, parts))
    assert buffers == parts


def test_attributes(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    file.setxattr("user.shape", b"\x01\x02")
    file.setxattr("user.empty", b"")
    with session.open("file") as again:
        assert again.getxattr("user.shape") == b"\x01\x02"
        assert again.listxattr() == ["user.empty", "user.shape"]
    file.setxattr("user.shape", bytearray(XATTR_BYTES_MAX))
    assert file.getxattr("user.shape") == bytes(XATTR_BYTES_MAX)
    file.removexattr("user.empty")
    mistakes: list[tuple[Callable[[], Any], tuple[str, int | None]]] = [
        (lambda: file.getxattr("user.empty"), ("OSError", errno.ENODATA)),
        (lambda: file.removexattr("user.empty"), ("OSError", errno.ENODATA)),
        (lambda: file.setxattr("user.x", bytes(XATTR_BYTES_MAX + 1)), ("OSError", errno.E2BIG)),
        (lambda: file.setxattr("", b""), ("OSError", errno.ERANGE)),
        (lambda: file.setxattr("x" * 256, b""), ("OSError", errno.ERANGE)),
        (lambda: file.setxattr("n\0", b""), ("ValueError", None)),
        (lambda: file.getxattr("n\0"), ("ValueError", None)),
        (lambda: file.removexattr("n\0"), ("ValueError", None)),
        (lambda: file.setxattr(b"x", b""), ("TypeError", None)),  # type: ignore[arg-type]
        (lambda: file.setxattr("x", "str"), ("TypeError", None)),  # type: ignore[arg-type]
    ]
    for call, expected in mistakes:
        assert outcome(call) == expected
    for number in range(XATTRS_PER_FILE_MAX - 1):
        file.setxattr(str(number), b"")
    assert outcome(lambda: file.setxattr("one more", b"")) == ("OSError", errno.ENOSPC)
    file.setxattr("user.shape", b"replaced")


def test_rename_over_a_file(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    file.write(b"old")
    with session.open("new", "x") as new:
        new.write(b"new")
    with pytest.raises(FileExistsError):
        session.rename("new", "file", replace=False)
    session.rename("new", "file")
    assert session.listdir() == ["file"]
    assert file.pread(9, 0) == b"old"
    assert file.stat().name is None
    with session.open("file") as again:
        assert again.read() == b"new"
    session.rename("file", "other", replace=False)
    assert session.listdir() == ["other"]


def test_an_ephemeral_file(session: dax_mp.Session, script: Script) -> None:
    """It lives until the last process that has it is gone, however that ended."""
    file = session.open("file", "x+", ephemeral=True)
    process = script(
        """
import sys, dax_mp
session = dax_mp.connect(sys.argv[1])
mapping = session.open("file", "r+").mmap(4096, past_eof=True)
print("mapped", flush=True)
input()
""",
        session.endpoint,
    )
    assert process.line() == "mapped"
    file.close()
    assert session.listdir() == ["file"]
    process.close()
    wait_until(lambda: not session.listdir())


def test_no_space(serve: Serve) -> None:
    coordinator = serve(size="1MiB")
    with dax_mp.connect(coordinator.endpoint) as session, session.open("file", "x+") as file:
        assert outcome(lambda: file.fallocate(0, 2 << 20)) == ("OSError", errno.ENOSPC)
        assert (file.size, file.stat().blocks) == (0, 0)
        free = session.statfs().pages_free
        file.fallocate(0, free * PAGE)
        assert session.statfs().pages_free == 0
        file.pwrite(b"x" * PAGE, (free - 1) * PAGE)
        assert outcome(lambda: file.pwrite(b"x", free * PAGE)) == ("OSError", errno.ENOSPC)
        assert outcome(lambda: file.pwrite(bytes(2 << 20), 0)) == ("OSError", errno.ENOSPC)
        assert file.pread(2, (free - 1) * PAGE) == b"xx"
