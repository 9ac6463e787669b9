"""A file: its size, its block map with holes, its locks, and its address_space."""

from typing import TYPE_CHECKING, Final

from dax_mp.address_space import AddressSpace
from dax_mp.locks import EntryLocks, SharedLock
from dax_mp.ranges import BlockMap, PageRange
from dax_mp.transaction import Completion, Scheduler

if TYPE_CHECKING:
    from dax_mp.address_space import Pinned


_RELATIME_NS: Final = 24 * 3600 * 10**9
"""As of relatime in Linux."""


class Inode:
    """A file of the device.

    It lives while it has a name, or `users`: open handles, VMAs, and operations under way.

    size_bytes: changed under `rwsem` exclusive; when it shrinks, under `invalidate_lock` exclusive as well (I2).
    block_map, unwritten: see `blocks.py`; blocks come in under the page's entry lock, and go out, or to another page,
    under `invalidate_lock` exclusive.
    atime_ns, mtime_ns, ctime_ns: as of stat(2), by the clock of `FileSystem.now_ns`. A store through a mapping counts
    at its write fault, and at each msync while a page is mapped for stores: nobody hears of it else.
    pins: by id; they come and go under `rwsem` exclusive and at any time. unpinned: who waits for one to go.
    """

    __slots__ = (
        "atime_ns",
        "block_map",
        "ctime_ns",
        "entry_locks",
        "ephemeral",
        "ino",
        "invalidate_lock",
        "mapping",
        "mtime_ns",
        "name",
        "page_size",
        "pins",
        "rwsem",
        "size_bytes",
        "unpinned",
        "unwritten",
        "users",
        "xattrs",
    )

    def __init__(self, ino: int, name: str | None, page_size: int, scheduler: Scheduler, now_ns: int) -> None:
        self.ino = ino
        self.name = name
        """None before it has been linked, and once it is unlinked."""
        self.page_size = page_size
        self.size_bytes = 0
        self.users = 0
        self.ephemeral = False
        """It loses its name when its last user goes."""
        self.xattrs: dict[str, bytes] = {}
        self.block_map = BlockMap()
        self.unwritten = BlockMap()
        self.pins: dict[int, Pinned] = {}
        self.unpinned: list[Completion] = []
        self.mapping = AddressSpace()
        self.atime_ns = self.mtime_ns = self.ctime_ns = now_ns
        self.rwsem = SharedLock(scheduler)
        self.invalidate_lock = SharedLock(scheduler)
        self.entry_locks = EntryLocks(scheduler)

    def accessed(self, now_ns: int) -> None:
        """It has been read, or mapped. As with relatime, atime follows when it is not younger than a change, or old."""
        if self.atime_ns <= max(self.mtime_ns, self.ctime_ns) or now_ns - self.atime_ns >= _RELATIME_NS:
            self.atime_ns = now_ns

    def modified(self, now_ns: int) -> None:
        """Its contents have been changed, or its size."""
        self.mtime_ns = self.ctime_ns = now_ns

    @property
    def size_pages(self) -> int:
        """The first page that lies wholly past the end: one that begins below i_size may be mapped to its last byte."""
        return -(-self.size_bytes // self.page_size)

    def pages_of(self, offset_bytes: int, end_bytes: int) -> PageRange:
        """The pages that have a byte of [offset, end)."""
        return PageRange(offset_bytes // self.page_size, -(-end_bytes // self.page_size))

    def goal_pfn(self, pgoff: int) -> int | None:
        """The frame that continues the file at `pgoff`: as far from the nearest block's as the pages are apart.

        It may lie outside the device. None where the file has no block.
        """
        nearest = self.block_map.before(pgoff)
        if self.unwritten:
            unwritten = self.unwritten.before(pgoff)
            nearest = max(filter(None, (nearest, unwritten)), default=None)
        nearest = nearest or self.block_map.after(pgoff) or self.unwritten.after(pgoff)
        if nearest is None:
            return None
        start, _, pfn = nearest
        return pfn + pgoff - start
