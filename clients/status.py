"""What the coordinator tells about files, the device, and who maps what: the replies of Stat, Extents, Maps and Statfs.

All counts of pages are of pages of `Session.page_size` bytes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dax_mp import messages
from dax_mp.messages import Access, Target


class Mapper(NamedTuple):
    """A process that has a file mapped, and by how many VMAs."""

    pid: int
    vmas: int


class FileStat(NamedTuple):
    """One file."""

    ino: int
    name: str | None
    """None when it has been unlinked and lives on for its users."""
    size_bytes: int
    blocks: int
    """Pages of the PMem region that it has: its holes have none."""
    nlink: int
    atime_ns: int
    """Of the last read or new mapping, as relatime has it; of the coordinator's clock, since the epoch."""
    mtime_ns: int
    """Of the last change of contents or size. A store through a mapping counts at its write fault and at a flush.
    There is no such fault where a load has mapped the block already."""
    ctime_ns: int
    """Of the last change of those, of its name or of its attributes."""
    mappers: list[Mapper]

    @classmethod
    def from_reply(cls, reply: dict[str, Any]) -> "FileStat":
        mappers = [Mapper(mapper["pid"], mapper["vmas"]) for mapper in reply["mappers"]]
        return cls(**{**{field: reply[field] for field in cls._fields}, "mappers": mappers})


class Extent(NamedTuple):
    """A part of a file that has blocks, next to each other in the region."""

    offset_bytes: int
    length_bytes: int
    frame: int
    """The first block's frame in the PMem region."""
    unwritten: bool = False
    """Allocated, and still read as a hole."""


class MappedRange(NamedTuple):
    """Pages that a process may have mapped by a VMA, as the coordinator knows it (the rmap)."""

    pgoff: int
    length_pages: int
    target: Target
    pfn: int
    access: Access


class VmaMaps(NamedTuple):
    """A VMA of a file, and which of its pages may be mapped."""

    pid: int
    evicted: bool
    """Its process has been evicted, and has not said yet that it holds no translation."""
    vma_id: int
    pgoff: int
    length_pages: int
    access: Access
    private: bool
    mapped: list[MappedRange]

    def next_request(self) -> tuple[int, int]:
        """With which VMA, and which page of it, what the coordinator has not told yet begins, if this is the last."""
        if not self.mapped:
            return self.vma_id + 1, 0
        return self.vma_id, self.mapped[-1].pgoff + self.mapped[-1].length_pages

    @classmethod
    def from_reply(cls, reply: dict[str, Any]) -> "VmaMaps":
        flat = iter(reply["mapped"])
        mapped = [
            MappedRange(pgoff, length_pages, Target(target), pfn, Access(access))
            for pgoff, length_pages, target, pfn, access in zip(flat, flat, flat, flat, flat, strict=True)
        ]
        fields = {**{field: reply[field] for field in cls._fields}, "mapped": mapped, "access": Access(reply["access"])}
        return cls(**fields)


class DeviceStat(NamedTuple):
    """The device as a whole, in pages, and what has happened on it since the coordinator started."""

    page_size: int
    hole_policy: str
    pages: int
    pages_free: int
    pages_quarantined: int
    """Freed, but an evicted process may still reach them."""
    dram_pages: int
    """Of the page cache; 0 where holes are read through the zero page."""
    dram_pages_free: int
    files: int
    sessions: int
    handles: int
    """Open files, of all sessions. A file object and its mappings have one together."""
    vmas: int
    counters: dict[str, int]

    @classmethod
    def from_reply(cls, reply: dict[str, Any]) -> "DeviceStat":
        return cls(**{field: reply[field] for field in cls._fields})


def read_maps(request: Callable[..., Any], name: str) -> list[VmaMaps]:
    """All that Maps has to tell of a file, in as many requests as that takes. request: `Channel.request`."""
    vmas: list[VmaMaps] = []
    vma_id = pgoff = 0
    while True:
        replies = request(messages.Maps, name, vma_id, pgoff, filename=name)
        if not replies:
            return vmas
        for vma in map(VmaMaps.from_reply, replies):
            if vmas and vmas[-1].vma_id == vma.vma_id:  # its page table did not fit into one reply
                vmas[-1].mapped.extend(vma.mapped)
            else:
                vmas.append(vma)
        vma_id, pgoff = vmas[-1].next_request()


def read_list(request: Callable[..., Any]) -> list[FileStat]:
    """All files that have a name, in as many requests as that takes."""
    stats: list[FileStat] = []
    while replies := request(messages.List, stats[-1].name if stats else ""):
        stats += map(FileStat.from_reply, replies)
    return stats
