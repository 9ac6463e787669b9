"""unmap_mapping_range(): have every process drop its translations to some pages of a file, and wait until all have.

The kernel walks i_mmap, clears page-table entries and flushes TLBs. Here the walk is the same, and the flush a message:
each process that may have one of the pages mapped gets one Unmap on its pager channel and acknowledges it. That channel
is ordered, so a Map sent before the Unmap has been carried out before it, and one decided after it comes after it.

Cost of one call: a message and an acknowledgement for each *process* that has some of the pages mapped, and in it one
range, one system call there, for each such VMA, however many pages the range has.

The record of a VMA is cleared when the acknowledgement comes, for the range that was sent. So nothing new may come into
that range meanwhile, which is what the precondition on the locks is for: a page between two holes is not locked, and
must not be in the range either.

A hole page that a process has pinned in a mapping for loads (`pins.py`) is not unmapped but *replaced*: the process
gets a Map of what is there now, and the Unmap behind it, which has no range for that page, and whose acknowledgement
says that the Map has been carried out. It is mapped over the hole page in one step, so a system call always finds one.

A process that does not acknowledge by the deadline is evicted: the operation goes on without it. What the process could
still reach goes to quarantine when it is freed, and not to someone else (I1, I8; `frames.py`).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dax_mp.address_space import ZERO_PTE, Cut, Vma, pack_pte, pte_fields
from dax_mp.effects import Effect, SendPager
from dax_mp.inode import Inode
from dax_mp.limits import SEGMENTS_MAX
from dax_mp.messages import Map, Target, Unmap
from dax_mp.ranges import PageRange, RangeMap
from dax_mp.timers import Timers
from dax_mp.transaction import Completion, Scheduler, Steps

if TYPE_CHECKING:
    from dax_mp.session import Session


class _Broadcast:
    """The requests of one call that are not answered yet."""

    __slots__ = ("all_answered", "pending")

    def __init__(self, scheduler: Scheduler) -> None:
        self.pending = 0
        self.all_answered = Completion(scheduler)


class UnmapRequest:
    """One Unmap that is on its way to one process.

    replaced: what pinned hole pages have been mapped to, and may still be: (packed Pte, pages) each.
    """

    __slots__ = ("broadcast", "ranges", "replaced", "request_id", "sent_s", "session")

    def __init__(
        self,
        request_id: int,
        session: "Session",
        ranges: list[tuple[Vma, PageRange]],
        replaced: list[tuple[int, int]],
        broadcast: _Broadcast,
        sent_s: float,
    ) -> None:
        self.request_id = request_id
        self.session = session
        self.ranges = ranges
        self.replaced = replaced
        self.broadcast = broadcast
        self.sent_s = sent_s


class Unmapper:
    """Sends Unmaps and keeps account of who has not acknowledged.

    effects: where messages go. timers: deadlines count from its time.
    """

    def __init__(self, scheduler: Scheduler, timers: Timers, effects: list[Effect], counters: dict[str, int]) -> None:
        self._scheduler = scheduler
        self._timers = timers
        self._effects = effects
        self._counters = counters
        self._next_id = 1
        self.outstanding: dict[int, UnmapRequest] = {}
        """By id, oldest first."""

    def unmap_mapping_range(self, inode: Inode, page_ranges: list[PageRange], even_cows: bool = False) -> Steps[None]:
        """Unmap the pages in every VMA, and wait.

        page_ranges: usually one; several, for a write over several holes, go out as one broadcast.
        even_cows: drop private copies too, which a truncate does, and nothing else (unmap_mapping_range() in Linux).
        Precondition: no new translation to these pages can come up (invalidate_lock or their entry locks are held).
        Postcondition: no process has a translation to them, but for those of evicted sessions.
        """
        mapped = [mapper for pages in page_ranges for mapper in inode.mapping.mapped(pages, even_cows)]
        if mapped:
            yield from self._unmap(mapped, even_cows)

    def unmap_vma(self, vma: Vma, pages: PageRange) -> Steps[None]:
        """Unmap pages, and drop copies, in one VMA, and wait. Precondition: no fault on them is answered by a Map."""
        yield from self._unmap([(vma, pages)], even_cows=True)

    def _unmap(self, mapped: list[tuple[Vma, PageRange]], even_cows: bool) -> Steps[None]:
        broadcast = _Broadcast(self._scheduler)
        ranges_of: dict[Session, list[tuple[Vma, PageRange]]] = {}
        replaced_of: dict[Session, list[tuple[int, int]]] = {}
        for vma, span in mapped:
            if not vma.session.evicted:
                replaced, unmapped = self._replace_pinned(vma, span)
                ranges_of.setdefault(vma.session, []).extend((vma, pages) for pages in unmapped)
                replaced_of.setdefault(vma.session, []).extend(replaced)
        for session, ranges in ranges_of.items():
            for first in range(0, max(len(ranges), 1), SEGMENTS_MAX):
                part = ranges[first : first + SEGMENTS_MAX]
                request = UnmapRequest(
                    self._next_id, session, part, replaced_of[session], broadcast, self._timers.now_s
                )
                self._send(request, even_cows)
        if broadcast.pending:
            yield broadcast.all_answered

    def _replace_pinned(self, vma: Vma, span: PageRange) -> tuple[list[tuple[int, int]], list[PageRange]]:
        """Have the hole pages that are pinned replaced by what is there now.

        Returns what they were mapped to, (packed Pte, pages) each, and the pages that are to be unmapped.

        Precondition: who would take the blocks of pinned pages has waited for the pins, so hole pages alone are left.
        """
        pinned: RangeMap[None] = RangeMap()
        for pin in vma.inode.pins.values():
            if pin.vma is vma and pin.pages.overlaps(span):
                pinned.set(max(pin.pages.start, span.start), min(pin.pages.end, span.end), None)
        if not pinned:
            return [], [span]
        replaced: list[tuple[int, int]] = []
        segments: list[int] = []
        for start, end, _ in pinned:
            for low, high, before in list(vma.page_table.pieces(start, end)):  # the rest is not mapped, and may stay so
                replaced.append((before, high - low))
                for first, last, entry in _now_there(vma, PageRange(low, high)):
                    vma.page_table.set(first, last, entry)  # I7: in the rmap before it is on its way
                    segments += (first, last - first, *pte_fields(entry))
        for at in range(0, len(segments), 5 * SEGMENTS_MAX):
            order = Map(0, vma.vma_id, segments[at : at + 5 * SEGMENTS_MAX])
            self._effects.append(SendPager(vma.session.token, order))
        return replaced, list(pinned.gaps(*span))

    def _send(self, request: UnmapRequest, even_cows: bool) -> None:
        self._next_id += 1
        request.broadcast.pending += 1
        self.outstanding[request.request_id] = request
        request.session.unacknowledged[request.request_id] = request
        for vma, span in request.ranges if even_cows else ():
            if vma.private:
                vma.cut(Cut(request.request_id, span, request.sent_s))
        flat = [number for vma, span in request.ranges for number in (vma.vma_id, span.start, span.length_pages)]
        self._effects.append(SendPager(request.session.token, Unmap(request.request_id, int(even_cows), flat)))
        self._counters["unmaps"] += 1

    def acknowledged(self, session: "Session", request_id: int) -> bool:
        """`session` has dropped what that request named. False when it has no such request."""
        request = session.unacknowledged.get(request_id)
        if request is None:
            return False
        for vma, span in request.ranges:
            vma.page_table.clear(*span)
        self._settle(request)
        return True

    def session_over(self, session: "Session") -> None:
        """It is gone or evicted: whatever waited for it goes on."""
        for request in list(session.unacknowledged.values()):
            self._settle(request)

    def _settle(self, request: UnmapRequest) -> None:
        del self.outstanding[request.request_id], request.session.unacknowledged[request.request_id]
        request.broadcast.pending -= 1
        if not request.broadcast.pending:
            request.broadcast.all_answered.complete()

    def overdue(self, timeout_s: float) -> list["Session"]:
        """The sessions that have left a request unanswered for `timeout_s`."""
        late: dict[Session, None] = {}
        for request in self.outstanding.values():
            if request.sent_s + timeout_s > self._timers.now_s:
                break
            late[request.session] = None
        return list(late)

    def oldest_sent_s(self) -> float | None:
        """When the oldest unanswered request was sent; None where none is unanswered."""
        for request in self.outstanding.values():
            return request.sent_s
        return None


def _now_there(vma: Vma, pages: PageRange) -> Iterator[tuple[int, int, int]]:
    """What to map at these pages, whatever was there: (start, end, packed Pte) each. Holes need no frame."""
    position = pages.start
    for start, end, pfn in vma.inode.block_map.pieces(*pages):
        if position < start:
            yield position, start, ZERO_PTE
        yield start, end, pack_pte(Target.PMEM, pfn, vma.access)
        position = end
    if position < pages.end:
        yield position, pages.end, ZERO_PTE
