"""Pins: pages of a VMA that stay where they are, so that system calls and C libraries may be given their memory.

As with the kernel's pins of DAX pages (dax_layout_busy_page(), 430657b6be89), whoever would take the block of a pinned
page away, or move it, waits until it is not pinned any more, and gets EBUSY at the deadline. It does so before it takes
invalidate_lock, so that the process with the pin can still fault; reads and writes of the file, and new pins, wait
behind it for rwsem.

A pinned page has a block: holes get theirs when they are pinned. So a pin has nothing to fear from hole pages, which
come and go.
"""

import errno

from dax_mp import blocks
from dax_mp.address_space import Pinned, Vma
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.ranges import PageRange
from dax_mp.transaction import Steps


def lock_unpinned(fs: FileSystem, inode: Inode, pages: PageRange) -> Steps[None]:
    """Take invalidate_lock exclusive, with none of `pages` pinned. Raises OSError EBUSY at the deadline, without it.

    Precondition: rwsem is held exclusive, and stays so until the lock is released: no new pin can come.
    """
    deadline_s = fs.timers.now_s + fs.ack_timeout_s
    while any(pinned.pages.overlaps(pages) for pinned in inode.pins.values()):
        if fs.timers.now_s >= deadline_s:
            raise os_error(errno.EBUSY, "a process has pages of the range pinned")
        unpinned = fs.timers.at(deadline_s)
        inode.unpinned.append(unpinned)
        yield unpinned
    if granted := inode.invalidate_lock.acquire_exclusive():
        yield granted


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
