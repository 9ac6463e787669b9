"""A file: its size, its block map with holes, its locks, and its address_space."""

from dax_mp.address_space import AddressSpace
from dax_mp.locks import EntryLocks, SharedLock
from dax_mp.ranges import BlockMap, PageRange
from dax_mp.transaction import Scheduler


class Inode:
    """A file of the device.

    It lives while it has a name, or `users`: open handles, VMAs, and operations under way.

    size_bytes: changed under `rwsem` exclusive; when it shrinks, under `invalidate_lock` exclusive as well (I2).
    block_map: blocks come in under the page's entry lock, and go out under `invalidate_lock` exclusive.
    """

    __slots__ = (
        "block_map",
        "entry_locks",
        "ino",
        "invalidate_lock",
        "mapping",
        "name",
        "page_size",
        "rwsem",
        "size_bytes",
        "users",
    )

    def __init__(self, ino: int, name: str, page_size: int, scheduler: Scheduler) -> None:
        self.ino = ino
        self.name: str | None = name
        """None once it is unlinked."""
        self.page_size = page_size
        self.size_bytes = 0
        self.users = 0
        self.block_map = BlockMap()
        self.mapping = AddressSpace()
        self.rwsem = SharedLock(scheduler)
        self.invalidate_lock = SharedLock(scheduler)
        self.entry_locks = EntryLocks(scheduler)

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
        nearest = self.block_map.before(pgoff) or self.block_map.after(pgoff)
        if nearest is None:
            return None
        start, _, pfn = nearest
        return pfn + pgoff - start
