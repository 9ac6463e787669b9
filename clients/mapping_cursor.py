"""The half of a mapping that is like a file and like a sequence: a position, searches, iteration.

Everything goes through slices of the window, in chunks, so that a search costs no memory to speak of, and an access
that has nothing to map raises BusError at once.

Arguments are taken as mmap.mmap takes them: what it has as a C int or Py_ssize_t is an integer of that range here,
tested before anything else is.
"""

import operator
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from dax_mp import mmu

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_CHUNK_BYTES: Final = 1 << 20
_C_INT_MAX: Final = (1 << 31) - 1


class MappingCursor(mmu.Window):
    """What mmap.mmap has beyond indexes and slices; the same mistakes raise the same exceptions."""

    _position_bytes = 0

    def tell(self) -> int:
        """The position in bytes."""
        self._check_open()
        return self._position_bytes

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position; returns it. whence: SEEK_SET, SEEK_CUR, SEEK_END. Raises ValueError."""
        self._check_open()
        offset = as_ssize(offset)
        match as_c_int(whence):
            case os.SEEK_SET:
                pass
            case os.SEEK_CUR:
                offset += self._position_bytes
            case os.SEEK_END:
                offset += len(self)
            case _:
                raise ValueError("unknown seek type")
        if not 0 <= offset <= len(self):
            raise ValueError("seek out of range")
        self._position_bytes = offset
        return offset

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = None, /) -> bytes:
        """At most `size` bytes from the position on; all that are left for None or a negative number."""
        self._check_open()
        left_bytes = max(0, len(self) - self._position_bytes)
        size = left_bytes if size is None else as_ssize(size)
        if not 0 <= size <= left_bytes:
            size = left_bytes
        data = self[self._position_bytes : self._position_bytes + size]
        self._position_bytes += size
        return data

    def read_byte(self) -> int:
        """The byte at the position, as an integer. Raises ValueError at the end."""
        self._check_open()
        if self._position_bytes >= len(self):
            raise ValueError("read byte out of range")
        byte = self[self._position_bytes]
        self._position_bytes += 1
        return byte

    def readline(self) -> bytes:
        """From the position on, up to a newline and with it, or to the end."""
        self._check_open()
        newline = self.find(b"\n", self._position_bytes)
        return self.read(None if newline < 0 else newline + 1 - self._position_bytes)

    def write(self, data: "ReadableBuffer", /) -> int:
        """Store the bytes at the position; returns how many. Raises ValueError where they do not fit, TypeError."""
        self._check_open()
        with memoryview(data) as view:
            if not view.c_contiguous:
                raise BufferError("memoryview: underlying buffer is not C-contiguous")
            count = view.nbytes
            self._check_writable()
            if self._position_bytes > len(self) - count:
                raise ValueError("data out of range")
            self[self._position_bytes : self._position_bytes + count] = view
        self._position_bytes += count
        return count

    def write_byte(self, byte: int, /) -> None:
        """Store a byte at the position. Raises ValueError at the end, OverflowError, TypeError."""
        self._check_open()
        value = operator.index(byte)
        if not 0 <= value <= 255:
            wrong = "less than minimum" if value < 0 else "greater than maximum"
            raise OverflowError(f"unsigned byte integer is {wrong}")
        self._check_writable()
        if self._position_bytes >= len(self):
            raise ValueError("write byte out of range")
        self[self._position_bytes] = value
        self._position_bytes += 1

    def __iter__(self) -> Iterator[bytes]:
        """Bytes objects of length 1, where an index gives an integer: so it is with mmap.mmap."""
        index = 0
        while byte := self[index : index + 1]:
            yield byte
            index += 1

    def __reversed__(self) -> Iterator[bytes]:
        for index in reversed(range(len(self))):
            yield self[index : index + 1]

    def find(self, sub: "ReadableBuffer", start: int | None = None, end: int | None = None, /) -> int:
        """The first place of `sub` in [start, end), which is the position and the end where not given; -1: none."""
        needle, low, high = self._search(sub, start, end)
        overlap = max(0, len(needle) - 1)
        while low <= high - len(needle):
            chunk_end = min(low + _CHUNK_BYTES + overlap, high)
            found = self[low:chunk_end].find(needle)
            if found >= 0:
                return low + found
            if chunk_end == high:
                break
            low = chunk_end - overlap
        return -1

    def rfind(self, sub: "ReadableBuffer", start: int | None = None, end: int | None = None, /) -> int:
        """The last place of `sub` in [start, end); -1: none."""
        needle, low, high = self._search(sub, start, end)
        overlap = max(0, len(needle) - 1)
        while low <= high - len(needle):
            chunk_start = max(high - _CHUNK_BYTES - overlap, low)
            found = self[chunk_start:high].rfind(needle)
            if found >= 0:
                return chunk_start + found
            if chunk_start == low:
                break
            high = chunk_start + overlap
        return -1

    def _search(self, sub: "ReadableBuffer", start: int | None, end: int | None) -> tuple[bytes, int, int]:
        """The bytes to look for, and where, as slices take negative numbers."""
        self._check_open()
        with memoryview(sub) as view:
            needle = view.tobytes()
        low = self._position_bytes if start is None else as_ssize(start)
        high = len(self) if end is None else as_ssize(end)
        size_bytes = len(self)
        low = max(0, low + size_bytes) if low < 0 else min(low, size_bytes)
        high = max(0, high + size_bytes) if high < 0 else min(high, size_bytes)
        return needle, low, high

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("mmap closed or invalid")

    def _check_writable(self) -> None:
        if not self.writable:
            raise TypeError("mmap can't modify a readonly memory map.")


def as_ssize(value: int) -> int:
    """`value` as a Py_ssize_t. Raises OverflowError, TypeError."""
    number = operator.index(value)
    if not -sys.maxsize - 1 <= number <= sys.maxsize:
        raise OverflowError("Python int too large to convert to C ssize_t")
    return number


def as_c_int(value: int) -> int:
    """`value` as a C int. Raises OverflowError, TypeError."""
    number = operator.index(value)
    if not -_C_INT_MAX - 1 <= number <= _C_INT_MAX:
        raise OverflowError("Python int too large to convert to C int")
    return number
