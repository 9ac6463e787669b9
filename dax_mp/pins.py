"""Pins: pages of a VMA that stay where they are, so that system calls and C libraries may be given their memory.

As with the kernel's pins of DAX pages (dax_layout_busy_page(), 430657b6be89), whoever would take the block of a pinned
page away, or move it, waits until it is not pinned any more, and gets EBUSY at the deadline. It holds no lock while it
waits (xfs_break_layouts() lets go of them too): the process with the pin, which may read and write the file and fault
before it unpins, and everybody else, go on as if it were not there. So new pins come meanwhile as well, and who waits
may get EBUSY for one of those.

A page pinned for stores has a block: holes get theirs when they are pinned. A mapping for loads alone takes no block: a
hole stays one, and its hole page is mapped. When that has to go, because the hole is filled or the page cache reclaims
it, the process is told to map what is there now in its place (`unmap.py`), so that there is no moment without a page.
"""

import errno
from collections.abc import Callable

from dax_mp import blocks
from dax_mp.address_space import Pinned, Vma
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.ranges import PageRange
from dax_mp.transaction import Steps


def lock_unpinned(fs: FileSystem, inode: Inode, taken: Callable[[], PageRange | None]) -> Steps[None]:
    """Take rwsem exclusive while none of the pages is pinned that `taken` says then: new pins take rwsem too.

    taken: asked with rwsem held, since the file may have changed meanwhile; None where no page is taken or moved.
    Raises OSError EBUSY at the deadline, and what `taken` raises, without the lock.
    """
    deadline_s = fs.timers.now_s + fs.ack_timeout_s
    while True:
        if granted := inode.rwsem.acquire_exclusive():
            yield granted
        unpinned = False
        try:
            pages = taken()
            unpinned = pages is None or not any(pinned.pages.overlaps(pages) for pinned in inode.pins.values())
            if not unpinned and fs.timers.now_s >= deadline_s:
                raise os_error(errno.EBUSY, "a process has pages of the range pinned")
        finally:
            if not unpinned:
                inode.rwsem.release_exclusive()
        if unpinned:
            return
        changed = fs.timers.at(deadline_s)
        inode.unpinned.append(changed)
        yield changed


def pin(fs: FileSystem, vma: Vma, pages: PageRange) -> Steps[int]:
    """Pin these pages of the VMA. Returns the pin's id.

    Raises OSError EINVAL (not in the VMA), EFAULT (taken out of it, or past the end of the file), ENOSPC (no blocks for
    the holes).
    """
    if not pages.length_pages or not vma.pgoff <= pages.start or pages.end > vma.end_pgoff:
        raise os_error(errno.EINVAL, "a pin lies within its mapping")
    inode = vma.inode
    if granted := inode.rwsem.acquire_exclusive():  # nobody else fills holes but faults, and no new one comes up
        yield granted
    try:
        if pages.end > inode.size_pages or not vma.has_all(pages):
            raise os_error(errno.EFAULT, "the range has pages that are not there to be mapped")
        if vma.keeps_holes:
            yield from _pass_locked_pages(inode, pages)
        else:
            locked = yield from blocks.lock_and_fill(fs, inode, pages)
            inode.entry_locks.release_all(locked)
        if vma.session.ended:
            raise os_error(errno.ESTALE)  # it has gone meanwhile, and with it what the pin would be tied to
        if vma.vma_id not in inode.mapping.i_mmap or not vma.has_all(pages):
            raise os_error(errno.EFAULT, "the mapping has lost the range meanwhile")
        pin_id = fs.next_id()
        vma.session.pins[pin_id] = inode.pins[pin_id] = Pinned(vma, pages)
        return pin_id
    finally:
        inode.rwsem.release_exclusive()


def _pass_locked_pages(inode: Inode, pages: PageRange) -> Steps[None]:
    """Wait until no entry lock of the range is held: who holds one may be having the hole page unmapped."""
    locks = inode.entry_locks
    while (held := locks.first_held(*pages)) is not None:
        if granted := locks.acquire(held):
            yield granted
        locks.release(held)


def unpin(vma: Vma, pin_id: int) -> None:
    """Let go of a pin; who waits for it looks again."""
    inode = vma.inode
    del vma.session.pins[pin_id], inode.pins[pin_id]
    waiting, inode.unpinned = inode.unpinned, []
    for unpinned in waiting:
        if not unpinned.done:  # the deadline was first
            unpinned.complete()


def unpin_vma(vma: Vma) -> None:
    """The VMA goes, and its pins with it."""
    for pin_id, pinned in list(vma.session.pins.items()):
        if pinned.vma is vma:
            unpin(vma, pin_id)
