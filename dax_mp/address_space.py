"""A file's address_space: the rmap, from the file's pages to who has them mapped.

`i_mmap` has every VMA of the file, in every process: the list that unmap_mapping_range() walks, and the answer to "who
loops over all the VMAs?". Each VMA has a `PageTable`: what its process has mapped, or is about to map, at which page.

The page table is the coordinator's record; the truth is in the client's kernel. The record may name a translation that
the client has dropped by itself (it does when it runs out of VMAs), never lack one that it has (I7): an entry goes in
before the Map is sent, and out when the Unmap is acknowledged, the VMA closed or the process dead.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from dax_mp.messages import Access, Target
from dax_mp.ranges import PageRange, RangeMap

if TYPE_CHECKING:
    from dax_mp.inode import Inode
    from dax_mp.session import Session

_ACCESS_BITS = 2
_TARGET_BITS = 2
_PFN_SHIFT = _ACCESS_BITS + _TARGET_BITS
_ZERO = int(Target.ZERO)


class Pte(NamedTuple):
    """What one page is mapped to."""

    target: Target
    pfn: int
    access: Access


def pack_pte(target: int, pfn: int, access: int) -> int:
    """A Pte as one integer, like the kernel's: pfn, target, access. Takes plain integers: enum arithmetic is slow."""
    return pfn << _PFN_SHIFT | target << _ACCESS_BITS | access


ZERO_PTE: Final = pack_pte(Target.ZERO, 0, Access.READ)
"""The global zero page, packed."""


def pte_fields(entry: int) -> tuple[int, int, int]:
    """A packed Pte as (target, pfn, access), plain integers."""
    return entry >> _ACCESS_BITS & 3, entry >> _PFN_SHIFT, entry & 3


def unpack_pte(entry: int) -> Pte:
    target, pfn, access = pte_fields(entry)
    return Pte(Target(target), pfn, Access(access))


class PageTable(RangeMap[int]):
    """pgoff to packed Pte. The frames of a piece follow each other; the zero page is the same all along."""

    __slots__ = ()

    @staticmethod
    def advance(value: int, steps: int) -> int:
        return value if value >> _ACCESS_BITS & 3 == _ZERO else value + (steps << _PFN_SHIFT)


CUTS_KEPT_S: Final = 30.0
"""Longer than a fork's child may take to adopt its parent's session."""


class Cut(NamedTuple):
    """An Unmap that takes private copies too: its id, its pages, and when it was sent."""

    request_id: int
    pages: PageRange
    sent_s: float


class Vma:
    """`length_pages` of a file from `pgoff` on, mapped in one process (vm_area_struct).

    private: stores are copied on write in the process (MAP_PRIVATE), which its kernel does without a word to us. So
    `access` is READ, and only its loads are faults here. It may have copies of any of its pages.
    removed: pages taken out of it since it was made.
    cuts: of a private one, what has taken copies of late: a fork's child has some that its parent has lost since.

    `sequence_pgoff` and `sequence_pages`: where the next write fault comes if the file is written in sequence, and how
    far to allocate ahead then. Only the fault path changes them, and `page_table` together with unmap.
    """

    __slots__ = (
        "access",
        "cuts",
        "end_pgoff",
        "inode",
        "length_pages",
        "page_table",
        "pgoff",
        "private",
        "removed",
        "sequence_pages",
        "sequence_pgoff",
        "session",
        "vma_id",
        "writable",
    )

    def __init__(
        self,
        vma_id: int,
        session: "Session",
        inode: "Inode",
        pgoff: int,
        length_pages: int,
        access: Access,
        private: bool = False,
    ) -> None:
        self.vma_id = vma_id
        self.session = session
        self.inode = inode
        self.pgoff = pgoff
        self.length_pages = length_pages
        self.end_pgoff = pgoff + length_pages
        self.access = access
        self.writable = Access.WRITE in access
        self.private = private
        self.removed: RangeMap[None] | None = None
        self.cuts: tuple[Cut, ...] = ()
        self.page_table = PageTable()
        self.sequence_pgoff = -1
        self.sequence_pages = 1

    @property
    def keeps_holes(self) -> bool:
        """Is it for loads alone, so that its pins take no blocks? (A private mapping's are for stores, to copies.)"""
        return not self.writable and not self.private

    def resize(self, length_pages: int) -> None:
        self.length_pages = length_pages
        self.end_pgoff = self.pgoff + length_pages

    def cut(self, cut: Cut) -> None:
        """Note it; what it covers, and what is too old for any child, is forgotten."""
        low, high = cut.pages
        self.cuts = (
            *(
                old
                for old in self.cuts
                if old.sent_s >= cut.sent_s - CUTS_KEPT_S and not (low <= old.pages.start and old.pages.end <= high)
            ),
            cut,
        )

    def remove(self, pages: PageRange) -> None:
        """Serve no fault on these pages from now on."""
        self.removed = self.removed or RangeMap()
        self.removed.set(*pages, None)

    def has(self, pgoff: int) -> bool:
        """Is the page one of its own still?"""
        if not self.pgoff <= pgoff < self.end_pgoff:
            return False
        return self.removed is None or not any(self.removed.pieces(pgoff, pgoff + 1))

    def has_all(self, pages: PageRange) -> bool:
        """Are all of them its own still?"""
        if not (self.pgoff <= pages.start and pages.end <= self.end_pgoff):
            return False
        return self.removed is None or not any(self.removed.pieces(*pages))

    def kept(self, pages: PageRange) -> PageRange:
        """The part of `pages` up to the first one that has been removed. Precondition: the first page is there."""
        first = next(self.removed.pieces(*pages), None) if self.removed else None
        return pages if first is None else PageRange(pages.start, first[0])


class Pinned(NamedTuple):
    """Pages of a VMA that are to stay where they are."""

    vma: Vma
    pages: PageRange


class AddressSpace:
    """The mappings of one inode, and its pages in the page cache (struct address_space)."""

    __slots__ = ("i_mmap", "i_pages")

    def __init__(self) -> None:
        self.i_mmap: dict[int, Vma] = {}
        """Every VMA of the file, by its id, in the order in which they were made."""
        self.i_pages: dict[int, int] = {}
        """Page-cache pages: pgoff to frame of the DRAM region. Pages of holes; only the hole policy changes it."""

    def mapped(self, pages: PageRange, even_cows: bool = False) -> Iterator[tuple[Vma, PageRange]]:
        """Each VMA that may have a translation to any of `pages`, with the range from its first to its last one.

        even_cows: private copies count as well, and those may be anywhere in a private VMA.
        """
        for vma in self.i_mmap.values():
            if even_cows and vma.private:
                if (start := max(vma.pgoff, pages.start)) < (end := min(vma.end_pgoff, pages.end)):
                    yield vma, PageRange(start, end)
            elif span := vma.page_table.span(*pages):
                yield vma, span
