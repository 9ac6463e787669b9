"""Truncate: it takes blocks away from a file that processes have mapped, and private copies from those processes.

The order is that of xfs_vn_setattr_size() and truncate_setsize(): size down, unmap, wait, and only then free. Between
the first step and the last, invalidate_lock keeps every fault out, so nobody can get a new translation to a block that
is about to go (Linux had that twice: a fault that passed the i_size check before, and mapped after; 283307c7607d and
ea3d7209ca01).
"""

from functools import partial

from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.pins import lock_unpinned
from dax_mp.ranges import PageRange
from dax_mp.transaction import Steps


def truncate(fs: FileSystem, inode: Inode, size_bytes: int) -> Steps[None]:
    """Set the size. Growing takes no block: the new range is a hole. Raises OSError EBUSY (a pin)."""
    yield from lock_unpinned(fs, inode, partial(_cut_off, inode, size_bytes))
    try:
        if size_bytes < inode.size_bytes:
            yield from _truncate_down(fs, inode, size_bytes)
        else:
            extend(fs, inode, size_bytes)
        inode.modified(fs.now_ns)
    finally:
        inode.rwsem.release_exclusive()


def _cut_off(inode: Inode, size_bytes: int) -> PageRange | None:
    """The pages that the file has no more when it ends there; None where it has not become shorter."""
    first = -(-size_bytes // inode.page_size)
    return PageRange(first, OFFSET_BYTES_MAX) if size_bytes < inode.size_bytes else None


def extend(fs: FileSystem, inode: Inode, size_bytes: int) -> None:
    """Let the file end at `size_bytes`, if that is further than now. Precondition: rwsem is held exclusive.

    A store past the old end, into the last page, which is mapped whole, must not become part of the file (I6).
    """
    if size_bytes > inode.size_bytes:
        fs.device.zero_bytes(inode, inode.size_bytes, inode.size_pages * inode.page_size)
        inode.size_bytes = size_bytes


def _truncate_down(fs: FileSystem, inode: Inode, size_bytes: int) -> Steps[None]:
    """Precondition: rwsem is held exclusive, and nothing past the new end is pinned."""
    page_size = inode.page_size
    if granted := inode.invalidate_lock.acquire_exclusive():
        yield granted
    try:
        # No fault is being served, and none will be until the end.
        fs.device.zero_bytes(inode, size_bytes, -(-size_bytes // page_size) * page_size)
        inode.size_bytes = size_bytes
        # Bytes past the end of the last page read as zero (I6); a fault served from now on sees the new size (I2).
        past_eof = PageRange(inode.size_pages, OFFSET_BYTES_MAX)
        if delay := fs.delays.at("truncate.size_set"):
            yield delay
        yield from fs.unmapper.unmap_mapping_range(inode, [past_eof], even_cows=True)
        if delay := fs.delays.at("truncate.unmapped"):
            yield delay
        # Every process has dropped its translations past the end (I1): the blocks can go.
        fs.cut(inode, past_eof)
    finally:
        inode.invalidate_lock.release_exclusive()
