"""copy_file_range(2) on one device: read and written in one step of the coordinator, so atomic like a write.

The locks of two files are taken in the order of their numbers, so that two copies in opposite directions cannot wait
for each other. A hole of the source that falls on a hole of the destination stays one.
"""

import errno

from dax_mp import blocks
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.ranges import PageRange
from dax_mp.transaction import Steps
from dax_mp.truncate import extend


def copy_range(
    fs: FileSystem, source: Inode, source_offset_bytes: int, inode: Inode, offset_bytes: int, length_bytes: int
) -> Steps[int]:
    """Copy up to `length_bytes`, to the end of the source at most. Returns how many.

    Raises OSError EINVAL (the ranges overlap in one file), EFBIG, ENOSPC, and then nothing is copied.
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
            yield from _copy(fs, source, source_offset_bytes, inode, offset_bytes, length_bytes)
        return length_bytes
    finally:
        for locked, exclusive in held:
            if exclusive:
                locked.rwsem.release_exclusive()
            else:
                locked.rwsem.release_shared()


def _copy(
    fs: FileSystem, source: Inode, source_offset_bytes: int, inode: Inode, offset_bytes: int, length_bytes: int
) -> Steps[None]:
    """Precondition: the locks are held, and the source has all of the range."""
    page_size = inode.page_size
    shift_bytes = offset_bytes - source_offset_bytes
    source_end_bytes = source_offset_bytes + length_bytes
    locked: list[int] = []
    try:
        # The destination needs blocks only where the source has bytes.
        for start, end, _ in list(source.block_map.pieces(*source.pages_of(source_offset_bytes, source_end_bytes))):
            low_bytes = max(start * page_size, source_offset_bytes) + shift_bytes
            high_bytes = min(end * page_size, source_end_bytes) + shift_bytes
            first, last = inode.pages_of(low_bytes, high_bytes)
            after_locked = locked[-1] + 1 if locked else 0
            locked += yield from blocks.lock_and_fill(fs, inode, PageRange(max(first, after_locked), last))
        data = fs.device.read_bytes(source, source_offset_bytes, source_end_bytes)
        extend(fs, inode, offset_bytes)
        extend(fs, inode, offset_bytes + length_bytes)
        fs.device.overwrite_bytes(inode, offset_bytes, data)
    finally:
        inode.entry_locks.release_all(locked)
