"""DaxFile against io.FileIO, the file it stands for: the same calls, the same results and exceptions."""

import errno
import functools
import io
import os
import random
import struct
import threading
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from dax_mp.limits import IO_CHUNK_BYTES_MAX, LIST_ENTRIES_MAX, OFFSET_BYTES_MAX

PAGE: Final = os.sysconf("SC_PAGESIZE")

Outcome = tuple[str, Any]

MODES = ["r", "r+", "w", "w+", "x", "x+", "a", "a+"]


def outcome(call: Callable[[], Any]) -> Outcome:
    """What a call returns, or the exception's type and errno."""
    try:
        return "returned", call()
    except OSError as error:
        return type(error).__name__, error.errno
    except Exception as error:
        return type(error).__name__, None


class Twins:
    """The same file twice: in a real file system, and in ours."""

    def __init__(self, session: dax_mp.Session, path: Path, mode: str) -> None:
        self.real = io.FileIO(path, mode)
        self.ours = session.open(path.name, mode)

    def same(self, call: Callable[[io.RawIOBase], Any]) -> Outcome:
        real, ours = outcome(lambda: call(self.real)), outcome(lambda: call(self.ours))
        assert ours == real
        return ours

    def close(self) -> None:
        self.real.close()
        self.ours.close()


@pytest.fixture
def content(session: dax_mp.Session, tmp_path: Path) -> Path:
    """A file of the same name and bytes on both sides; its path on the real one."""
    data = random.Random(7).randbytes(10_000)
    (tmp_path / "twin").write_bytes(data)
    with session.open("twin", "w") as file:
        file.write(data)
    return tmp_path / "twin"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("mode", [mode + b for mode in MODES for b in ("", "b")] + ["br", "w+b", "ab+"])
def test_modes(session: dax_mp.Session, content: Path, mode: str, there: bool) -> None:
    if not there:
        content.unlink()
        session.unlink(content.name)
    real = outcome(lambda: io.FileIO(content, mode))
    ours = outcome(lambda: session.open(content.name, mode))
    if real[0] != "returned":
        assert ours == real
        return
    with real[1] as real_file, ours[1] as our_file:
        assert our_file.mode == real_file.mode
        assert our_file.name == "twin"
        for method in ("readable", "writable", "seekable", "tell"):
            assert getattr(our_file, method)() == getattr(real_file, method)()
        twins = Twins.__new__(Twins)
        twins.real, twins.ours = real_file, our_file
        twins.same(lambda file: file.write(b"data"))
        twins.same(lambda file: file.seek(0))
        twins.same(lambda file: file.read())
        twins.same(lambda file: file.readinto(bytearray(3)))
        twins.same(lambda file: file.truncate(5))
    with session.open(content.name) as file:
        assert file.readall() == content.read_bytes()


@pytest.mark.parametrize(
    "mode",
    ["", "b", "t", "+", "rw", "rbt", "rtt", "wtb", "rr", "r++", "rbb", "z", "U", "rU", "r w", "w+a", "rb,closefd"],
)
def test_bad_modes(session: dax_mp.Session, mode: str) -> None:
    with pytest.raises(ValueError):
        session.open("file", mode)
    assert session.listdir() == []


def test_mode_that_is_no_string(session: dax_mp.Session) -> None:
    with pytest.raises(TypeError):
        session.open("file", 3)  # type: ignore[call-overload]


@pytest.mark.parametrize("mode", ["r", "r+", "w", "w+", "a", "a+"])
@pytest.mark.parametrize("seed", range(4))
def test_random_calls(session: dax_mp.Session, content: Path, mode: str, seed: int) -> None:
    """The same random calls give the same results, position and content."""
    choose = random.Random(seed)
    twins = Twins(session, content, mode)

    for _ in range(120):
        if twins.real.tell() > 1 << 20:
            twins.same(lambda file: file.seek(0))  # a real file would grow to the whole disk's size
        twins.same(random_call(choose))
        assert twins.ours.tell() == twins.real.tell()
    twins.close()
    with session.open(content.name) as file:
        assert file.readall() == content.read_bytes()


def random_call(choose: random.Random) -> Callable[[io.RawIOBase], Any]:
    offset = choose.choice([choose.randrange(-5000, 30_000), choose.randrange(0, 12_000), 0, 1 << 40])
    length = choose.randrange(9000)
    calls: list[Callable[[io.RawIOBase], Any]] = [
        methodcaller("read", length - 2),
        functools.partial(read_into, length=length),
        methodcaller("write", choose.randbytes(length)),
        methodcaller("seek", offset, choose.choice([0, 1, 2, 7])),
        methodcaller("truncate", choose.choice([None, -1, choose.randrange(20_000)])),
        methodcaller("tell"),
    ]
    return choose.choice(calls)


def read_into(file: io.RawIOBase, length: int) -> tuple[int | None, bytes]:
    buffer = bytearray(length)
    return file.readinto(buffer), bytes(buffer)


@pytest.mark.parametrize(
    "call",
    [
        lambda file: file.seek(-1),
        lambda file: file.seek(OFFSET_BYTES_MAX + 1),
        lambda file: file.seek(-OFFSET_BYTES_MAX - 2),
        lambda file: file.seek(1.0),
        lambda file: file.seek(0, 9),
        lambda file: file.seek(-1, os.SEEK_DATA),
        lambda file: file.seek(1 << 40, os.SEEK_DATA),
        lambda file: file.seek(1 << 40, os.SEEK_HOLE),
        lambda file: file.read(1.5),
        lambda file: file.read("x"),
        lambda file: file.read(None)[:3],
        lambda file: file.write("text"),
        lambda file: file.write(None),
        lambda file: file.write(5),
        lambda file: file.write(memoryview(b"abcd")[::2]),
        lambda file: file.write(b""),
        lambda file: file.readinto(b"read-only"),
        lambda file: file.readinto(memoryview(bytearray(8))[::2]),
        lambda file: file.truncate(-1),
        lambda file: file.truncate(1.0),
        lambda file: file.truncate(OFFSET_BYTES_MAX + 1),
        lambda file: file.isatty(),
        lambda file: file.flush(),
    ],
)
def test_bad_arguments(session: dax_mp.Session, content: Path, call: Callable[[io.RawIOBase], Any]) -> None:
    twins = Twins(session, content, "r+")
    try:
        twins.same(call)
        twins.same(lambda file: file.read(10))
    finally:
        twins.close()


def test_write_past_the_largest_offset(session: dax_mp.Session) -> None:
    with session.open("file", "w") as file:
        file.seek(OFFSET_BYTES_MAX)
        with pytest.raises(OSError) as raised:
            file.write(b"xy")
        assert raised.value.errno == errno.EFBIG
        assert raised.value.filename == "file"


@pytest.mark.parametrize(
    "data",
    [
        bytearray(b"bytes of every kind"),
        memoryview(b"bytes of every kind")[3:9],
        np.arange(12, dtype=">i4").reshape(3, 4),
        np.zeros((0, 3)),
        np.array([(1, 2.5)], dtype=[("a", "i2"), ("b", "f8")]),
        struct.pack("<q", 77),
    ],
)
def test_write_takes_any_contiguous_buffer(session: dax_mp.Session, data: Any) -> None:
    expected = memoryview(data).tobytes()
    with session.open("file", "w+") as file:
        assert file.write(data) == len(expected)
        file.seek(0)
        assert file.read() == expected
        back: Any = np.zeros(len(expected), dtype="u1")
        file.seek(0)
        assert file.readinto(back) == len(expected)
        assert back.tobytes() == expected


def test_a_buffer_is_let_go_of(session: dax_mp.Session) -> None:
    """bytearray refuses to grow while a view of it is out."""
    with session.open("file", "w+") as file:
        buffer = bytearray(b"12345")
        file.write(buffer)
        file.seek(0)
        file.readinto(buffer)
        with pytest.raises(TypeError):
            file.readinto(b"12345")
        buffer += b"6"


def test_more_than_one_message(session: dax_mp.Session) -> None:
    data = random.Random(3).randbytes(2 * IO_CHUNK_BYTES_MAX + 12_345)
    with session.open("file", "w+") as file:
        assert file.write(data) == len(data)
        assert file.tell() == len(data)
        assert file.size == len(data)
        file.seek(1)
        assert file.read(len(data)) == data[1:]
        file.seek(0)
        buffer = bytearray(len(data) + 100)
        assert file.readinto(buffer) == len(data)
        assert buffer[: len(data)] == data
        file.seek(0)
        assert file.readall() == data


def test_appends_of_two_files_do_not_overwrite_each_other(session: dax_mp.Session) -> None:
    with session.open("log", "a") as one, session.open("log", "a+") as other:
        one.write(b"first")
        other.write(b"second")
        one.write(b"third")
        assert one.tell() == 16
        other.seek(0)
        assert other.read() == b"firstsecondthird"


def test_no_space(session: dax_mp.Session) -> None:
    """A write that does not fit is refused, and what other files have is not touched."""
    device = session.statfs()
    with session.open("other", "w+") as other, session.open("big", "w+") as big:
        other.write(b"kept")
        big.write(bytes(1))
        with pytest.raises(OSError) as raised:
            big.write(bytes(device.pages * device.page_size))
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.filename == "big"
        other.seek(0)
        assert other.read() == b"kept"


def test_holes(session: dax_mp.Session) -> None:
    page = session.page_size
    with session.open("sparse", "w+") as file:
        file.truncate(10 * page)
        assert file.stat().blocks == 0
        assert file.extents() == []
        file.seek(3 * page)
        file.write(b"x" * 2 * page)
        (extent,) = file.extents()
        assert (extent.offset_bytes, extent.length_bytes) == (3 * page, 2 * page)
        assert file.seek(0, dax_mp.SEEK_DATA) == 3 * page
        assert file.seek(3 * page + 5, dax_mp.SEEK_DATA) == 3 * page + 5
        assert file.seek(3 * page, dax_mp.SEEK_HOLE) == 5 * page
        with pytest.raises(OSError) as raised:
            file.seek(5 * page, dax_mp.SEEK_DATA)
        assert raised.value.errno == errno.ENXIO

        file.punch_hole(3 * page, page + 1)
        assert file.size == 10 * page
        assert file.stat().blocks == 1
        assert file.seek(0, dax_mp.SEEK_DATA) == 4 * page
        file.seek(3 * page)
        assert file.read(2 * page) == bytes(page + 1) + b"x" * (page - 1)


@pytest.mark.parametrize(
    ("offset", "length", "error"),
    [(-1, 5, OSError), (0, 0, OSError), (0, -1, OSError), (1 << 63, 1, OverflowError), (0.5, 1, TypeError)],
)
def test_bad_holes(session: dax_mp.Session, offset: int, length: int, error: type[Exception]) -> None:
    with session.open("file", "w") as file, pytest.raises(error):
        file.punch_hole(offset, length)


def test_more_extents_than_one_reply_takes() -> None:
    count = 2 * LIST_ENTRIES_MAX + 3
    with (
        dax_mp.launch(2 * count * PAGE) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("comb", "w+") as file,
    ):
        for index in range(count):
            file.seek(2 * index * PAGE)
            file.write(b"x")
        assert [extent.offset_bytes for extent in file.extents()] == [2 * index * PAGE for index in range(count)]


def test_rights(session: dax_mp.Session) -> None:
    with session.open("file", "w") as writer:
        reads: list[Callable[[], object]] = [writer.read, writer.readall, lambda: writer.readinto(bytearray(1))]
        for read in reads:
            with pytest.raises(io.UnsupportedOperation):
                read()
    with session.open("file") as reader:
        writes: list[Callable[[], object]] = [
            lambda: reader.write(b"x"),
            lambda: reader.truncate(1),
            lambda: reader.punch_hole(0, 1),
        ]
        for write in writes:
            with pytest.raises(io.UnsupportedOperation):
                write()
        with pytest.raises(io.UnsupportedOperation):
            reader.fileno()


def test_closed(session: dax_mp.Session) -> None:
    file = session.open("file", "w+")
    file.close()
    file.close()
    assert file.closed
    assert "closed" in repr(file)
    calls: list[Callable[[], Any]] = [
        file.read,
        file.readall,
        file.tell,
        file.flush,
        file.fsync,
        file.readable,
        file.writable,
        file.seekable,
        file.fileno,
        file.isatty,
        file.stat,
        file.extents,
        file.truncate,
        file.mmap,
        lambda: file.size,
        lambda: file.write(b""),
        lambda: file.readinto(bytearray(1)),
        lambda: file.seek(0),
        lambda: file.punch_hole(0, 1),
        file.__enter__,
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()


def test_buffered_and_text_layers_stand_on_it(session: dax_mp.Session) -> None:
    with io.TextIOWrapper(io.BufferedRandom(session.open("text", "w+")), encoding="utf-8") as text:
        text.write("päge\n" * 1000)
        text.seek(0)
        assert text.readlines() == ["päge\n"] * 1000


def test_unlinked_file_lives_until_it_is_closed(session: dax_mp.Session) -> None:
    free = session.statfs().pages_free
    with session.open("file", "w+") as file:
        file.write(b"still here")
        session.unlink("file")
        file.seek(0)
        assert file.read() == b"still here"
        assert (file.stat().nlink, file.stat().name) == (0, None)
        assert session.statfs().pages_free == free - 1
    assert session.statfs().pages_free == free


def test_a_forgotten_file_is_closed_by_the_next_request(session: dax_mp.Session) -> None:
    free = session.statfs().pages_free
    file = session.open("file", "w+")
    file.write(b"x")
    session.unlink("file")
    with pytest.warns(ResourceWarning, match="unclosed file"):
        del file
    session.listdir()
    assert session.statfs().pages_free == free


def test_threads_share_a_file(session: dax_mp.Session) -> None:
    """Each write goes to a place of its own: the position moves under the file's lock."""
    with session.open("shared", "w+") as file:

        def write(letter: bytes) -> None:
            for _ in range(50):
                file.write(letter * 10)

        threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        file.seek(0)
        data = file.read()
    pieces = [data[index : index + 10] for index in range(0, len(data), 10)]
    assert sorted(pieces) == sorted(letter * 10 for letter in (b"a", b"b", b"c", b"d") for _ in range(50))


def test_lines_are_read_in_chunks(session: dax_mp.Session) -> None:
    """With io.FileIO's lines and positions; a request a line or less, not one a byte."""
    text = b"".join(b"%d " % number * (number % 997) + b"\n" for number in range(2000)) + b"\n\nno newline"
    with session.open("lines", "w+") as file:
        file.write(text)
        expected = io.BytesIO(text)
        file.seek(0)
        for size in (-1, None, 0, 1, 5, 4096, 4097, 10_000, -1):
            assert (file.readline(size), file.tell()) == (expected.readline(size), expected.tell())
        for line, there in zip(file, expected, strict=True):
            assert (line, file.tell()) == (there, expected.tell())
        file.seek(7)
        expected.seek(7)
        assert file.readlines(100) == expected.readlines(100)
        assert file.readlines() == expected.readlines()
        assert file.readline() == b""
        with pytest.raises(TypeError):
            file.readline("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="closed"):
        file.readline()
