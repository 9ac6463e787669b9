"""Files in, out and beside each other, holes kept.

Both sides of a copy say where their data is (SEEK_DATA, SEEK_HOLE), so that only data is read and written, and a last
truncate gives the length. What a file gains while it is copied is copied too; where it has become shorter, the copy
ends. Data goes in pieces that are long enough for direct I/O (`direct_io.py`). A stream has no holes: what goes to one
has zeros there.

A copy appears under its name when it is complete: on the device it is made without one (`new_file`); `cli_target.py`
says what happens to real files.
"""

import errno
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from dax_mp.clients import cli_target
from dax_mp.clients.cli_target import naming
from dax_mp.clients.standard_streams import STDIN, STDOUT, output_errors
from dax_mp.errors import os_error

if TYPE_CHECKING:
    from dax_mp.clients.file import DaxFile
    from dax_mp.clients.session import Session

STREAM: Final = "-"
"""The file name that means stdin or stdout."""

LONG_BYTES: Final = 64 << 20
"""A copy of more than this has a progress bar."""

PIECE_BYTES: Final = 4 << 20
"""What is read and written at once: longer than IO_CHUNK_BYTES_MAX, and it stays in the processor's cache."""

Advance = Callable[[int], None]


class RealFile:
    """A descriptor with the methods of a `DaxFile` that a copy needs. name: for messages."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def seek(self, offset: int, whence: int) -> int:
        return os.lseek(self._fd, offset, whence)

    def preadv(self, views: list[memoryview], offset: int) -> int:
        with naming(self._name):
            return os.preadv(self._fd, views, offset)

    def pwrite(self, data: memoryview, offset: int) -> None:
        done_bytes = 0
        with naming(self._name):
            while done_bytes < len(data):
                done_bytes += os.pwrite(self._fd, data[done_bytes:], offset + done_bytes)

    def truncate(self, size: int) -> None:
        with naming(self._name):
            os.ftruncate(self._fd, size)


def put(session: "Session", source: str, name: str) -> None:
    """Copy the file `source` (or stdin) to the file `name`. Raises OSError."""
    if source == STREAM:
        with new_file(session, name) as target:
            _stream_in(STDIN, "stdin", target)
        return
    with open(source, "rb", buffering=0) as stream, new_file(session, name) as target:
        fd = stream.fileno()
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_size:
            copy_contents("put", RealFile(fd, source), target)
        else:
            _stream_in(fd, source, target)  # a pipe, a device, or a file of /proc that hides its length


def get(session: "Session", name: str, target: str) -> None:
    """Copy the file `name` to the file or directory `target`, or to stdout. Raises OSError."""
    with session.open(name, "r") as source:
        if target == STREAM:
            _stream_out(source, STDOUT, "stdout")
            return
        path = os.path.join(target, name) if os.path.isdir(target) else target
        with naming(path):
            fd = cli_target.open_in_place(path)
            if fd is None:
                with cli_target.replacement(path) as fd:
                    copy_contents("get", source, RealFile(fd, path))
                return
            try:
                _stream_out(source, fd, path)
            finally:
                os.close(fd)


def cat(session: "Session", name: str) -> None:
    """Copy the file `name` to stdout. Raises OSError."""
    get(session, name, STREAM)


def copy(session: "Session", name: str, new_name: str) -> None:
    """Copy the file `name` to `new_name`, with its attributes. Raises OSError."""
    with session.open(name, "r") as source:
        if name == new_name:
            raise os_error(errno.EINVAL, "the copy would be the same file", name)
        with new_file(session, new_name) as target:
            copy_contents("cp", source, target)
            for attribute in source.listxattr():
                target.setxattr(attribute, source.getxattr(attribute))


@contextmanager
def new_file(session: "Session", name: str) -> "Iterator[DaxFile]":
    """A file that takes the name, from another that may have it, when the block ends; there is none if that fails."""
    with session.tmpfile(name) as file:
        yield file
        file.link(replace=True)


# --- copies that keep holes ----------------------------------------------------------------------------------------


def copy_contents(what: str, source: "DaxFile | RealFile", target: "DaxFile | RealFile") -> None:
    """Make the empty file `target` a copy. what: for the progress bar. Raises OSError."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, source.size + 1)))
    end_bytes = 0
    with _progress(what, source.size) as advance:
        while (size_bytes := source.size) > end_bytes:
            end_bytes = _copy_part(source, target, end_bytes, size_bytes, buffer, advance)
            if end_bytes < size_bytes:
                break
    target.truncate(end_bytes)


def _copy_part(
    source: "DaxFile | RealFile",
    target: "DaxFile | RealFile",
    start_bytes: int,
    end_bytes: int,
    buffer: memoryview,
    advance: Advance,
) -> int:
    """Copy what there is of [start, end). Returns `end_bytes`, or where the source ends now."""
    position = start_bytes
    for start, end in _data_ranges(source.seek, start_bytes, end_bytes):
        position = start
        while position < end:
            piece = buffer[: end - position]
            read_bytes = source.preadv([piece], position)
            if not read_bytes:
                return position
            target.pwrite(piece[:read_bytes], position)
            position += read_bytes
            advance(position)
    return max(position, min(source.size, end_bytes))  # the last part is a hole


def _data_ranges(seek: Callable[[int, int], int], position: int, end_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each part of [position, end_bytes) that has data, by offset. seek: as DaxFile.seek."""
    while position < end_bytes:
        try:
            start = seek(position, os.SEEK_DATA)
            position = min(seek(start, os.SEEK_HOLE), end_bytes)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # only a hole is left, or it has become shorter
            if error.errno != errno.EINVAL:
                raise
            start, position = position, end_bytes  # of a file system that knows of no holes
        if start >= end_bytes:
            return
        yield start, position


# --- streams -------------------------------------------------------------------------------------------------------


def _stream_in(fd: int, name: str, target: "DaxFile") -> None:
    buffer = memoryview(bytearray(PIECE_BYTES))
    filled_bytes = PIECE_BYTES
    while filled_bytes == PIECE_BYTES:
        filled_bytes = 0
        while filled_bytes < PIECE_BYTES:
            with naming(name):
                read_bytes = _wait_for(_read, fd, select.POLLIN, buffer[filled_bytes:])
            if not read_bytes:
                break
            filled_bytes += read_bytes
        target.write(buffer[:filled_bytes])


def _stream_out(source: "DaxFile", fd: int, name: str) -> None:
    buffer = memoryview(bytearray(PIECE_BYTES))
    with _progress("get", source.size) as advance:
        while read_bytes := source.readinto(buffer):
            _write_all(fd, name, buffer[:read_bytes])
            advance(source.tell())


def _write_all(fd: int, name: str, data: memoryview) -> None:
    written_bytes = 0
    with output_errors() if fd == STDOUT else naming(name):
        while written_bytes < len(data):
            written_bytes += _wait_for(os.write, fd, select.POLLOUT, data[written_bytes:])


def _read(fd: int, buffer: memoryview) -> int:
    return os.readv(fd, [buffer])


def _wait_for(call: Callable[[int, memoryview], int], fd: int, event: int, buffer: memoryview) -> int:
    """The system call's result: a descriptor that somebody else has made non-blocking is waited for."""
    while True:
        try:
            return call(fd, buffer)
        except BlockingIOError:
            poller = select.poll()
            poller.register(fd, event)
            poller.poll()


@contextmanager
def _progress(text: str, total_bytes: int) -> Iterator[Advance]:
    """A progress bar on stderr, where that is a terminal and the copy a long one: call it with the offset reached."""
    if total_bytes < LONG_BYTES or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(text), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=total_bytes)
        yield lambda offset: progress.update(task, completed=offset)
