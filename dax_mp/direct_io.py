"""Direct I/O: long reads and writes that go between the client's buffer and the region, past the coordinator.

The file's blocks are *lent* for as long as the client takes: BeginRead or BeginWrite tells it where they are, it
copies, and EndIo gives them back. The locks are those of read(2) and write(2) in the kernel, held over the client's
copy as the kernel holds i_rwsem over a copy from user memory: rwsem, shared or exclusive, so that the blocks stay where
they are; and for a write the entry locks of the holes, since a fault there would zero the block under the client's
store.

A write into a hole goes into an unwritten block (`blocks.py`), which no one else can see, and which need not be zeroed;
what was stored becomes part of the file in `end` alone, as the direct I/O of XFS converts unwritten extents at its
end: converted -> hole pages unmapped everywhere (I4) -> i_size up. So a client that dies on the way leaves nothing of
its half-done write in what was a hole or past the end; its fresh blocks are given back.

A client that does not come back is evicted at the deadline, like one that does not acknowledge an Unmap. It may still
store to what it was lent, until it has said Dropped or died: what of it is freed meanwhile goes to quarantine.
"""

import errno
from collections.abc import Iterator
from typing import NamedTuple

from dax_mp import blocks
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import LIST_ENTRIES_MAX, OFFSET_BYTES_MAX
from dax_mp.ranges import PageRange
from dax_mp.session import Lease, Session
from dax_mp.transaction import Steps


class Piece(NamedTuple):
    """Bytes of a file that lie together in the region; region_offset_bytes is 0 for a hole."""

    region_offset_bytes: int
    length_bytes: int


def begin_read(
    fs: FileSystem, session: Session, inode: Inode, offset_bytes: int, length_bytes: int
) -> Steps[tuple[int, list[Piece]]]:
    """Lend the blocks of a range to be loaded from, as far as the file goes. Returns the lease's id, and them."""
    if granted := inode.rwsem.acquire_shared():
        yield granted
    inode.accessed(fs.now_ns)
    end_bytes = max(offset_bytes, min(offset_bytes + length_bytes, inode.size_bytes))
    lease = Lease(session, inode, offset_bytes, end_bytes, fs.timers.now_s)
    pieces = _lend(lease, inode.block_map.pieces(*inode.pages_of(offset_bytes, end_bytes)))
    return _register(fs, lease), pieces


def begin_write(
    fs: FileSystem, session: Session, inode: Inode, offset_bytes: int | None, length_bytes: int
) -> Steps[tuple[int, int, list[Piece]]]:
    """Lend the blocks of a range to be stored into; None: at the end of the file.

    Returns the lease's id, where the range begins, and the blocks. Raises OSError ENOSPC, EFBIG.
    """
    if granted := inode.rwsem.acquire_exclusive():
        yield granted
    locked: list[int] = []
    try:
        start_bytes = inode.size_bytes if offset_bytes is None else offset_bytes
        end_bytes = start_bytes + length_bytes
        if end_bytes > OFFSET_BYTES_MAX:
            raise os_error(errno.EFBIG)
        pages = inode.pages_of(start_bytes, end_bytes)
        yield from blocks.lock_holes(inode, pages, locked)
        fresh = blocks.preallocate(fs, inode, pages)
        lease = Lease(session, inode, start_bytes, end_bytes, fs.timers.now_s, locked, fresh)
        _zero_edges(fs, lease)
    except BaseException:
        inode.entry_locks.release_all(locked)
        inode.rwsem.release_exclusive()
        raise
    inode.modified(fs.now_ns)  # what it has may be stored to from now on
    both = sorted((*inode.block_map.pieces(*pages), *inode.unwritten.pieces(*pages)))
    pieces = _lend(lease, iter(both))
    return _register(fs, lease), start_bytes, pieces


def _zero_edges(fs: FileSystem, lease: Lease) -> None:
    """Of unwritten pages that the write covers in part, the rest is to read as zero."""
    page_size = lease.inode.page_size
    for edge_bytes in {lease.start_bytes, lease.end_bytes}:
        pfn = lease.inode.unwritten.get(edge_bytes // page_size)
        if edge_bytes % page_size and pfn is not None:
            fs.device.pmem.zero(pfn * page_size, page_size)


def _lend(lease: Lease, mapped: Iterator[blocks.Blocks]) -> list[Piece]:
    """Where the range lies, in order, as far as one reply can tell; the lease ends there."""
    page_size = lease.inode.page_size
    pieces: list[Piece] = []
    position_bytes = lease.start_bytes
    for start, end, pfn in mapped:
        if len(pieces) >= LIST_ENTRIES_MAX - 1:
            lease.end_bytes = position_bytes
            break
        low = max(start * page_size, lease.start_bytes)
        high = min(end * page_size, lease.end_bytes)
        if position_bytes < low:
            pieces.append(Piece(0, low - position_bytes))
        pieces.append(Piece(pfn * page_size + low - start * page_size, high - low))
        position_bytes = high
    if position_bytes < lease.end_bytes:
        pieces.append(Piece(0, lease.end_bytes - position_bytes))
    return pieces


def _register(fs: FileSystem, lease: Lease) -> int:
    """The lease's id. A session that has ended while this waited gets nothing lent."""
    io_id = fs.next_id()
    if lease.session.ended:
        _release(fs, lease)
        raise os_error(errno.ESTALE)
    fs.get(lease.inode)
    lease.session.leases[io_id] = fs.leases[io_id] = lease
    return io_id


def end(fs: FileSystem, session: Session, io_id: int, done_bytes: int) -> Steps[None]:
    """The client has loaded, or has stored the first `done_bytes` of what it was lent, and touches none of it any more.

    Raises OSError EINVAL where it was lent nothing of that id, or less.
    """
    lease = session.leases.get(io_id)
    if lease is None or done_bytes > lease.end_bytes - lease.start_bytes:
        raise os_error(errno.EINVAL, f"nothing is lent as {io_id}")
    _take_back(fs, io_id)
    inode = lease.inode
    try:
        if lease.write and done_bytes:
            yield from _convert(fs, lease, lease.start_bytes + done_bytes)
            inode.modified(fs.now_ns)
    finally:
        _release(fs, lease)
        fs.put(inode)


def _convert(fs: FileSystem, lease: Lease, end_bytes: int) -> Steps[None]:
    """Make what was stored part of the file."""
    inode, page_size = lease.inode, lease.inode.page_size
    pages = inode.pages_of(lease.start_bytes, end_bytes)
    if end_bytes < lease.end_bytes and (pfn := inode.unwritten.get(pages.end - 1)) is not None:
        tail_bytes = end_bytes - (pages.end - 1) * page_size
        fs.device.pmem.zero(pfn * page_size + tail_bytes, page_size - tail_bytes)
    converted = inode.unwritten.clear(*pages)
    inode.block_map.insert(converted)
    yield from blocks.drop_hole_pages(fs, inode, [PageRange(start, end_pgoff) for start, end_pgoff, _ in converted])
    if end_bytes > inode.size_bytes:
        # What a mapping has stored past the old end comes into the file no more, nor lies behind the new one (I6).
        last_page_end_bytes = inode.size_pages * page_size
        if inode.size_bytes < lease.start_bytes:
            fs.device.zero_bytes(inode, inode.size_bytes, min(lease.start_bytes, last_page_end_bytes))
        if end_bytes < last_page_end_bytes:
            fs.device.zero_bytes(inode, end_bytes, last_page_end_bytes)
        inode.size_bytes = end_bytes


def abort_all(fs: FileSystem, session: Session) -> None:
    """The session is over: take everything back that it was lent. Precondition: what it may still reach is noted."""
    for io_id, lease in list(session.leases.items()):
        _take_back(fs, io_id)
        _release(fs, lease)
        fs.put(lease.inode)


def _take_back(fs: FileSystem, io_id: int) -> None:
    lease = fs.leases.pop(io_id)
    del lease.session.leases[io_id]


def _release(fs: FileSystem, lease: Lease) -> None:
    """Give back the fresh blocks that are still unwritten, and release the locks."""
    inode = lease.inode
    if not lease.write:
        inode.rwsem.release_shared()
        return
    for start, end_pgoff, _ in lease.fresh:
        blocks.release(fs, inode.unwritten.clear(start, end_pgoff))
    inode.entry_locks.release_all(lease.locked)
    inode.rwsem.release_exclusive()


def overdue(fs: FileSystem) -> list[Session]:
    """The sessions that have kept what they were lent for longer than they may."""
    before_s = fs.timers.now_s - fs.ack_timeout_s
    return list(dict.fromkeys(lease.session for lease in fs.leases.values() if lease.since_s <= before_s))


def next_deadline_s(fs: FileSystem) -> float | None:
    """When the first of them is due."""
    return min((lease.since_s + fs.ack_timeout_s for lease in fs.leases.values()), default=None)
