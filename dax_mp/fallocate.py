"""fallocate(2): allocate, punch a hole, zero a range, collapse and insert a range, with the errors of vfs_fallocate().

All of it holds rwsem exclusive. What takes blocks away, or moves them to other pages, holds invalidate_lock exclusive
as well, from before the unmap until the block maps are as they shall be: no fault is served in between, so nobody gets
a translation to a block on its way (I1; ea3d7209ca01, CVE-2015-8839). None of it drops private copies (even_cows = 0).

- allocate: unwritten blocks (`blocks.py`). Nothing is unmapped: a hole page goes on being read there.
- punch: zero the parts of pages at both ends in place, unmap the whole pages, wait, free their blocks.
- zero: allocate the holes first, so that what finds no space changes nothing; unmap the whole pages, wait, and make the
  blocks that they have unwritten ones.
- collapse, insert: unmap all from the offset on, wait, move the blocks. Order and errors of xfs_file_fallocate().
"""

import errno
from collections.abc import Callable
from functools import partial

from dax_mp import blocks
from dax_mp.control_messages import FallocateMode
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.pins import lock_unpinned
from dax_mp.ranges import PageRange
from dax_mp.shift import collapse_range, insert_range, moved_by_collapse, moved_by_insert
from dax_mp.transaction import Steps
from dax_mp.truncate import extend

_PUNCH = FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE
_ALONE = (FallocateMode.COLLAPSE_RANGE, FallocateMode.INSERT_RANGE)


def fallocate(fs: FileSystem, inode: Inode, mode: FallocateMode, offset_bytes: int, length_bytes: int) -> Steps[None]:
    """Raises OSError: EINVAL, EOPNOTSUPP, EFBIG, ENOSPC, EBUSY (a pin)."""
    _check(mode, offset_bytes, length_bytes)
    end_bytes = offset_bytes + length_bytes
    yield from lock_unpinned(fs, inode, partial(_taken, inode, mode, offset_bytes, length_bytes))
    try:
        if mode == FallocateMode.COLLAPSE_RANGE:
            yield from collapse_range(fs, inode, offset_bytes, length_bytes)
        elif mode == FallocateMode.INSERT_RANGE:
            yield from insert_range(fs, inode, offset_bytes, length_bytes)
        elif mode & FallocateMode.PUNCH_HOLE:
            yield from _punch(fs, inode, offset_bytes, end_bytes)
        else:
            blocks.preallocate(fs, inode, inode.pages_of(offset_bytes, end_bytes))
            if mode & FallocateMode.ZERO_RANGE:
                yield from _zero(fs, inode, offset_bytes, end_bytes)
            if not mode & FallocateMode.KEEP_SIZE:
                extend(fs, inode, end_bytes)
        inode.modified(fs.now_ns)
    finally:
        inode.rwsem.release_exclusive()


def _taken(inode: Inode, mode: FallocateMode, offset_bytes: int, length_bytes: int) -> PageRange | None:
    """The pages that lose their blocks, or move. Raises OSError where a collapse or an insert cannot be."""
    if mode == FallocateMode.COLLAPSE_RANGE:
        return moved_by_collapse(inode, offset_bytes, length_bytes)
    if mode == FallocateMode.INSERT_RANGE:
        return moved_by_insert(inode, offset_bytes, length_bytes)
    if mode & (FallocateMode.PUNCH_HOLE | FallocateMode.ZERO_RANGE):
        return _whole_pages(inode, offset_bytes, offset_bytes + length_bytes)
    return None


def _whole_pages(inode: Inode, start_bytes: int, end_bytes: int) -> PageRange | None:
    """Those that lie wholly in the range."""
    whole = PageRange(-(-start_bytes // inode.page_size), end_bytes // inode.page_size)
    return whole if whole.start < whole.end else None


def _check(mode: FallocateMode, offset_bytes: int, length_bytes: int) -> None:
    if not length_bytes:
        raise os_error(errno.EINVAL, "fallocate of no length")
    known = mode & ~(_PUNCH | FallocateMode.ZERO_RANGE | _ALONE[0] | _ALONE[1])
    punches = mode & FallocateMode.PUNCH_HOLE
    if known or (punches and mode != _PUNCH):
        raise os_error(errno.EOPNOTSUPP)
    if any(mode & alone and mode != alone for alone in _ALONE):
        raise os_error(errno.EINVAL)
    if offset_bytes + length_bytes > OFFSET_BYTES_MAX:
        raise os_error(errno.EFBIG)


def _punch(fs: FileSystem, inode: Inode, start_bytes: int, end_bytes: int) -> Steps[None]:
    """Make the range a hole; parts of pages are zeroed in place. Precondition: rwsem is held exclusive, and none of the
    whole pages is pinned."""
    yield from _unmap_whole_pages(fs, inode, start_bytes, end_bytes, fs.cut)


def _zero(fs: FileSystem, inode: Inode, start_bytes: int, end_bytes: int) -> Steps[None]:
    """Make the range read as zero, with the blocks that it has. Preconditions: as `_punch`."""
    yield from _unmap_whole_pages(fs, inode, start_bytes, end_bytes, blocks.make_unwritten)


def _unmap_whole_pages(
    fs: FileSystem, inode: Inode, start_bytes: int, end_bytes: int, change: Callable[[Inode, PageRange], None]
) -> Steps[None]:
    """Zero the parts of pages at both ends, and `change` the whole ones while nobody has them mapped."""
    whole = _whole_pages(inode, start_bytes, end_bytes)
    if whole is None:
        fs.device.zero_bytes(inode, start_bytes, end_bytes)
        return
    if granted := inode.invalidate_lock.acquire_exclusive():
        yield granted
    try:
        fs.device.zero_bytes(inode, start_bytes, whole.start * inode.page_size)
        fs.device.zero_bytes(inode, whole.end * inode.page_size, end_bytes)
        yield from fs.unmapper.unmap_mapping_range(inode, [whole])
        if delay := fs.delays.at("punch.unmapped"):
            yield delay
        # Nobody has the whole pages mapped, and no fault is served until invalidate_lock is released.
        change(inode, whole)
    finally:
        inode.invalidate_lock.release_exclusive()
