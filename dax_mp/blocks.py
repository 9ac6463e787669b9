"""Blocks for holes: the one place where a file gets them.

A file has two block maps. A page in `inode.block_map` has a *written* block: its bytes are the file's. A page in
`inode.unwritten` has a block of its own too, but still reads as a hole (an unwritten extent of XFS and ext4): fallocate
put it there without zeroing it, and a store to it cannot fail for lack of space. Who fills a hole takes the block from
there where there is one, zeroes it, and moves it over. So all that reads, maps or searches a file looks at `block_map`
alone, and takes the rest for holes.

Blocks come into either map under the page's entry lock, or, for `preallocate`, without waiting between the look and the
change, which comes to the same: nobody maps an unwritten block.
"""

import errno

from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.ranges import Extent, PageRange
from dax_mp.transaction import Steps

Blocks = tuple[int, int, int]
"""(start, end, pfn): pages [start, end) of a file and their first frame."""


def fill(fs: FileSystem, inode: Inode, holes: list[PageRange]) -> None:
    """Give all pages of the holes zeroed, written blocks, or none of them.

    Precondition: they have no written block, and their entry locks are held. Raises OSError ENOSPC.
    """
    fresh = _allocate(fs, inode, [gap for hole in holes for gap in inode.unwritten.gaps(*hole)])
    filled = fresh + [piece for hole in holes for piece in inode.unwritten.pieces(*hole)]
    try:
        for start, end, pfn in filled:
            fs.device.zero_extent(Extent(pfn, end - start))
    except OSError:  # a sparse region's backing is full: no page of the file may change
        release(fs, fresh)
        raise
    for hole in holes:
        inode.unwritten.clear(*hole)
    inode.block_map.insert(filled)


def lock_and_fill(fs: FileSystem, inode: Inode, pages: PageRange) -> Steps[list[int]]:
    """Give all holes of the range blocks, once every VMA has dropped their hole pages (I4).

    Returns the pages whose entry locks are held then, for the caller to release: those that were holes, and others that
    faults were filling. Raises OSError ENOSPC with none of them held. Precondition: rwsem is held exclusive, so holes
    are filled by faults alone, and none comes up.
    """
    locked: list[int] = []
    if missing_pages(inode, pages) > fs.device.frames.free_pages:  # before as many locks are taken: see `pins.pin`
        raise os_error(errno.ENOSPC)
    try:
        yield from lock_holes(inode, pages, locked)
        # Faults may have filled some of the holes while this waited; from here on none can. Those have ended, so that
        # nobody still has a hole page mapped where there is a block.
        holes = list(inode.block_map.gaps(*pages))
        if holes:
            fill(fs, inode, holes)
            if delay := fs.delays.at("fill.allocated"):
                yield delay
            yield from drop_hole_pages(fs, inode, holes)
    except BaseException:
        inode.entry_locks.release_all(locked)
        raise
    return locked


def missing_pages(inode: Inode, pages: PageRange) -> int:
    """How many blocks the range lacks. It may be longer than any device: what is counted are extents."""
    gaps = (gap for hole in inode.block_map.gaps(*pages) for gap in inode.unwritten.gaps(*hole))
    return sum(gap.length_pages for gap in gaps)


def lock_holes(inode: Inode, pages: PageRange, locked: list[int]) -> Steps[None]:
    """Take the entry lock of every page of the range that has no block, or that a fault has locked; ascending.

    Each is in `locked` once it is held. What has a block and is not locked stays so, and costs nothing here: a long
    write to what is there takes no lock at all.
    """
    locks = inode.entry_locks
    pgoff, end = pages
    while pgoff < end:
        held = locks.first_held(pgoff, end)
        for hole in inode.block_map.gaps(pgoff, end if held is None else held):
            locks.take(range(*hole))
            locked += range(*hole)
        if held is None:
            return
        if granted := locks.acquire(held):
            yield granted  # and all that follows may be different now
        locked.append(held)
        pgoff = held + 1


def drop_hole_pages(fs: FileSystem, inode: Inode, holes: list[PageRange]) -> Steps[None]:
    """Have every VMA drop the hole pages of what are no holes any more. Precondition: the entry locks are held."""
    yield from fs.unmapper.unmap_mapping_range(inode, holes)
    # Nobody has a hole page of these ranges mapped any more, and no fault can bring one back (I4).
    for hole in holes:
        fs.device.holes.discard(inode, hole)


def fill_extent(fs: FileSystem, inode: Inode, pages: PageRange) -> tuple[PageRange, int]:
    """Give the first page of the hole a zeroed, written block, and those after it as far as one extent goes.

    Returns the pages that got one, and the first frame. Preconditions and errors as for `fill`.
    """
    start, end = pages
    if inode.unwritten and (unwritten := next(inode.unwritten.pieces(start, end), None)) is not None:
        if unwritten[0] == start:
            _, end, pfn = unwritten
            fs.device.zero_extent(Extent(pfn, end - start))
            inode.unwritten.clear(start, end)
            inode.block_map.set(start, end, pfn)
            return PageRange(start, end), pfn
        end = unwritten[0]
    extent = fs.device.frames.allocate_extent(end - start, inode.goal_pfn(start))
    try:
        fs.device.zero_extent(extent)
    except OSError:
        fs.device.release([extent])
        raise
    end = start + extent.length_pages
    inode.block_map.set(start, end, extent.pfn)
    return PageRange(start, end), extent.pfn


def preallocate(fs: FileSystem, inode: Inode, pages: PageRange) -> list[Blocks]:
    """Give every page of the range that has no block an unwritten one, or none of them. Raises OSError ENOSPC.

    Returns the new ones. Precondition: rwsem is held exclusive.
    """
    holes = [gap for hole in inode.block_map.gaps(*pages) for gap in inode.unwritten.gaps(*hole)]
    fresh = _allocate(fs, inode, holes)
    inode.unwritten.insert(fresh)
    return fresh


def make_unwritten(inode: Inode, pages: PageRange) -> None:
    """Let the range read as a hole, and keep its blocks. Precondition: nobody can have it mapped, nor get it (I1)."""
    inode.unwritten.insert(inode.block_map.clear(*pages))


def _allocate(fs: FileSystem, inode: Inode, gaps: list[PageRange]) -> list[Blocks]:
    """Frames for all the gaps, in neither map yet. Raises OSError ENOSPC, and takes nothing then."""
    frames = fs.device.frames
    if sum(gap.length_pages for gap in gaps) > frames.free_pages:
        raise os_error(errno.ENOSPC)
    allocated: list[Blocks] = []
    for gap in gaps:
        pgoff = gap.start
        for extent in frames.allocate(gap.length_pages, inode.goal_pfn(pgoff)):
            allocated.append((pgoff, pgoff + extent.length_pages, extent.pfn))
            pgoff += extent.length_pages
    return allocated


def release(fs: FileSystem, blocks: list[Blocks]) -> None:
    """Give the frames of blocks that are in neither map back."""
    fs.device.release([Extent(pfn, end - start) for start, end, pfn in blocks])


def replace(fs: FileSystem, inode: Inode, ranges: list[PageRange]) -> None:
    """Move these pages to other frames, with their bytes where they have been written; the old ones are released.

    Raises OSError ENOSPC, and then nothing has changed. Precondition: nobody has them mapped, but for the processes of
    evicted sessions.
    """
    written = [piece for pages in ranges for piece in inode.block_map.pieces(*pages)]
    unwritten = [piece for pages in ranges for piece in inode.unwritten.pieces(*pages)]
    fresh = _allocate(fs, inode, [PageRange(start, end) for start, end, _ in (*written, *unwritten)])
    for start, end, pfn in fresh:
        if inode.unwritten.get(start) is None:
            page_size = inode.page_size
            data = fs.device.read_bytes(inode, start * page_size, end * page_size)
            fs.device.pmem.write(pfn * page_size, data)
    for start, end, pfn in fresh:
        block_map = inode.block_map if inode.unwritten.get(start) is None else inode.unwritten
        block_map.set(start, end, pfn)
    release(fs, written + unwritten)
