"""What a read of a hole maps: the two answers of 2014.

`ZeroPage`: the one global zero page, as Linux has since 4.14. It takes no memory, and a run of holes is one mapping.
The clients map private anonymous memory read-only, which is their kernel's own zero page.

`PageCache`: a page-cache page, as DAX had until 4.13: a zeroed frame of the DRAM region, the same one for all mappers
of that page of the file. It is kicked out when the page is written to, and reclaimed, oldest first, when the region is
full. Where no frame can be had, because all are locked or in quarantine, the zero page is mapped here too.

Either way the mappers are found through i_mmap, and have all dropped the page before a write to it goes on (I4).
"""

from collections.abc import Iterator
from typing import Protocol

from dax_mp.address_space import ZERO_PTE, pack_pte
from dax_mp.frames import FrameAllocator
from dax_mp.inode import Inode
from dax_mp.memory import Memory
from dax_mp.messages import Access, Target
from dax_mp.ranges import Extent, PageRange

_DRAM = int(Target.DRAM)
_READ = int(Access.READ)


class HolePolicy(Protocol):
    """How holes are read through a mapping."""

    def prepare(self, inode: Inode, pgoff: int) -> bool:
        """Have something to map at this page of a hole; its entry lock is held. False where no frame is free for it.

        Raises OSError ENOSPC where a sparse region's backing is full.
        """

    def victim(self) -> tuple[Inode, int] | None:
        """The page to reclaim so that a frame becomes free; None where all are locked."""

    def mapped_pieces(self, inode: Inode, hole: PageRange) -> Iterator[tuple[int, int, int]]:
        """What can be mapped in this range of a hole as it is: (start, end, packed Pte) each."""

    def discard(self, inode: Inode, pages: PageRange) -> None:
        """Forget these pages. Precondition: nobody has them mapped, but for the processes of evicted sessions."""


class ZeroPage:
    """One global zero page."""

    def prepare(self, inode: Inode, pgoff: int) -> bool:
        return True

    def victim(self) -> tuple[Inode, int] | None:
        raise AssertionError("the zero page needs no frame")

    def mapped_pieces(self, inode: Inode, hole: PageRange) -> Iterator[tuple[int, int, int]]:
        yield hole.start, hole.end, ZERO_PTE

    def discard(self, inode: Inode, pages: PageRange) -> None:
        pass


class PageCache:
    """Page-cache pages in frames of the DRAM region.

    frames: of that region. memory: its bytes. page_size: in bytes.
    """

    def __init__(self, frames: FrameAllocator, memory: Memory, page_size: int) -> None:
        self.frames = frames
        self._memory = memory
        self._page_size = page_size
        self._oldest_first: dict[tuple[int, int], Inode] = {}
        """(ino, pgoff) of every page in the cache, in the order in which they came."""

    def prepare(self, inode: Inode, pgoff: int) -> bool:
        if pgoff in inode.mapping.i_pages:
            return True
        if not self.frames.free_pages:
            return False
        (extent,) = self.frames.allocate(1, self.frames.first_pfn)
        try:
            self._memory.zero(extent.pfn * self._page_size, self._page_size)
        except OSError:
            self.frames.release([extent])
            raise
        inode.mapping.i_pages[pgoff] = extent.pfn
        self._oldest_first[inode.ino, pgoff] = inode
        return True

    def victim(self) -> tuple[Inode, int] | None:
        for (_, pgoff), inode in self._oldest_first.items():
            if not inode.entry_locks.held(pgoff):
                return inode, pgoff
        return None

    def mapped_pieces(self, inode: Inode, hole: PageRange) -> Iterator[tuple[int, int, int]]:
        pages = inode.mapping.i_pages
        if not pages:
            return
        for pgoff in range(*hole):
            if (pfn := pages.get(pgoff)) is not None:
                yield pgoff, pgoff + 1, pack_pte(_DRAM, pfn, _READ)

    def discard(self, inode: Inode, pages: PageRange) -> None:
        cached = inode.mapping.i_pages
        if not cached:
            return
        in_range = range(*pages) if pages.length_pages < len(cached) else sorted(cached)
        for pgoff in in_range:
            if pages.start <= pgoff < pages.end and (pfn := cached.pop(pgoff, None)) is not None:
                del self._oldest_first[inode.ino, pgoff]
                self.frames.release([Extent(pfn, 1)])
