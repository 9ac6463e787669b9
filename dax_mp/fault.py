"""A page fault, as dax_iomap_pte_fault() and dax_load_hole() serve it (fs/dax.c).

In order: take invalidate_lock shared, so that no truncate or punch is under way; compare with i_size (I2); take the
page's entry lock, *before* the block is looked up (I3; Linux had the other order for a while, and stale zeroes); look;
for a write to a hole, allocate a zeroed block and have everyone drop the hole page (I4); answer with a Map; release.

Two windows, as gVisor has. *Allocate little*: one page for a lone write, doubling up to 2 MiB while a VMA is written in
sequence, never past the end of the file, and never much of what is free. *Map much*: what is there already in the
aligned 2 MiB around the fault goes into the same Map, so that a file that is all there takes one fault for 2 MiB.

There is no separate dax_pfn_mkwrite: a write to a page that is mapped read-only is a write fault like any other. A
block is mapped with all that its VMA may do, so only hole pages are mapped read-only in a VMA that may write.
"""

import errno
from collections.abc import Iterable, Iterator

from dax_mp import blocks
from dax_mp.address_space import ZERO_PTE, PageTable, Vma, pack_pte, pte_fields
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import MAP_WINDOW_BYTES, SEGMENTS_MAX
from dax_mp.messages import Access, Fault, FaultError, Map, Target
from dax_mp.ranges import PageRange
from dax_mp.transaction import Steps

Segment = tuple[int, int, int]
"""(start, end, entry): pages [start, end) of the file, and the packed Pte of the first one."""

_PMEM = int(Target.PMEM)
_WRITE = int(Access.WRITE)
_FREE_FRACTION = 64
"""Allocation runs ahead by at most this fraction of the blocks that are free."""


def handle_fault(fs: FileSystem, vma: Vma, fault: Fault) -> Steps[None]:
    """Serve one fault: it ends with a Map or a FaultError to the session, if that still takes orders."""
    inode, pgoff = fs.get(vma.inode), fault.pgoff
    vma.session.faults += 1
    fs.counters["faults"] += 1
    if granted := inode.invalidate_lock.acquire_shared():
        yield granted
    try:
        # I2: i_size cannot shrink while invalidate_lock is held, so this is a reliable test.
        if pgoff >= inode.size_pages or not vma.has(pgoff):
            raise os_error(errno.EFAULT)
        if granted := inode.entry_locks.acquire(pgoff):
            yield granted
        try:
            if fault.write:
                inode.modified(fs.now_ns)
            if delay := fs.delays.at("fault.entry_locked"):
                yield delay
            if inode.block_map.get(pgoff) is not None:
                fs.counters["write_blocks" if fault.write else "read_blocks"] += 1
                _answer(fs, vma, fault, _nearest(list(_around(fs, vma, fault)), pgoff))
            elif fault.write:
                yield from _write_hole(fs, vma, fault)
            else:
                cached = yield from _load_hole(fs, inode, pgoff)
                around = _nearest(list(_around(fs, vma, fault)), pgoff) if cached else [(pgoff, pgoff + 1, ZERO_PTE)]
                _answer(fs, vma, fault, around)
        finally:
            inode.entry_locks.release(pgoff)
    except OSError as error:
        _answer_error(fs, vma, fault, error)
    finally:
        vma.session.faults -= 1
        inode.invalidate_lock.release_shared()
        fs.put(inode)


def _load_hole(fs: FileSystem, inode: Inode, pgoff: int) -> Steps[bool]:
    """Have what the hole policy maps at this page of a hole; the page cache may have to give up another page for it.

    False: there is no frame for it. Others may hold the locks of all cached pages for long, as a write of another file
    does, and to wait for one with this page's lock held would be against the order of locks. So the fault is answered
    by the zero page, which needs no frame, and is dropped like any other hole page.
    """
    fs.counters["read_holes"] += 1
    holes = fs.device.holes
    try:
        while not holes.prepare(inode, pgoff):
            victim = holes.victim()
            if victim is None:
                return False
            yield from reclaim(fs, *victim)
    except OSError:  # a sparse region's backing is full
        return False
    return True


def reclaim(fs: FileSystem, inode: Inode, pgoff: int) -> Steps[None]:
    """Take a page out of the page cache. Precondition: its entry lock is free; it is tried, never waited for."""
    fs.counters["reclaims"] += 1
    fs.get(inode)
    locked = inode.entry_locks.try_acquire(pgoff)
    assert locked, f"victim page {pgoff} of inode {inode.ino} is locked"
    try:
        page = PageRange(pgoff, pgoff + 1)
        yield from fs.unmapper.unmap_mapping_range(inode, [page])
        # Nobody maps the page, and nobody can until the entry lock is released: the frame can go.
        fs.device.holes.discard(inode, page)
    finally:
        inode.entry_locks.release(pgoff)
        fs.put(inode)


def _write_hole(fs: FileSystem, vma: Vma, fault: Fault) -> Steps[None]:
    """Fill the hole at the fault with a zeroed block, once every VMA has dropped the hole page (I4).

    The faulting VMA too: when the entry lock is released others may store to the block, and another thread here, which
    has not seen the Map yet, would go on reading the hole page.
    """
    fs.counters["write_holes"] += 1
    inode = vma.inode
    mine, pfn = _allocate(fs, vma, fault.pgoff)
    segment = (mine.start, mine.end, pack_pte(_PMEM, pfn, int(vma.access)))
    if not fs.delays and not any(inode.mapping.mapped(mine)):  # nothing to wait for, so nobody could see what is locked
        fs.device.holes.discard(inode, mine)
        _answer(fs, vma, fault, [segment])
        return
    ahead = range(fault.pgoff + 1, mine.end)
    inode.entry_locks.take(ahead)
    try:
        if delay := fs.delays.at("fault.block_allocated"):
            yield delay
        yield from fs.unmapper.unmap_mapping_range(inode, [mine])
        if delay := fs.delays.at("fault.before_map"):
            yield delay
        # All have dropped the hole page: only now may the block be written.
        fs.device.holes.discard(inode, mine)
        _answer(fs, vma, fault, [segment])
    finally:
        inode.entry_locks.release_all(ahead)


def _allocate(fs: FileSystem, vma: Vma, pgoff: int) -> tuple[PageRange, int]:
    """Give the file zeroed blocks at `pgoff`, and after it as far as the allocation window goes.

    Returns the pages, which are one extent and not locked, and its first frame. Raises OSError ENOSPC.
    """
    inode = vma.inode
    mine, pfn = blocks.fill_extent(fs, inode, PageRange(pgoff, _allocation_end(fs, vma, pgoff)))
    vma.sequence_pgoff, vma.sequence_pages = mine.end, mine.length_pages
    return mine, pfn


def _allocation_end(fs: FileSystem, vma: Vma, pgoff: int) -> int:
    """Where the allocation window of a write fault at `pgoff` ends: before the next block, locked page, or the end."""
    if pgoff != vma.sequence_pgoff:
        return pgoff + 1
    inode = vma.inode
    pages_max = min(MAP_WINDOW_BYTES // inode.page_size, fs.device.frames.free_pages // _FREE_FRACTION)
    end = min(pgoff + max(min(2 * vma.sequence_pages, pages_max), 1), vma.end_pgoff, inode.size_pages)
    hole = next(inode.block_map.gaps(pgoff, end))
    mine = PageRange(pgoff, pgoff + 1)
    return inode.entry_locks.unlocked_around(mine, vma.kept(PageRange(pgoff, hole.end))).end


def _answer(fs: FileSystem, vma: Vma, fault: Fault, segments: list[Segment]) -> None:
    """Send the Map for the fault."""
    if not _wants_answer(vma):
        return
    flat: list[int] = []
    for start, end, entry in segments:
        vma.page_table.set(start, end, entry)  # I7: in the rmap before it is on its way
        flat += (start, end - start, *pte_fields(entry))
    fs.send_pager(vma.session, Map(fault.fault_id, vma.vma_id, flat))


def _wants_answer(vma: Vma) -> bool:
    """Is the VMA still mapped, by a session that takes orders? It may have gone while the fault waited."""
    return vma.session.serving and vma.vma_id in vma.inode.mapping.i_mmap


def _around(fs: FileSystem, vma: Vma, fault: Fault) -> Iterator[Segment]:
    """What to map for a fault on a page that is there: that and its neighbours, as far as they are not mapped yet.

    Pages that another operation has locked are left alone. Precondition: the page's entry lock is held.
    """
    inode, pgoff = vma.inode, fault.pgoff
    window_pages = MAP_WINDOW_BYTES // inode.page_size
    window_start = pgoff - pgoff % window_pages
    window = PageRange(max(window_start, vma.pgoff), min(window_start + window_pages, vma.end_pgoff, inode.size_pages))
    window = inode.entry_locks.unlocked_around(PageRange(pgoff, pgoff + 1), window)
    if vma.removed:
        window = _with_page(vma.removed.gaps(*window), pgoff)
    recorded = vma.page_table.get(pgoff)
    # A fault on a page that is in the rmap as mapped: the client has dropped it by itself, and maybe more around it.
    client_dropped = recorded is not None and recorded & _WRITE >= fault.write * _WRITE
    for start, end, entry in _present(fs, vma, window, fault.write):
        if client_dropped:
            yield start, end, entry
        else:
            yield from _not_mapped(vma.page_table, start, end, entry)


def _with_page(ranges: Iterable[PageRange], pgoff: int) -> PageRange:
    return next(pages for pages in ranges if pages.start <= pgoff < pages.end)


def _present(fs: FileSystem, vma: Vma, window: PageRange, write: int) -> Iterator[Segment]:
    """What is there in the window: blocks, and for a read also what the hole policy has."""
    inode, position, access = vma.inode, window.start, int(vma.access)
    for start, end, pfn in inode.block_map.pieces(*window):
        if position < start and not write:
            yield from fs.device.holes.mapped_pieces(inode, PageRange(position, start))
        yield start, end, pack_pte(_PMEM, pfn, access)
        position = end
    if position < window.end and not write:
        yield from fs.device.holes.mapped_pieces(inode, PageRange(position, window.end))


def _not_mapped(page_table: PageTable, start: int, end: int, entry: int) -> Iterator[Segment]:
    """The parts of [start, end) that are not mapped to this yet: to map the others again would cost them their PTEs."""
    position = start
    for low, high, value in page_table.pieces(start, end):
        if value == PageTable.advance(entry, low - start):
            if position < low:
                yield position, low, PageTable.advance(entry, position - start)
            position = high
    if position < end:
        yield position, end, PageTable.advance(entry, position - start)


def _nearest(segments: list[Segment], pgoff: int) -> list[Segment]:
    """At most SEGMENTS_MAX of them, around the one that has `pgoff`."""
    if 0 < len(segments) <= SEGMENTS_MAX:
        return segments
    at = next((index for index, (start, end, _) in enumerate(segments) if start <= pgoff < end), None)
    assert at is not None, f"nothing to map at the faulting page {pgoff}"
    first = max(0, min(at - SEGMENTS_MAX // 2, len(segments) - SEGMENTS_MAX))
    return segments[first : first + SEGMENTS_MAX]


def _answer_error(fs: FileSystem, vma: Vma, fault: Fault, error: OSError) -> None:
    """Send the FaultError."""
    if not _wants_answer(vma):
        return
    fs.counters["bus_errors"] += 1
    code = error.errno or errno.EIO
    end = max(fault.pgoff + 1, _error_end(vma, fault.pgoff, code))
    fs.send_pager(vma.session, FaultError(fault.fault_id, vma.vma_id, fault.pgoff, end - fault.pgoff, code))


def _error_end(vma: Vma, pgoff: int, code: int) -> int:
    """Up to which page there is nothing to map either: past the end of the file all of the VMA, for a store that finds
    no space the rest of the hole, as far as one FaultError goes. So a loop of stores does not ask for every page."""
    inode = vma.inode
    if code == errno.EFAULT and pgoff >= inode.size_pages:
        return vma.end_pgoff
    if code != errno.ENOSPC:
        return pgoff + 1
    end = min(pgoff + MAP_WINDOW_BYTES // inode.page_size, vma.end_pgoff, inode.size_pages)
    for taken in (inode.block_map, inode.unwritten):
        end = next((gap.end for gap in taken.gaps(pgoff, end) if gap.start == pgoff), pgoff)
    if end <= pgoff:
        return pgoff + 1
    return inode.entry_locks.unlocked_around(PageRange(pgoff, pgoff + 1), vma.kept(PageRange(pgoff, end))).end
