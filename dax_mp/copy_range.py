"""copy_file_range(2) on one device: read and written in one step of the coordinator, so atomic like a write.

The locks of two files are taken in the order of their numbers, so that two copies in opposite directions cannot wait
for each other. A hole of the source that falls on a hole of the destination stays one.

What the copy needs is counted before anything is allocated. Where the device has less, the copy ends before the first
page that gets no block, as in Linux: fewer bytes are reported, and no block is taken that no byte is copied to.
"""

import errno

from dax_mp import blocks
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.ranges import PageRange, RangeMap
from dax_mp.transaction import Steps
from dax_mp.truncate import extend


def copy_range(
    fs: FileSystem, source: Inode, source_offset_bytes: int, inode: Inode, offset_bytes: int, length_bytes: int
) -> Steps[int]:
    """Copy up to `length_bytes`, to the end of the source, or until the device is full. Returns how many.

    Raises OSError EINVAL (the ranges overlap in one file), EFBIG, ENOSPC, and then nothing is copied or allocated.
    """
    if source is inode and abs(source_offset_bytes - offset_bytes) < length_bytes:
        raise os_error(errno.EINVAL, "the ranges overlap")
    if offset_bytes + length_bytes > OFFSET_BYTES_MAX:
        raise os_error(errno.EFBIG)
    locks = [(source, False), (inode, True)] if source is not inode else [(inode, True)]
    locks.sort(key=lambda lock: lock[0].ino)
    held: list[tuple[Inode, bool]] = []
    try:
        for locked, exclusive in locks:
            if granted := locked.rwsem.acquire_exclusive() if exclusive else locked.rwsem.acquire_shared():
                yield granted
            held.append((locked, exclusive))
        length_bytes = max(0, min(length_bytes, source.size_bytes - source_offset_bytes))
        if length_bytes:
            length_bytes = yield from _copy(fs, source, source_offset_bytes, inode, offset_bytes, length_bytes)
        return length_bytes
    finally:
        for locked, exclusive in held:
            if exclusive:
                locked.rwsem.release_exclusive()
            else:
                locked.rwsem.release_shared()


def _copy(
    fs: FileSystem, source: Inode, source_offset_bytes: int, inode: Inode, offset_bytes: int, length_bytes: int
) -> Steps[int]:
    """Returns how much was copied. Precondition: the locks are held, and the source has all of the range."""
    # The destination needs blocks where the source has bytes; what is stored there by a fault from now on, may be left.
    targets = list(_targets(source, source_offset_bytes, length_bytes, inode, offset_bytes - source_offset_bytes))
    locked: list[int] = []
    try:
        for start, end, _ in targets:
            yield from blocks.lock_holes(inode, PageRange(start, end), locked)
        holes = [hole for start, end, _ in targets for hole in inode.block_map.gaps(start, end)]
        length_bytes = min(length_bytes, max(0, _full_at(fs, inode, holes) * inode.page_size - offset_bytes))
        if not length_bytes:
            raise os_error(errno.ENOSPC)
        end_pgoff = inode.pages_of(offset_bytes, offset_bytes + length_bytes).end
        holes = [PageRange(start, min(end, end_pgoff)) for start, end in holes if start < end_pgoff]
        if holes:
            blocks.fill(fs, inode, holes)
            yield from blocks.drop_hole_pages(fs, inode, holes)
        data = fs.device.read_bytes(source, source_offset_bytes, source_offset_bytes + length_bytes)
        extend(fs, inode, offset_bytes)
        extend(fs, inode, offset_bytes + length_bytes)
        fs.device.overwrite_bytes(inode, offset_bytes, data)
        source.accessed(fs.now_ns)
        inode.modified(fs.now_ns)
    finally:
        inode.entry_locks.release_all(locked)
    return length_bytes


def _targets(
    source: Inode, source_offset_bytes: int, length_bytes: int, inode: Inode, shift_bytes: int
) -> RangeMap[None]:
    """The destination's pages that get bytes of blocks."""
    page_size = inode.page_size
    source_end_bytes = source_offset_bytes + length_bytes
    targets: RangeMap[None] = RangeMap()
    for start, end, _ in source.block_map.pieces(*source.pages_of(source_offset_bytes, source_end_bytes)):
        low_bytes = max(start * page_size, source_offset_bytes) + shift_bytes
        high_bytes = min(end * page_size, source_end_bytes) + shift_bytes
        targets.set(*inode.pages_of(low_bytes, high_bytes), None)
    return targets


def _full_at(fs: FileSystem, inode: Inode, holes: list[PageRange]) -> int:
    """The first page of the holes for which the device has no block; past all of them where it has enough."""
    free_pages = fs.device.frames.free_pages
    for hole in holes:
        for gap in inode.unwritten.gaps(*hole):
            if gap.length_pages > free_pages:
                return gap.start + free_pages
            free_pages -= gap.length_pages
    return OFFSET_BYTES_MAX
