"""The three locks of an inode. Lock order, outermost first:

    inode.rwsem                 write, truncate, punch exclusive; read shared     (i_rwsem)
      -> inode.invalidate_lock  truncate, punch exclusive; a fault shared         (mapping->invalidate_lock)
        -> entry lock           one page: a fault, a write into a hole, reclaim   (DAX_LOCKED in fs/dax.c)

Several entry locks are waited for in ascending order only. Whoever already holds one out of that order (a fault that
allocates ahead, reclaim of another file's page) may only *try*. So no circle of waiters can form.

Every `acquire` returns None when the lock is taken, or a Completion to yield when it has to be waited for; it is held
once that is done. Waiters are served in the order in which they came, so that neither a stream of faults nor one of
truncates can starve the other.
"""

from collections import deque
from collections.abc import Iterable

from dax_mp.ranges import PageRange
from dax_mp.transaction import Completion, Scheduler


class SharedLock:
    """Held by one exclusively or by many shared."""

    __slots__ = ("_queue", "_scheduler", "exclusive", "shared")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._queue: deque[tuple[bool, Completion]] = deque()
        self.exclusive = False
        self.shared = 0

    def acquire_shared(self) -> Completion | None:
        if not self.exclusive and not self._queue:
            self.shared += 1
            return None
        return self._wait(exclusive=False)

    def acquire_exclusive(self) -> Completion | None:
        if not self.exclusive and not self.shared and not self._queue:
            self.exclusive = True
            return None
        return self._wait(exclusive=True)

    def _wait(self, exclusive: bool) -> Completion:
        granted = Completion(self._scheduler)
        self._queue.append((exclusive, granted))
        return granted

    def release_shared(self) -> None:
        assert self.shared > 0, "released a shared lock that nobody holds"
        self.shared -= 1
        if self._queue:
            self._grant()

    def release_exclusive(self) -> None:
        assert self.exclusive, "released an exclusive lock that nobody holds"
        self.exclusive = False
        self._grant()

    def _grant(self) -> None:
        while self._queue and not self.exclusive:
            exclusive, granted = self._queue[0]
            if exclusive and self.shared:
                return
            self._queue.popleft()
            if exclusive:
                self.exclusive = True
            else:
                self.shared += 1
            granted.complete()

    @property
    def idle(self) -> bool:
        return not self.exclusive and not self.shared and not self._queue


class EntryLocks:
    """The locks of one file's pages. A page that nobody holds takes no memory."""

    __slots__ = ("_held", "_scheduler")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._held: dict[int, deque[Completion] | None] = {}

    def __len__(self) -> int:
        """How many pages are locked."""
        return len(self._held)

    def held(self, pgoff: int) -> bool:
        return pgoff in self._held

    def first_held(self, start: int, end: int) -> int | None:
        """The first page of [start, end) that somebody holds."""
        return min((pgoff for pgoff in self._held if start <= pgoff < end), default=None)

    def take(self, pgoffs: range) -> None:
        """Hold all of these. Precondition: nobody holds any of them."""
        self._held.update(dict.fromkeys(pgoffs))

    def unlocked_around(self, mine: PageRange, within: PageRange) -> PageRange:
        """The part of `within` around `mine` that has no locked page, other than those of `mine`."""
        start, end = within
        for pgoff in self._held:
            if start <= pgoff < mine.start:
                start = pgoff + 1
            elif mine.end <= pgoff < end:
                end = pgoff
        return PageRange(start, end)

    def acquire(self, pgoff: int) -> Completion | None:
        if pgoff not in self._held:
            self._held[pgoff] = None
            return None
        granted = Completion(self._scheduler)
        queue = self._held[pgoff]
        if queue is None:
            queue = self._held[pgoff] = deque()
        queue.append(granted)
        return granted

    def try_acquire(self, pgoff: int) -> bool:
        if pgoff in self._held:
            return False
        self._held[pgoff] = None
        return True

    def release(self, pgoff: int) -> None:
        """Hand the lock to the first waiter, or drop it. The next holder must look everything up again."""
        if queue := self._held.pop(pgoff):
            self._held[pgoff] = queue
            queue.popleft().complete()

    def release_all(self, pgoffs: Iterable[int]) -> None:
        for pgoff in pgoffs:
            self.release(pgoff)
