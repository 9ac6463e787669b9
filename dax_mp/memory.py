"""What the core asks of the memory behind a region: three operations on bytes.

The daemon gives it the region's file descriptor, a test a bytearray; the core itself does no I/O.
"""

from typing import Protocol


class Memory(Protocol):
    """A region's bytes. Offsets and lengths are in bytes from its start, and lie within it."""

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """Make the range read as zero. Raises OSError (ENOSPC) where what backs a sparse region is full."""

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """The bytes of the range."""

    def write(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """Store the bytes. Raises OSError (ENOSPC) where what backs a sparse region is full."""


class ByteArrayMemory:
    """A region in one process's own memory, for tests and simulations."""

    def __init__(self, size_bytes: int) -> None:
        self.data = bytearray(size_bytes)

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        self.data[offset_bytes : offset_bytes + length_bytes] = bytes(length_bytes)

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        return bytes(self.data[offset_bytes : offset_bytes + length_bytes])

    def write(self, offset_bytes: int, data: bytes | memoryview) -> None:
        self.data[offset_bytes : offset_bytes + len(data)] = data
