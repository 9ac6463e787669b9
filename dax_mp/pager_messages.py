"""The messages of the pager channel: native on the client's side (`dax_mp/mmu/wire.c`).

Its ZeroMQ identity is the session's token. Everything about translations goes this way and in order: an Unmap can never
overtake, or be overtaken by, a Map. All fields are unsigned integers.
"""

from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from dax_mp import schema
from dax_mp.limits import SEGMENTS_MAX

PROTOCOL_VERSION: Final = 2
TOKEN_BYTES: Final = 16
"""A session's token: random, the name of its file in the runtime directory (in hex), and its pager's identity."""


class Access(IntFlag):
    """What a VMA or a fault may do, as PROT_READ and PROT_WRITE."""

    READ = 1
    WRITE = 2


class Target(IntEnum):
    """What a segment of a Map is backed by."""

    PMEM = 0
    """Frames of the PMem region."""
    DRAM = 1
    """Frames of the DRAM region: page-cache pages."""
    ZERO = 2
    """The kernel's zero page: private anonymous memory that is never written."""


# --- client to coordinator ----------------------------------------------------------------------------------


@schema.register(1, schema.U32)
class PagerHello(NamedTuple):
    """The first message of a pager: its session's file is locked, and Hello has been answered."""

    version: int


@schema.register(2, schema.UINT, schema.UINT, schema.UINT, 1)
class Fault(NamedTuple):
    """A thread sleeps in the fault handler until this is answered by a Map or a FaultError with its id."""

    fault_id: int
    vma_id: int
    pgoff: int
    write: int


@schema.register(3, schema.UINT)
class UnmapAck(NamedTuple):
    """The process has no translation left to any range of that Unmap."""

    request_id: int


@schema.register(4)
class Dropped(NamedTuple):
    """The answer to Evict: the process has no translation at all, and will ask for none."""


# --- coordinator to client ----------------------------------------------------------------------------------


@schema.register(16, schema.U32)
class PagerReady(NamedTuple):
    version: int


@schema.register(17, schema.UINT, schema.UINT, schema.tuples(5, SEGMENTS_MAX))
class Map(NamedTuple):
    """Map each segment, then let the thread go on.

    `segments`: five integers each, (pgoff, length_pages, Target, pfn, Access). pfn counts frames of the target region,
    and is 0 for ZERO.
    """

    fault_id: int
    vma_id: int
    segments: list[int]


@schema.register(18, schema.UINT, schema.UINT, schema.UINT, schema.UINT, schema.U32)
class FaultError(NamedTuple):
    """There is nothing to map: a BusError with this errno for the pages from pgoff on."""

    fault_id: int
    vma_id: int
    pgoff: int
    length_pages: int
    errno: int


@schema.register(19, schema.UINT, 1, schema.tuples(3, SEGMENTS_MAX))
class Unmap(NamedTuple):
    """Drop every translation of these ranges, then acknowledge. `ranges`: (vma_id, pgoff, length_pages) each.

    even_cows: drop the private copies of a private VMA too (unmap_mapping_range() in mm/memory.c).
    """

    request_id: int
    even_cows: int
    ranges: list[int]


@schema.register(20, schema.U32)
class Evict(NamedTuple):
    """The session is over, for this reason (errno): drop everything and answer Dropped."""

    errno: int


PagerRequest = PagerHello | Fault | UnmapAck | Dropped
PagerOrder = PagerReady | Map | FaultError | Unmap | Evict
