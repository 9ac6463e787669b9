"""The frames of a region: which are free, and which are in quarantine.

Files are laid out in contiguous extents, because each extent that a client maps is a VMA of its own in the client's
kernel, and the kernel has a limit on those (vm.max_map_count). So a page is placed where it continues the file: at the
frame that stands to the file's nearest block as the page stands to that block's page (the *goal*). Pages written in any
order come together into one extent that way, as long as nothing else takes the room between. The first block of a file
goes into the largest free extent; where other frames lie before that extent, in its middle, so that whatever lies there
can grow too.

A frame is in exactly one place (I8): free here, in one file, or in *quarantine*: given up by its file while an evicted
process, which is alive and has not acknowledged, might still reach it. It stays there until that process is gone.

What an evicted process can reach is what it had at its eviction, once: it gets no Map after that. So these frames are
noted then (`hold`), and whoever gives frames back need not know who had them mapped. A frame that was in a file at the
time comes here when the file gives it up, and no other frame ever does.
"""

import errno
from collections.abc import Iterable, Iterator

from dax_mp.errors import os_error
from dax_mp.ranges import Extent, RangeMap

_CANDIDATES_MAX = 64
"""Free extents that are looked at, past the goal, for one that is long enough."""


class FrameAllocator:
    """The free and the quarantined frames of one region.

    first_pfn, end_pfn: the frames [first_pfn, end_pfn) are there to give away; all are free at the start.
    """

    def __init__(self, first_pfn: int, end_pfn: int) -> None:
        self.first_pfn = first_pfn
        self.end_pfn = end_pfn
        self.free_pages = end_pfn - first_pfn
        self.free: RangeMap[None] = RangeMap()
        self.quarantine: RangeMap[None] = RangeMap()
        self.held: dict[bytes, RangeMap[None]] = {}
        """By the tokens of evicted sessions: the frames that their processes may reach, in files or in quarantine."""
        if self.free_pages:
            self.free.set(first_pfn, end_pfn, None)

    def allocate(self, length_pages: int, goal_pfn: int | None) -> list[Extent]:
        """`length_pages` frames in as few extents as there are, from `goal_pfn` on where that is free.

        Raises OSError ENOSPC, and takes nothing, when there are not as many.
        """
        if length_pages > self.free_pages:
            raise os_error(errno.ENOSPC)
        extents: list[Extent] = []
        while length_pages:
            extent = self.allocate_extent(length_pages, goal_pfn)
            extents.append(extent)
            length_pages -= extent.length_pages
            goal_pfn = extent.pfn + extent.length_pages
        return extents

    def allocate_extent(self, length_pages_max: int, goal_pfn: int | None) -> Extent:
        """One extent of up to `length_pages_max` frames. Raises OSError ENOSPC when no frame is free."""
        if not self.free_pages:
            raise os_error(errno.ENOSPC)
        if goal_pfn is None:
            pfn = self._largest(length_pages_max)
        else:
            # A sparse file may be larger than the device: its pages are laid out in turns around it.
            pfn = self.first_pfn + (goal_pfn - self.first_pfn) % (self.end_pfn - self.first_pfn)
        end = self.free.take(pfn, length_pages_max)
        if end is None:
            pfn = self._after(pfn, length_pages_max)
            end = self.free.take(pfn, length_pages_max)
            assert end is not None, f"frame {pfn} is not free"
        self.free_pages -= end - pfn
        return Extent(pfn, end - pfn)

    def _after(self, goal_pfn: int, length_pages: int) -> int:
        """Where to allocate when the goal is not free: the next free extent that is long enough, or just the next."""
        first = self.free.after(goal_pfn) or self.free.after(self.first_pfn - 1)
        assert first is not None, f"{self.free_pages} frames are free, and none is found"
        candidate: tuple[int, int, None] | None = first
        for _ in range(_CANDIDATES_MAX):
            if candidate is None:
                break
            if candidate[1] - candidate[0] >= length_pages:
                return candidate[0]
            candidate = self.free.after(candidate[0])
        return first[0]

    def _largest(self, length_pages: int) -> int:
        """Where to allocate for a file that has no block yet."""
        start, end, _ = max(self.free, key=lambda piece: piece[1] - piece[0])
        if start > self.first_pfn and end - start >= 2 * length_pages:
            start += (end - start) // 2
        return start

    def hold(self, token: bytes, extents: Iterable[Extent]) -> None:
        """The session `token` is evicted, and its process may reach these frames until `holder_gone`."""
        held = self.held.setdefault(token, RangeMap())
        for pfn, length_pages in sorted(extents):  # two VMAs may have one frame
            held.set(pfn, pfn + length_pages, None)

    def held_parts(self, pfn: int, length_pages: int) -> Iterator[tuple[int, int]]:
        """The parts [start, end) of these frames that some evicted process may reach; they may overlap."""
        for held in self.held.values():
            for start, end, _ in held.pieces(pfn, pfn + length_pages):
                yield start, end

    def release(self, extents: list[Extent]) -> None:
        """Give frames back: free at once, or in quarantine where an evicted process may reach them.

        Precondition: nobody else has, or is about to receive, a translation to them (I1).
        """
        free: list[tuple[int, int, None]] = []
        for pfn, length_pages in extents:
            where = f"frames {pfn}+{length_pages}"
            for places in (self.free, self.quarantine):
                assert not any(places.pieces(pfn, pfn + length_pages)), f"{where} freed twice"
            reached: RangeMap[None] = RangeMap()
            for start, end in self.held_parts(pfn, length_pages):
                reached.set(start, end, None)
            for start, end, _ in reached:
                self.quarantine.set(start, end, None)
            free += ((*gap, None) for gap in reached.gaps(pfn, pfn + length_pages))
        self.free_pages += sum(end - start for start, end, _ in free)
        self.free.insert(free)

    def holder_gone(self, token: bytes) -> None:
        """The session `token` can reach nothing any more: what was in quarantine for it alone is free."""
        for start, end, _ in self.held.pop(token, ()):
            given_up = self.quarantine.clear(start, end)
            self.release([Extent(low, high - low) for low, high, _ in given_up])

    @property
    def quarantined_pages(self) -> int:
        return self.quarantine.total()
