"""What a client may ask for on its control socket: one function a request.

Each takes the file system, the session and the request, and returns the reply's value, or, when it may have to wait,
the steps that lead to it. An OSError becomes an Error reply; nothing else is expected to be raised.
"""

import errno
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

from dax_mp import messages, pins, truncate
from dax_mp.address_space import Vma, pte_fields
from dax_mp.errors import os_error
from dax_mp.file_requests import FILE_REQUESTS, inode_of
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import HANDLES_PER_SESSION_MAX, LIST_ENTRIES_MAX, OFFSET_BYTES_MAX, VMAS_PER_SESSION_MAX
from dax_mp.messages import Access, OpenFlag, RenameFlag
from dax_mp.ranges import PageRange
from dax_mp.session import Session
from dax_mp.transaction import Steps

MAPPED_ENTRIES_MAX: Final = 4096
"""Page-table pieces that one reply to Maps gives."""


def open_file(fs: FileSystem, session: Session, request: messages.Open) -> Steps[list[int]]:
    if len(session.handles) >= HANDLES_PER_SESSION_MAX:
        raise os_error(errno.EMFILE, filename=request.name)
    flags = OpenFlag(request.flags)
    inode = None if OpenFlag.TMPFILE in flags else fs.names.get(request.name)
    if inode is None:
        if not flags & (OpenFlag.CREATE | OpenFlag.TMPFILE):
            raise os_error(errno.ENOENT, filename=request.name)
        inode = fs.create(None if OpenFlag.TMPFILE in flags else request.name)
        inode.ephemeral = OpenFlag.EPHEMERAL in flags
    elif OpenFlag.EXCLUSIVE in flags:
        raise os_error(errno.EEXIST, filename=request.name)
    fs.get(inode)
    if OpenFlag.TRUNCATE in flags:
        try:
            yield from truncate.truncate(fs, inode, 0)
        except OSError:  # EBUSY: pages of it are pinned
            fs.put(inode)
            raise
    if session.ended:  # while the truncate waited; a handle of it would never be closed
        fs.put(inode)
        raise os_error(errno.ESTALE)
    handle = session.next_handle
    session.next_handle += 1
    session.handles[handle] = inode
    return [handle, inode.ino, inode.size_bytes]


def close_file(fs: FileSystem, session: Session, request: messages.Close) -> None:
    inode = inode_of(session, request.handle)
    del session.handles[request.handle]
    fs.put(inode)


def _stat(inode: Inode) -> dict[str, Any]:
    vmas_of: dict[Session, int] = {}
    for vma in inode.mapping.i_mmap.values():
        vmas_of[vma.session] = vmas_of.get(vma.session, 0) + 1
    return {
        "ino": inode.ino,
        "name": inode.name,
        "size_bytes": inode.size_bytes,
        "blocks": inode.block_map.total() + inode.unwritten.total(),
        "nlink": int(inode.name is not None),
        "atime_ns": inode.atime_ns,
        "mtime_ns": inode.mtime_ns,
        "ctime_ns": inode.ctime_ns,
        "mappers": [{"pid": session.pid, "vmas": vmas} for session, vmas in vmas_of.items()],
    }


def stat(fs: FileSystem, _session: Session, request: messages.Stat) -> dict[str, Any]:
    return _stat(fs.lookup(request.name))


def fstat(_fs: FileSystem, session: Session, request: messages.Fstat) -> dict[str, Any]:
    return _stat(inode_of(session, request.handle))


def list_files(fs: FileSystem, _session: Session, request: messages.List) -> list[dict[str, Any]]:
    stats: list[dict[str, Any]] = []
    entries = 0
    for inode in fs.list_after(request.after, LIST_ENTRIES_MAX):
        stats.append(_stat(inode))
        entries += 1 + len(stats[-1]["mappers"])
        if entries >= LIST_ENTRIES_MAX:
            break
    return stats


def unlink(fs: FileSystem, _session: Session, request: messages.Unlink) -> None:
    fs.unlink(request.name)


def rename(fs: FileSystem, _session: Session, request: messages.Rename) -> None:
    fs.rename(request.old, request.new, replace=not request.flags & RenameFlag.NOREPLACE)


def link(fs: FileSystem, session: Session, request: messages.Link) -> None:
    inode = inode_of(session, request.handle)
    fs.link(inode, request.name, replace=not request.flags & RenameFlag.NOREPLACE)


def mmap(fs: FileSystem, session: Session, request: messages.Mmap) -> int:
    inode = inode_of(session, request.handle)
    access = Access(request.access)
    if not request.length_pages or Access.READ not in access or (request.private and Access.WRITE in access):
        raise os_error(errno.EINVAL)
    _check_length(inode, request.pgoff, request.length_pages)
    if len(session.vmas) >= VMAS_PER_SESSION_MAX:
        raise os_error(errno.ENOMEM)
    inode.accessed(fs.now_ns)
    return add_vma(fs, session, inode, request.pgoff, request.length_pages, access, bool(request.private)).vma_id


def add_vma(
    fs: FileSystem, session: Session, inode: Inode, pgoff: int, length_pages: int, access: Access, private: bool
) -> Vma:
    """A new VMA, with nothing mapped."""
    vma = Vma(fs.next_id(), session, fs.get(inode), pgoff, length_pages, access, private)
    session.vmas[vma.vma_id] = inode.mapping.i_mmap[vma.vma_id] = vma
    return vma


def copy_vma(fs: FileSystem, session: Session, vma: Vma, last_unmap: int) -> int:
    """The same VMA in another process, with nothing mapped, and the cuts after that Unmap to come. Returns its id."""
    copy = add_vma(fs, session, vma.inode, vma.pgoff, vma.length_pages, vma.access, vma.private)
    for start, end, _ in vma.removed or ():
        copy.remove(PageRange(start, end))
    copy.cuts = tuple(cut for cut in vma.cuts if cut.request_id > last_unmap)
    return copy.vma_id


def cuts(_fs: FileSystem, session: Session, _request: messages.Cuts) -> list[int]:
    flat: list[int] = []
    for vma in session.vmas.values():
        for cut in vma.cuts:
            flat += (vma.vma_id, cut.pages.start, cut.pages.length_pages)
    return flat


def _check_length(inode: Inode, pgoff: int, length_pages: int) -> None:
    if (pgoff + length_pages) * inode.page_size > OFFSET_BYTES_MAX:
        raise os_error(errno.EOVERFLOW)


def vma_of(session: Session, vma_id: int) -> Vma:
    vma = session.vmas.get(vma_id)
    if vma is None:
        raise os_error(errno.EINVAL, f"this process has no VMA {vma_id}")
    return vma


def msync(fs: FileSystem, session: Session, request: messages.Msync) -> None:
    """Stores are in the region already. Whether there were any is not known: where there may, they count as of now."""
    vma = vma_of(session, request.vma_id)
    if any(entry & Access.WRITE for _, _, entry in vma.page_table):
        vma.inode.modified(fs.now_ns)


def munmap(fs: FileSystem, session: Session, request: messages.Munmap) -> None:
    remove_vma(fs, vma_of(session, request.vma_id))


def munmap_range(fs: FileSystem, session: Session, request: messages.MunmapRange) -> Steps[None]:
    vma = vma_of(session, request.vma_id)
    pages = PageRange(request.pgoff, request.pgoff + request.length_pages)
    if not pages.length_pages or not vma.pgoff <= pages.start or pages.end > vma.end_pgoff:
        raise os_error(errno.EINVAL)
    return _without_faults(fs, vma, lambda: pages, lambda: vma.remove(pages))


def mremap(fs: FileSystem, session: Session, request: messages.Mremap) -> Steps[None]:
    vma = vma_of(session, request.vma_id)
    if not request.length_pages:
        raise os_error(errno.EINVAL)
    _check_length(vma.inode, vma.pgoff, request.length_pages)
    end_pgoff = vma.pgoff + request.length_pages

    def gone() -> PageRange:
        return PageRange(end_pgoff, max(vma.end_pgoff, end_pgoff))

    return _without_faults(fs, vma, gone, lambda: vma.resize(request.length_pages))


def _without_faults(fs: FileSystem, vma: Vma, lost: Callable[[], PageRange], change: Callable[[], None]) -> Steps[None]:
    """Change the VMA, so that it loses the pages that `lost` says then, and have its process drop them.

    No fault is under way meanwhile, so none is answered by a Map of pages that the VMA has no more (I7).
    """
    inode = vma.inode
    if granted := inode.invalidate_lock.acquire_exclusive():
        yield granted
    try:
        if vma.vma_id not in inode.mapping.i_mmap:
            raise os_error(errno.EINVAL, "the mapping has been closed meanwhile")
        gone = lost()
        if any(pinned.vma is vma and pinned.pages.overlaps(gone) for pinned in vma.session.pins.values()):
            raise os_error(errno.EBUSY, "the range is pinned")
        change()
        if gone.length_pages:
            yield from fs.unmapper.unmap_vma(vma, gone)
    finally:
        inode.invalidate_lock.release_exclusive()


def remove_vma(fs: FileSystem, vma: Vma) -> None:
    """Take the VMA out of the rmap. Precondition: its process has no translation of it, and takes none."""
    pins.unpin_vma(vma)
    del vma.session.vmas[vma.vma_id], vma.inode.mapping.i_mmap[vma.vma_id]
    fs.put(vma.inode)


def pin(fs: FileSystem, session: Session, request: messages.Pin) -> Steps[int]:
    vma = vma_of(session, request.vma_id)
    return pins.pin(fs, vma, PageRange(request.pgoff, request.pgoff + request.length_pages))


def unpin(_fs: FileSystem, session: Session, request: messages.Unpin) -> None:
    pinned = session.pins.get(request.pin_id)
    if pinned is None:
        raise os_error(errno.EINVAL, f"this process has no pin {request.pin_id}")
    pins.unpin(pinned.vma, request.pin_id)


def maps(fs: FileSystem, _session: Session, request: messages.Maps) -> list[dict[str, Any]]:
    """For each VMA: pid, evicted, vma_id, pgoff, length_pages, access, private, and mapped: (pgoff, length_pages,
    target, pfn, access) for each piece of its page table, flat. The last one's may go on in the next reply."""
    entries: list[dict[str, Any]] = []
    left = MAPPED_ENTRIES_MAX
    for vma in fs.lookup(request.name).mapping.i_mmap.values():  # by id: they are made in that order
        goes_on = vma.vma_id == request.vma_id and request.pgoff > 0
        if vma.vma_id < request.vma_id:
            continue
        pieces = list(islice(vma.page_table.pieces(request.pgoff if goes_on else 0, OFFSET_BYTES_MAX), left))
        if pieces or not goes_on:
            entries.append(_map_entry(vma, pieces))
            left -= len(pieces)
        if len(entries) >= LIST_ENTRIES_MAX or not left:
            break
    return entries


def _map_entry(vma: Vma, pieces: list[tuple[int, int, int]]) -> dict[str, Any]:
    mapped: list[int] = []
    for start, end, entry in pieces:
        mapped += (start, end - start, *pte_fields(entry))
    return {
        "pid": vma.session.pid,
        "evicted": vma.session.evicted,
        "vma_id": vma.vma_id,
        "pgoff": vma.pgoff,
        "length_pages": vma.length_pages,
        "access": int(vma.access),
        "private": vma.private,
        "mapped": mapped,
    }


Request = Callable[[FileSystem, Session, Any], Any]

REQUESTS: Final[dict[type[Any], Request]] = {
    messages.Open: open_file,
    messages.Close: close_file,
    messages.Stat: stat,
    messages.Fstat: fstat,
    messages.List: list_files,
    messages.Unlink: unlink,
    messages.Rename: rename,
    messages.Link: link,
    messages.Mmap: mmap,
    messages.Msync: msync,
    messages.Munmap: munmap,
    messages.MunmapRange: munmap_range,
    messages.Mremap: mremap,
    messages.Pin: pin,
    messages.Unpin: unpin,
    messages.Maps: maps,
    messages.Cuts: cuts,
    **FILE_REQUESTS,
}
