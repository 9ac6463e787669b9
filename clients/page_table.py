"""What the kernel has mapped in a window, from /proc/self/maps: the truth that the coordinator's rmap only mirrors.

A window's range holds these kinds of mapping, and no other:

    PROT_NONE                      nothing is mapped; the next access faults
    the PMem or the DRAM region    frames, told by the device and inode number of the region's object
    anonymous, read-only           the zero page
    anonymous, writable            a scratch page, on which a store that failed is coming to its end
                                   (for a load that failed it is the zero page)

Where faults arrive through userfaultfd(2), unmapped memory is anonymous and may be accessed: it is mapped where the
kernel has pages.
"""

import os
from array import array
from collections.abc import Iterator
from itertools import groupby
from typing import Final, Literal, NamedTuple

Backing = Literal["pmem", "dram", "zero", "scratch"]
FileId = tuple[int, int]
"""st_dev and st_ino."""


class PageTableEntry(NamedTuple):
    """Neighbouring pages of a file that are mapped alike."""

    pgoff: int
    length_pages: int
    target: Backing
    pfn: int
    """The first page's frame in its region; 0 for zero and scratch."""
    writable: bool


class _MapsLine(NamedTuple):
    start: int
    end: int
    permissions: str
    offset_bytes: int
    file_id: FileId


def read_page_table(
    address: int, length_bytes: int, pgoff: int, regions: dict[FileId, Backing], by_userfaultfd: bool
) -> list[PageTableEntry]:
    """What is mapped in [address, address + length_bytes), whose first page is page `pgoff` of its file.

    by_userfaultfd: memory that is no file's is mapped where the kernel has pages there, and else unmapped.

    Other threads may fault and unmap meanwhile; each entry was true when the kernel wrote its line.
    """
    page_size = os.sysconf("SC_PAGESIZE")
    entries: list[PageTableEntry] = []
    for line in _maps_lines():
        start, end = max(line.start, address), min(line.end, address + length_bytes)
        if start >= end or line.permissions.startswith("---"):
            continue
        if by_userfaultfd and not line.file_id[1]:
            entries += _present(start, end, pgoff + (start - address) // page_size, page_size)
            continue
        writable = line.permissions[1] == "w"
        target = regions.get(line.file_id) or ("scratch" if writable else "zero")
        offset_bytes = line.offset_bytes + start - line.start if line.file_id in regions else 0
        pages = -(-(end - start) // page_size)
        entries.append(
            PageTableEntry(pgoff + (start - address) // page_size, pages, target, offset_bytes // page_size, writable)
        )
    return entries


_ENTRIES: Final = 1 << 16
_PRESENT: Final = 1 << 63
_WRITE_PROTECTED: Final = 1 << 57


def _present(start: int, end: int, pgoff: int, page_size: int) -> Iterator[PageTableEntry]:
    """Zeroes and scratch pages, as /proc/self/pagemap has them: zeroes are write-protected."""
    first, last = start // page_size, -(-end // page_size)
    states: Iterator[int | None] = (
        entry & _WRITE_PROTECTED if entry & _PRESENT else None
        for chunk in range(first, last, _ENTRIES)
        for entry in _pagemap(chunk, min(_ENTRIES, last - chunk))
    )
    for state, pages in groupby(states):
        count = sum(1 for _ in pages)
        if state is not None:
            yield PageTableEntry(pgoff, count, "zero" if state else "scratch", 0, not state)
        pgoff += count


def _pagemap(first_page: int, pages: int) -> "array[int]":
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(8 * first_page)
        return array("Q", pagemap.read(8 * pages))


def _maps_lines() -> Iterator[_MapsLine]:
    """The lines of /proc/self/maps (proc_pid_maps(5)): start-end permissions offset major:minor inode [path]."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for text in maps:
            addresses, permissions, offset, device, inode = text.split(maxsplit=5)[:5]
            start, end = addresses.split("-")
            major, minor = device.split(":")
            file_id = (os.makedev(int(major, 16), int(minor, 16)), int(inode))
            yield _MapsLine(int(start, 16), int(end, 16), permissions, int(offset, 16), file_id)
