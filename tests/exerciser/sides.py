"""One file with its mappings, in one process: on a device here, or in /dev/shm with the kernel's own mmap(2).

Both map PAGES_MAX pages whatever the file's size. The kernel's mappings are made by the C library, since mmap.mmap maps
no further than the file goes; what lies past its end is SIGBUS there, so it is looked at only where it is legal.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from typing import Any, Final, Protocol

import dax_mp
from dax_mp.clients import direct_io
from exerciser.model import PAGES_MAX

PAGE: Final = mmap.PAGESIZE
_LENGTH: Final = PAGES_MAX * PAGE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class Side(Protocol):
    """What both can do. private: which of the two mappings."""

    def size(self) -> int: ...
    def pread(self, length: int, offset: int) -> bytes: ...
    def load(self, private: bool, length: int) -> bytes: ...
    def store(self, private: bool, offset: int, data: bytes) -> None: ...
    def pwrite(self, offset: int, data: bytes) -> None: ...
    def pwritev(self, offset: int, parts: list[bytes]) -> None: ...
    def append(self, data: bytes) -> None: ...
    def truncate(self, size: int) -> None: ...
    def fallocate(self, offset: int, length: int, keep_size: bool) -> None: ...
    def punch(self, offset: int, length: int) -> None: ...
    def copy(self, source: int, target: int, length: int) -> int: ...
    def dont_need(self, private: bool, page: int, count: int) -> None: ...
    def remap(self, private: bool) -> None: ...
    def read_into_memory(self, offset: int, data: bytes) -> None: ...
    def check_readv(self, offset: int, parts: list[bytes]) -> None: ...
    def close(self) -> None: ...


class Here:
    """A file of a session."""

    def __init__(self, session: dax_mp.Session, name: str) -> None:
        self.file = session.open(name, "r+")
        self._append = session.open(name, "a")
        self._map()

    def _map(self) -> None:
        self.shared = self.file.mmap(_LENGTH, past_eof=True)
        self.private = self._map_private()
        self.readonly = self.file.mmap(_LENGTH - PAGE, PAGE, access=dax_mp.ACCESS_READ, past_eof=True)

    def _map_private(self) -> dax_mp.Mapping:
        return self.file.mmap(_LENGTH, access=dax_mp.ACCESS_COPY, past_eof=True)

    def size(self) -> int:
        return self.file.size

    def pread(self, length: int, offset: int) -> bytes:
        return self.file.pread(length, offset)

    def load(self, private: bool, length: int) -> bytes:
        return (self.private if private else self.shared)[:length]

    def store(self, private: bool, offset: int, data: bytes) -> None:
        (self.private if private else self.shared)[offset : offset + len(data)] = data

    def pwrite(self, offset: int, data: bytes) -> None:
        assert self.file.pwrite(data, offset) == len(data)

    def pwritev(self, offset: int, parts: list[bytes]) -> None:
        assert self.file.pwritev(parts, offset) == sum(map(len, parts))

    def append(self, data: bytes) -> None:
        assert self._append.write(data) == len(data)

    def truncate(self, size: int) -> None:
        self.file.truncate(size)

    def fallocate(self, offset: int, length: int, keep_size: bool) -> None:
        self.file.fallocate(offset, length, keep_size)

    def punch(self, offset: int, length: int) -> None:
        self.file.punch_hole(offset, length)

    def copy(self, source: int, target: int, length: int) -> int:
        return self.file.copy_range(source, self.file, target, length)

    def dont_need(self, private: bool, page: int, count: int) -> None:
        (self.private if private else self.shared).madvise(mmap.MADV_DONTNEED, page * PAGE, count * PAGE)

    def remap(self, private: bool) -> None:
        if private:
            self.private.close()
            self.private = self._map_private()
        else:
            self.shared.close()
            self.shared = self.file.mmap(_LENGTH, past_eof=True)

    def read_into_memory(self, offset: int, data: bytes) -> None:
        """A system call stores into the shared mapping."""
        with self.shared.pin(offset, len(data)) as view:
            _read_from_pipe(view, data)

    def check_readv(self, offset: int, parts: list[bytes]) -> None:
        _check_readv(lambda buffers: self.file.preadv(buffers, offset), parts)

    # --- what the other side has not, or does in another way ---------------------------------------------------------

    def pwrite_direct(self, offset: int, data: bytes) -> None:
        """As a long write does it, however short this one is."""
        with memoryview(data) as view:
            assert direct_io.write(self.file._open_for_writing(), view, offset, False) == offset + len(data)

    def check_direct_read(self, offset: int, expected: bytes) -> None:
        buffer = bytearray(len(expected))
        with memoryview(buffer) as view:
            assert direct_io.readinto(self.file._open_for_reading(), view, offset) == len(expected)
        assert buffer == expected, "a direct read differs"

    def resize(self, size: int) -> None:
        """Give the file and the shared mapping this size while a buffer of that is out."""
        before = min(size, self.size(), _LENGTH)
        with memoryview(self.shared) as view:
            expected = bytes(view[:before])
            self.shared.resize(size)
            assert len(self.shared) == self.size() == size
            assert bytes(view[:before]) == expected, "a view differs after a resize"
        self.remap(False)

    def unmap(self, private: bool, page: int, count: int) -> None:
        """Take pages out of a mapping: the others stay as they are."""
        mapping = self.private if private else self.shared
        shown = min(self.size(), _LENGTH)
        start, end = page * PAGE, (page + count) * PAGE
        before = mapping[:start] if start < shown else b""
        after = mapping[end:shown]
        mapping.unmap(start, end - start)
        for at in range(start, min(end, shown), PAGE):
            try:
                mapping[at]
            except dax_mp.BusError:
                continue
            raise AssertionError("a page that was unmapped is there")
        assert mapping[: len(before)] == before and mapping[end:shown] == after, "an unmap took too much"
        self.remap(private)

    def check_holes(self) -> None:
        """SEEK_HOLE and SEEK_DATA go through the file in turns, and holes read as zero."""
        position, size = 0, self.size()
        while position < size:
            hole = self.file.seek(position, os.SEEK_HOLE)
            if hole == size:
                break
            try:
                end = self.file.seek(hole, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                end = size
            assert position <= hole < end <= size
            assert not any(self.pread(end - hole, hole)), "a hole is not zero"
            position = end

    def close(self) -> None:
        for held in (self.shared, self.private, self.readonly, self.file, self._append):
            held.close()


class Kernel:
    """A file of tmpfs."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._append = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._addresses = [self._map(False), self._map(True)]

    def _map(self, private: bool) -> int:
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        return _check(_libc.mmap(None, _LENGTH, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._fd, 0))

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def pread(self, length: int, offset: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def load(self, private: bool, length: int) -> bytes:
        return ctypes.string_at(self._addresses[private], length)

    def store(self, private: bool, offset: int, data: bytes) -> None:
        ctypes.memmove(self._addresses[private] + offset, data, len(data))

    def pwrite(self, offset: int, data: bytes) -> None:
        assert os.pwrite(self._fd, data, offset) == len(data)

    def pwritev(self, offset: int, parts: list[bytes]) -> None:
        assert os.pwritev(self._fd, parts, offset) == sum(map(len, parts))

    def append(self, data: bytes) -> None:
        assert os.write(self._append, data) == len(data)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def fallocate(self, offset: int, length: int, keep_size: bool) -> None:
        _check(_libc.fallocate(self._fd, int(keep_size), offset, length))

    def punch(self, offset: int, length: int) -> None:
        _check(_libc.fallocate(self._fd, 3, offset, length))

    def copy(self, source: int, target: int, length: int) -> int:
        return os.copy_file_range(self._fd, self._fd, length, source, target)

    def dont_need(self, private: bool, page: int, count: int) -> None:
        _check(_libc.madvise(self._addresses[private] + page * PAGE, count * PAGE, mmap.MADV_DONTNEED))

    def remap(self, private: bool) -> None:
        _check(_libc.munmap(self._addresses[private], _LENGTH))
        self._addresses[private] = self._map(private)

    def read_into_memory(self, offset: int, data: bytes) -> None:
        address = self._addresses[False] + offset
        _read_from_pipe(memoryview((ctypes.c_char * len(data)).from_address(address)).cast("B"), data)

    def check_readv(self, offset: int, parts: list[bytes]) -> None:
        _check_readv(lambda buffers: os.preadv(self._fd, buffers, offset), parts)

    def close(self) -> None:
        for address in self._addresses:
            _check(_libc.munmap(address, _LENGTH))
        os.close(self._fd)
        os.close(self._append)


def _check(result: Any) -> int:
    if result in (-1, (1 << 64) - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


def _read_from_pipe(view: memoryview, data: bytes) -> None:
    """read(2) of `data` into the view."""
    reader, writer = os.pipe()
    try:
        assert os.write(writer, data) == len(data)
        assert os.readv(reader, [view]) == len(data)
    finally:
        os.close(reader)
        os.close(writer)


def _check_readv(readv: Callable[[list[bytearray]], int], parts: list[bytes]) -> None:
    buffers = [bytearray(len(part)) for part in parts]
    assert readv(buffers) == sum(map(len, parts))
    assert buffers == parts, "a readv differs"
