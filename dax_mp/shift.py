"""Collapse and insert: the operations that move blocks to other pages of their file (FALLOC_FL_COLLAPSE_RANGE,
FALLOC_FL_INSERT_RANGE; xfs_collapse_file_space(), xfs_insert_file_space()).

A block that changes its page must not be reachable through a translation of its old one (I1). So all from the first
page that moves on is unmapped, and stays so: invalidate_lock is held exclusive until both block maps are shifted. What
an evicted process may still reach cannot move at all: those pages get copies, and their old blocks go to quarantine.
"""

import errno

from dax_mp import blocks
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.ranges import PageRange, RangeMap
from dax_mp.transaction import Steps


def moved_by_collapse(inode: Inode, offset_bytes: int, length_bytes: int) -> PageRange:
    """The pages that a collapse takes or moves.

    Raises OSError EINVAL: not whole pages, or the range reaches the end of the file, where a truncate would do.
    """
    first, _ = _whole_pages(inode, offset_bytes, length_bytes)
    if offset_bytes + length_bytes >= inode.size_bytes:
        raise os_error(errno.EINVAL, "the range reaches the end of the file: truncate it")
    return PageRange(first, OFFSET_BYTES_MAX)


def collapse_range(fs: FileSystem, inode: Inode, offset_bytes: int, length_bytes: int) -> Steps[None]:
    """Take [offset, offset + length) out of the file; what follows moves down. Raises OSError ENOSPC.

    Precondition: rwsem is held exclusive, and nothing that moves is pinned.
    """
    first, count = _whole_pages(inode, offset_bytes, length_bytes)
    rest = PageRange(first, OFFSET_BYTES_MAX)
    if granted := inode.invalidate_lock.acquire_exclusive():
        yield granted
    try:
        yield from _unmap_rest(fs, inode, rest)
        _replace_reachable(fs, inode, PageRange(first + count, OFFSET_BYTES_MAX))
        fs.cut(inode, PageRange(first, first + count))
        _move(inode, first + count, -count)
        inode.size_bytes -= length_bytes
        # The file has become shorter: private copies past its end go, as with any truncate. Nothing else is there.
        yield from fs.unmapper.unmap_mapping_range(
            inode, [PageRange(inode.size_pages, OFFSET_BYTES_MAX)], even_cows=True
        )
    finally:
        inode.invalidate_lock.release_exclusive()


def moved_by_insert(inode: Inode, offset_bytes: int, length_bytes: int) -> PageRange:
    """The pages that an insertion moves. Raises OSError EINVAL: not whole pages, or at or past the end; EFBIG."""
    first, _ = _whole_pages(inode, offset_bytes, length_bytes)
    if inode.size_bytes + length_bytes > OFFSET_BYTES_MAX:
        raise os_error(errno.EFBIG)
    if offset_bytes >= inode.size_bytes:
        raise os_error(errno.EINVAL, "the offset is past the end of the file: make it longer")
    return PageRange(first, OFFSET_BYTES_MAX)


def insert_range(fs: FileSystem, inode: Inode, offset_bytes: int, length_bytes: int) -> Steps[None]:
    """Put a hole of `length` in at the offset; what was there moves up. Raises OSError ENOSPC.

    Precondition: rwsem is held exclusive, and nothing that moves is pinned.
    """
    first, count = _whole_pages(inode, offset_bytes, length_bytes)
    rest = PageRange(first, OFFSET_BYTES_MAX)
    if granted := inode.invalidate_lock.acquire_exclusive():
        yield granted
    try:
        yield from _unmap_rest(fs, inode, rest)
        _replace_reachable(fs, inode, rest)
        inode.size_bytes += length_bytes
        _move(inode, first, count)
    finally:
        inode.invalidate_lock.release_exclusive()


def _whole_pages(inode: Inode, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
    if offset_bytes % inode.page_size or length_bytes % inode.page_size:
        raise os_error(errno.EINVAL, f"offset and length must be multiples of the page size, {inode.page_size}")
    return offset_bytes // inode.page_size, length_bytes // inode.page_size


def _unmap_rest(fs: FileSystem, inode: Inode, rest: PageRange) -> Steps[None]:
    """Have all that is to move unmapped, and what was stored past the end of the file zeroed, since the end moves too.

    The page cache's pages are dropped: they are of holes, which move without them.
    """
    yield from fs.unmapper.unmap_mapping_range(inode, [rest])
    if delay := fs.delays.at("shift.unmapped"):
        yield delay
    fs.device.zero_bytes(inode, inode.size_bytes, inode.size_pages * inode.page_size)  # I6
    fs.device.holes.discard(inode, rest)


def _move(inode: Inode, start: int, steps: int) -> None:
    """Move every block from page `start` on by that many pages."""
    for block_map in (inode.block_map, inode.unwritten):
        for low, high, pfn in block_map.clear(start, OFFSET_BYTES_MAX):
            block_map.set(low + steps, high + steps, pfn)


def _replace_reachable(fs: FileSystem, inode: Inode, pages: PageRange) -> None:
    """Give copies to the pages that an evicted process may still reach. Raises OSError ENOSPC; nothing is moved yet."""
    reachable: RangeMap[None] = RangeMap()
    if not fs.device.frames.held:
        return
    for block_map in (inode.block_map, inode.unwritten):
        for start, end, pfn in block_map.pieces(*pages):
            for low, high in fs.device.frames.held_parts(pfn, end - start):
                reachable.set(start + low - pfn, start + high - pfn, None)
    blocks.replace(fs, inode, [PageRange(start, end) for start, end, _ in reachable])
