"""Real files in and out, holes kept.

Both sides say where their data is (SEEK_DATA, SEEK_HOLE), so that only data is read and written, and a last truncate
gives the length. A copy appears under its name when it is complete: it is made under another one and renamed. A
stream has no holes: what goes to one has zeros there.
"""

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO, Final

from dax_mp.limits import IO_CHUNK_BYTES_MAX

if TYPE_CHECKING:
    from dax_mp.clients.file import DaxFile
    from dax_mp.clients.session import Session

STREAM: Final = "-"
"""The file name that means stdin or stdout."""

LONG_BYTES: Final = 64 << 20
"""A copy of more than this has a progress bar."""

Advance = Callable[[int], None]


def put(session: "Session", source: str, name: str) -> None:
    """Copy the file `source` (or stdin) to the file `name`. Raises OSError."""
    temporary = f".put-{os.urandom(8).hex()}"
    with sys.stdin.buffer if source == STREAM else open(source, "rb", buffering=0) as stream:
        try:
            with session.open(temporary, "x") as target:
                status = os.fstat(stream.fileno())
                if stat.S_ISREG(status.st_mode) and status.st_size and source != STREAM:
                    _copy_in(stream.fileno(), status.st_size, target)
                else:
                    _stream_in(stream, target)  # a pipe, a device, or a file of /proc that hides its length
            session.rename(temporary, name)
        except BaseException:
            with suppress(OSError):  # it is not there yet, or the coordinator is not there any more
                session.unlink(temporary)
            raise


def get(session: "Session", name: str, target: str) -> None:
    """Copy the file `name` to the file or directory `target`, or to stdout. Raises OSError."""
    with session.open(name, "r") as source:
        if target == STREAM:
            _stream_out(source, sys.stdout.buffer)
            return
        path = os.path.join(target, name) if os.path.isdir(target) else os.path.realpath(target)
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as stream:
                _stream_out(source, stream)
            return
        _replace(source, path)


def _replace(source: "DaxFile", path: str) -> None:
    """Make the regular file `path` a copy, at once when it is complete; one that is there keeps its mode."""
    temporary = os.path.join(os.path.dirname(path), f".get-{os.urandom(8).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            if os.path.exists(path):
                os.fchmod(fd, stat.S_IMODE(os.stat(path).st_mode))
            _copy_out(source, fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _copy_in(fd: int, size_bytes: int, target: "DaxFile") -> None:
    with _progress("put", size_bytes) as advance:
        for start, end in _data_ranges(lambda offset, whence: os.lseek(fd, offset, whence), size_bytes):
            target.seek(start)
            for offset, length in _chunks(start, end):
                data = os.pread(fd, length, offset)
                target.write(data)
                advance(offset + len(data))
                if len(data) < length:
                    break  # it has become shorter meanwhile
    target.truncate(size_bytes)


def _stream_in(stream: BinaryIO, target: "DaxFile") -> None:
    while data := stream.read(IO_CHUNK_BYTES_MAX):
        target.write(data)


def _copy_out(source: "DaxFile", fd: int) -> None:
    size_bytes = source.size
    with _progress("get", size_bytes) as advance:
        for start, end in _data_ranges(source.seek, size_bytes):
            source.seek(start)
            for offset, length in _chunks(start, end):
                data = source.read(length)
                if os.pwrite(fd, data, offset) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                advance(offset + len(data))
    os.ftruncate(fd, size_bytes)


def _stream_out(source: "DaxFile", stream: BinaryIO) -> None:
    with _progress("get", source.size) as advance:
        while data := source.read(IO_CHUNK_BYTES_MAX):
            stream.write(data)
            advance(source.tell())
    stream.flush()


def _data_ranges(seek: Callable[[int, int], int], size_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each part of the file that has data, by offset. seek: as os.lseek without the descriptor."""
    end = 0
    while end < size_bytes:
        try:
            start = seek(end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # only a hole is left
            raise
        end = min(seek(start, os.SEEK_HOLE), size_bytes)
        yield start, end


def _chunks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the pieces of a range, none longer than one message takes."""
    for offset in range(start, end, IO_CHUNK_BYTES_MAX):
        yield offset, min(IO_CHUNK_BYTES_MAX, end - offset)


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
