"""One file with its mappings, in one process: on a device here, or in /dev/shm with the kernel's own mmap(2).

Both map PAGES_MAX pages whatever the file's size. The kernel's mappings are made by the C library, since mmap.mmap maps
no further than the file goes; what lies past its end is SIGBUS there, so it is looked at only where it is legal.
"""

import ctypes
import mmap
import os
from typing import Any, Final, Protocol

import dax_mp
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
    def remap(self) -> None: ...
    def close(self) -> None: ...


class Here:
    """A file of a session."""

    def __init__(self, session: dax_mp.Session, name: str) -> None:
        self.file = session.open(name, "r+")
        self._append = session.open(name, "a")
        self._map()

    def _map(self) -> None:
        self.shared = self.file.mmap(_LENGTH, past_eof=True)
        self.private = self.file.mmap(_LENGTH, access=dax_mp.ACCESS_COPY, past_eof=True)
        self.readonly = self.file.mmap(_LENGTH - PAGE, PAGE, access=dax_mp.ACCESS_READ, past_eof=True)

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

    def remap(self) -> None:
        for mapping in (self.shared, self.private, self.readonly):
            mapping.close()
        self._map()

    def close(self) -> None:
        for held in (self.shared, self.private, self.readonly, self.file, self._append):
            held.close()


class Kernel:
    """A file of tmpfs."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._append = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._map()

    def _map(self) -> None:
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        self._addresses = [
            _check(_libc.mmap(None, _LENGTH, prot, flags, self._fd, 0)) for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE)
        ]

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

    def remap(self) -> None:
        for address in self._addresses:
            _check(_libc.munmap(address, _LENGTH))
        self._map()

    def close(self) -> None:
        for address in self._addresses:
            _check(_libc.munmap(address, _LENGTH))
        os.close(self._fd)
        os.close(self._append)


def _check(result: Any) -> int:
    if result in (-1, (1 << 64) - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)
