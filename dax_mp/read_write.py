"""read(2), write(2) and lseek(2) on a file, as dax_iomap_rw() does them.

Coherent with mappings without further work: both go to the same frames. The one thing to see to is a write into a hole
that others have mapped: they must drop the hole page after the block is allocated and before the data is there (else
they go on reading zeroes: cd656375f946; invalidating before the allocation lets a fault bring the hole page back:
e3fce68cdbed). The entry locks of those
pages are held from the allocation to the end, so that no fault comes between.
"""

import errno

from dax_mp import blocks
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.messages import Whence
from dax_mp.transaction import Steps
from dax_mp.truncate import extend


def read(fs: FileSystem, inode: Inode, offset_bytes: int, length_bytes: int) -> Steps[bytes]:
    """Up to `length_bytes`, fewer at the end of the file."""
    if granted := inode.rwsem.acquire_shared():
        yield granted
    try:
        inode.accessed(fs.now_ns)
        end_bytes = min(offset_bytes + length_bytes, inode.size_bytes)
        return fs.device.read_bytes(inode, offset_bytes, end_bytes) if offset_bytes < end_bytes else b""
    finally:
        inode.rwsem.release_shared()


def write(fs: FileSystem, inode: Inode, offset_bytes: int | None, data: bytes) -> Steps[int]:
    """Write all of `data`, at the end of the file when `offset_bytes` is None. Returns the offset after it.

    Raises OSError ENOSPC or EFBIG, and then nothing is written. Atomic against every other read and write.
    """
    if granted := inode.rwsem.acquire_exclusive():
        yield granted
    try:
        start_bytes = inode.size_bytes if offset_bytes is None else offset_bytes
        end_bytes = start_bytes + len(data)
        if end_bytes > OFFSET_BYTES_MAX:
            raise os_error(errno.EFBIG)
        if data:
            yield from _write(fs, inode, start_bytes, data)
        return end_bytes
    finally:
        inode.rwsem.release_exclusive()


def _write(fs: FileSystem, inode: Inode, start_bytes: int, data: bytes) -> Steps[None]:
    """Precondition: rwsem is held exclusive."""
    end_bytes = start_bytes + len(data)
    pages = inode.pages_of(start_bytes, end_bytes)
    locked: list[int] = []
    # Where all of it is there, and no fault is filling anything, there is nothing to fill and nothing to be dropped.
    if inode.entry_locks or inode.block_map.covering(*pages) is None:
        locked = yield from blocks.lock_and_fill(fs, inode, pages)
    try:
        if delay := fs.delays.at("write.before_copy"):
            yield delay
        if end_bytes > inode.size_bytes:
            extend(fs, inode, start_bytes)
            extend(fs, inode, end_bytes)
        fs.device.write_bytes(inode, start_bytes, data)
        inode.modified(fs.now_ns)
    finally:
        inode.entry_locks.release_all(locked)


def seek(inode: Inode, offset_bytes: int, whence: Whence) -> int:
    """The next data or hole at or after `offset_bytes`; the end of the file counts as a hole (lseek(2)).

    Raises OSError ENXIO when the offset is at or past the end, or no data follows it.
    """
    if offset_bytes >= inode.size_bytes:
        raise os_error(errno.ENXIO)
    pgoff, end_pgoff = offset_bytes // inode.page_size, inode.size_pages
    if whence is Whence.DATA:
        piece = next(inode.block_map.pieces(pgoff, end_pgoff), None)
        if piece is None:
            raise os_error(errno.ENXIO)
        found = piece[0]
    else:
        gap = next(inode.block_map.gaps(pgoff, end_pgoff), None)
        found = end_pgoff if gap is None else gap.start
    return min(max(found * inode.page_size, offset_bytes), inode.size_bytes)
