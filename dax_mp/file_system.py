"""What every operation works on: the device, the names, the inodes, and the way to the clients."""

import errno
from bisect import bisect_right

from dax_mp.delays import Delays
from dax_mp.device import Device
from dax_mp.effects import Effect, SendPager
from dax_mp.errors import os_error
from dax_mp.inode import Inode
from dax_mp.messages import PagerOrder
from dax_mp.ranges import Extent, PageRange
from dax_mp.session import Lease, Session
from dax_mp.timers import Timers
from dax_mp.transaction import Scheduler
from dax_mp.unmap import Unmapper

COUNTERS = (
    "faults",
    "read_holes",
    "read_blocks",
    "write_holes",
    "write_blocks",
    "bus_errors",
    "unmaps",
    "evictions",
    "reclaims",
    "protocol_errors",
)
"""What Statfs counts since the start."""


class FileSystem:
    """The files of a device. Only the operations change it, each under the locks that dax_mp/locks.py names."""

    def __init__(self, device: Device, ack_timeout_s: float) -> None:
        self.device = device
        self.ack_timeout_s = ack_timeout_s
        """How long a process may keep others waiting."""
        self.now_ns = 0
        """Of the wall clock, for the times of files. The daemon sets it before each turn."""
        self.scheduler = Scheduler()
        self.timers = Timers(self.scheduler)
        self.delays = Delays(self.scheduler, self.timers)
        self.effects: list[Effect] = []
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.unmapper = Unmapper(self.scheduler, self.timers, self.effects, self.counters)
        self.names: dict[str, Inode] = {}
        self.inodes: dict[int, Inode] = {}
        """Every file by its number, those without a name too."""
        self.leases: dict[int, Lease] = {}
        """What is lent, by id, the longest first."""
        self._next_ino = 1
        self._next_id = 1

    def create(self, name: str | None) -> Inode:
        """A new, empty file; None: without a name. Raises OSError EINVAL for a name that is none."""
        if name is not None:
            self._check_name(name)
        ino, page_size = self._next_ino, self.device.page_size
        inode = self.inodes[ino] = Inode(ino, name, page_size, self.scheduler, self.now_ns)
        self._next_ino += 1
        if name is not None:
            self.names[name] = inode
        return inode

    def lookup(self, name: str) -> Inode:
        """The file of that name. Raises FileNotFoundError."""
        inode = self.names.get(name)
        if inode is None:
            raise os_error(errno.ENOENT, filename=name)
        return inode

    def list_after(self, after: str, count: int) -> list[Inode]:
        """Up to `count` files whose names come after `after`, by name."""
        names = sorted(self.names)
        first = bisect_right(names, after)
        return [self.names[name] for name in names[first : first + count]]

    def unlink(self, name: str) -> None:
        """Take the name away. The file goes with its last user. Raises FileNotFoundError."""
        inode = self.lookup(name)
        del self.names[name]
        inode.name = None
        inode.ctime_ns = self.now_ns
        self._free_if_unused(inode)

    def rename(self, old: str, new: str, replace: bool) -> None:
        """Give a file another name; what had it is unlinked, or, without `replace`, in the way.

        Raises FileNotFoundError, FileExistsError, OSError EINVAL.
        """
        inode = self.lookup(old)
        self._check_new_name(new, replace)
        if old == new:
            return
        del self.names[old]
        self._set_name(inode, new)

    def link(self, inode: Inode, name: str, replace: bool) -> None:
        """Give a file without a name one; what had it as by `rename`.

        Raises FileExistsError, OSError EINVAL, EMLINK where the file has a name.
        """
        if inode.name is not None:
            raise os_error(errno.EMLINK, f"the file has a name already, {inode.name!r}", name)
        self._check_new_name(name, replace)
        self._set_name(inode, name)

    def _set_name(self, inode: Inode, name: str) -> None:
        if name in self.names:
            self.unlink(name)
        self.names[name] = inode
        inode.name = name
        inode.ctime_ns = self.now_ns

    def _check_new_name(self, name: str, replace: bool) -> None:
        self._check_name(name)
        if name in self.names and not replace:
            raise os_error(errno.EEXIST, filename=name)

    @staticmethod
    def _check_name(name: str) -> None:
        if "/" in name or "\0" in name or name in (".", ".."):
            raise os_error(errno.EINVAL, f"{name!r} is no file name: it may have no '/' and no NUL", name)

    def get(self, inode: Inode) -> Inode:
        """One user more."""
        inode.users += 1
        return inode

    def put(self, inode: Inode) -> None:
        """One user less; the last one of a file without a name frees it."""
        assert inode.users > 0, f"inode {inode.ino} has no user to put"
        inode.users -= 1
        if not inode.users:
            self._free_if_unused(inode)

    def _free_if_unused(self, inode: Inode) -> None:
        if inode.users:
            return
        if inode.name is not None:
            if not inode.ephemeral:
                return
            del self.names[inode.name]
            inode.name = None
        assert not inode.mapping.i_mmap, f"inode {inode.ino} without users is mapped"
        self.cut(inode, PageRange(0, 1 << 63))
        del self.inodes[inode.ino]

    def cut(self, inode: Inode, pages: PageRange) -> None:
        """Take these pages' blocks and page-cache pages from the file and free them.

        Precondition: nobody can get a translation to them, and nobody has one but processes of evicted sessions (I1).
        """
        self.device.holes.discard(inode, pages)
        removed = inode.block_map.clear(*pages)
        if inode.unwritten:
            removed += inode.unwritten.clear(*pages)
        if removed:
            self.device.release([Extent(pfn, end - start) for start, end, pfn in removed])

    def next_id(self) -> int:
        """An id that no VMA, pin or lease has had."""
        self._next_id += 1
        return self._next_id - 1

    def send_pager(self, session: Session, order: PagerOrder) -> None:
        self.effects.append(SendPager(session.token, order))
