"""A region's first page: says what the object is, so that who opens it by name knows that it is the right one.

It is frame 0, which no file ever has.
"""

import struct
from typing import Final, NamedTuple

from dax_mp.errors import ProtocolError

_MAGIC: Final = b"dax-mp\x00\x01"
_LAYOUT: Final = struct.Struct("<8s4sIQ16s")  # magic, kind, page size, pages, uuid
SUPERBLOCK_BYTES: Final = _LAYOUT.size


class Superblock(NamedTuple):
    kind: str
    """pmem or dram."""
    page_size: int
    pages: int
    """Frames for files, after this one."""
    uuid: bytes
    """16 random bytes, the same for all regions of one coordinator (`uuid` of its Welcome)."""

    @property
    def length_bytes(self) -> int:
        """The object's whole length."""
        return (1 + self.pages) * self.page_size

    def pack(self) -> bytes:
        return _LAYOUT.pack(_MAGIC, self.kind.encode(), self.page_size, self.pages, self.uuid)

    @classmethod
    def unpack(cls, data: bytes) -> "Superblock":
        """From the object's first SUPERBLOCK_BYTES or more. Raises ProtocolError where it is not a region."""
        if len(data) < SUPERBLOCK_BYTES or not data.startswith(_MAGIC):
            raise ProtocolError("not a region of this version of dax-mp")
        _, kind, page_size, pages, uuid = _LAYOUT.unpack_from(data)
        return cls(kind.decode("ascii", "replace"), page_size, pages, uuid)
