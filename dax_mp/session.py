"""A session: one client process, and everything it has.

Its handles, VMAs, faults and unmap requests are tied to it and go with it.

    OPENED --PagerHello--> SERVING --evicted--> EVICTED --Dropped--> DROPPED
       any of them --the process is gone, or Bye--> GONE

- OPENED: it has said Hello on a control socket. It can do everything but map.
- SERVING: its pager takes orders.
- EVICTED: it did not acknowledge in time, or broke the protocol. Nothing waits for it any more, and nothing is done for
  it. It may still hold translations: the rmap keeps what they were at its eviction, and the frames that they lead to go
  to quarantine when they are freed.
- DROPPED: an evicted one that has said that it holds no translation.
- GONE: no process any more, and out of the coordinator's books; operations that it began may still be under way.
"""

from collections.abc import Iterator
from enum import Enum, auto

from dax_mp.address_space import Pinned, Vma, pte_fields
from dax_mp.control_messages import ControlRequest
from dax_mp.inode import Inode
from dax_mp.messages import Target
from dax_mp.ranges import Extent
from dax_mp.unmap import UnmapRequest


class SessionState(Enum):
    OPENED = auto()
    SERVING = auto()
    EVICTED = auto()
    DROPPED = auto()
    GONE = auto()


class Lease:
    """Blocks of a file that are lent to the session (`direct_io.py`). locked: None where they are to be loaded from.

    since_s: when. locked: the pages whose entry locks are held. fresh: the unwritten blocks made for this.
    """

    __slots__ = ("end_bytes", "fresh", "inode", "locked", "session", "since_s", "start_bytes", "write")

    def __init__(
        self,
        session: "Session",
        inode: Inode,
        start_bytes: int,
        end_bytes: int,
        since_s: float,
        locked: list[int] | None = None,
        fresh: list[tuple[int, int, int]] | None = None,
    ) -> None:
        self.session = session
        self.inode = inode
        self.start_bytes = start_bytes
        self.end_bytes = end_bytes
        self.since_s = since_s
        self.write = locked is not None
        self.locked = locked or []
        self.fresh = fresh or []

    @property
    def changes_file(self) -> bool:
        """Does its end make more of the file than it was: blocks in holes, or size?"""
        return self.write and (bool(self.locked) or self.end_bytes > self.inode.size_bytes)


class Acquisition:
    """A request that acquires something, until its control socket sends the next one (`acquisitions.py`)."""

    __slots__ = ("cancelled", "release", "request_id")

    def __init__(self, request_id: int) -> None:
        self.request_id = request_id
        self.cancelled = False
        self.release: ControlRequest | None = None
        """What releases it, once it is there."""


class Session:
    """One client process. token: TOKEN_BYTES long, its name everywhere. pid: as the kernel gives it."""

    __slots__ = (
        "acquisitions",
        "evict_errno",
        "faults",
        "handles",
        "leases",
        "next_handle",
        "pid",
        "pins",
        "state",
        "token",
        "unacknowledged",
        "vmas",
    )

    def __init__(self, token: bytes, pid: int) -> None:
        self.token = token
        self.pid = pid
        self.state = SessionState.OPENED
        self.evict_errno = 0
        self.handles: dict[int, Inode] = {}
        self.next_handle = 1
        self.vmas: dict[int, Vma] = {}
        self.pins: dict[int, Pinned] = {}
        self.leases: dict[int, Lease] = {}
        self.acquisitions: dict[bytes, Acquisition] = {}
        """The last request of each control socket that acquires something."""
        self.unacknowledged: dict[int, UnmapRequest] = {}
        self.faults = 0
        """How many of its faults are under way."""

    @property
    def serving(self) -> bool:
        """Does its pager take orders?"""
        return self.state is SessionState.SERVING

    @property
    def ended(self) -> bool:
        """Is it evicted or gone? Then nothing new may be tied to it."""
        return self.evicted or self.state is SessionState.GONE

    @property
    def evicted(self) -> bool:
        return self.state in (SessionState.EVICTED, SessionState.DROPPED)

    def reach(self, target: Target) -> Iterator[Extent]:
        """The frames of that region that its process may reach now: by what it has mapped, or was lent."""
        mapped = [(entry, end - start) for vma in self.vmas.values() for start, end, entry in vma.page_table]
        mapped += (was for request in self.unacknowledged.values() for was in request.replaced)
        for entry, length_pages in mapped:
            kind, pfn, _ = pte_fields(entry)
            if kind == target:
                yield Extent(pfn, length_pages)
        if target is Target.PMEM:
            for lease in self.leases.values():
                pages = lease.inode.pages_of(lease.start_bytes, lease.end_bytes)
                for block_map in (lease.inode.block_map, lease.inode.unwritten):
                    yield from (Extent(pfn, end - start) for start, end, pfn in block_map.pieces(*pages))
