"""What a client may ask for on its control socket: one function a request.

Each takes the file system, the session and the request, and returns the reply's value, or, when it may have to wait,
the steps that lead to it. An OSError becomes an Error reply; nothing else is expected to be raised.
"""

import errno
from collections.abc import Callable, Generator
from itertools import islice
from typing import Any, Final

from dax_mp import messages, read_write, truncate
from dax_mp.address_space import Vma, pte_fields
from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import HANDLES_PER_SESSION_MAX, LIST_ENTRIES_MAX, OFFSET_BYTES_MAX, VMAS_PER_SESSION_MAX
from dax_mp.messages import Access, OpenFlag, Whence
from dax_mp.session import Session
from dax_mp.transaction import Steps

MAPPED_ENTRIES_MAX: Final = 4096
"""Page-table pieces that one reply to Maps gives; of a VMA that has more, the first ones."""


def _inode(session: Session, handle: int) -> Inode:
    inode = session.handles.get(handle)
    if inode is None:
        raise os_error(errno.EBADF)
    return inode


def open_file(fs: FileSystem, session: Session, request: messages.Open) -> Steps[list[int]]:
    if len(session.handles) >= HANDLES_PER_SESSION_MAX:
        raise os_error(errno.EMFILE, filename=request.name)
    flags = OpenFlag(request.flags)
    inode = fs.names.get(request.name)
    if inode is None:
        if OpenFlag.CREATE not in flags:
            raise os_error(errno.ENOENT, filename=request.name)
        inode = fs.create(request.name)
    elif OpenFlag.EXCLUSIVE in flags:
        raise os_error(errno.EEXIST, filename=request.name)
    fs.get(inode)
    if OpenFlag.TRUNCATE in flags:
        yield from truncate.truncate(fs, inode, 0)
    if session.ended:  # while the truncate waited; a handle of it would never be closed
        fs.put(inode)
        raise os_error(errno.ESTALE)
    handle = session.next_handle
    session.next_handle += 1
    session.handles[handle] = inode
    return [handle, inode.ino, inode.size_bytes]


def close_file(fs: FileSystem, session: Session, request: messages.Close) -> None:
    inode = _inode(session, request.handle)
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
        "blocks": inode.block_map.total(),
        "nlink": int(inode.name is not None),
        "mappers": [{"pid": session.pid, "vmas": vmas} for session, vmas in vmas_of.items()],
    }


def stat(fs: FileSystem, _session: Session, request: messages.Stat) -> dict[str, Any]:
    return _stat(fs.lookup(request.name))


def fstat(_fs: FileSystem, session: Session, request: messages.Fstat) -> dict[str, Any]:
    return _stat(_inode(session, request.handle))


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
    fs.rename(request.old, request.new)


def set_size(fs: FileSystem, session: Session, request: messages.Truncate) -> Steps[None]:
    return truncate.truncate(fs, _inode(session, request.handle), request.size_bytes)


def fallocate(fs: FileSystem, session: Session, request: messages.Fallocate) -> Steps[None]:
    if request.mode != PUNCH_HOLE:
        raise os_error(errno.EOPNOTSUPP)
    return truncate.punch_hole(fs, _inode(session, request.handle), request.offset_bytes, request.length_bytes)


def read(fs: FileSystem, session: Session, request: messages.Read) -> Steps[bytes]:
    return read_write.read(fs, _inode(session, request.handle), request.offset_bytes, request.length_bytes)


def write(fs: FileSystem, session: Session, request: messages.Write) -> Steps[int]:
    offset_bytes = None if request.append else request.offset_bytes
    return read_write.write(fs, _inode(session, request.handle), offset_bytes, request.data)


def seek(_fs: FileSystem, session: Session, request: messages.Seek) -> int:
    if request.whence not in (Whence.DATA, Whence.HOLE):
        raise os_error(errno.EINVAL)
    return read_write.seek(_inode(session, request.handle), request.offset_bytes, Whence(request.whence))


def extents(_fs: FileSystem, session: Session, request: messages.Extents) -> list[int]:
    flat: list[int] = []
    for start, end, pfn in _inode(session, request.handle).block_map.pieces(request.after_pgoff, OFFSET_BYTES_MAX):
        flat += (start, end - start, pfn)
        if len(flat) >= 3 * LIST_ENTRIES_MAX:
            break
    return flat


def mmap(fs: FileSystem, session: Session, request: messages.Mmap) -> int:
    inode = _inode(session, request.handle)
    access = Access(request.access)
    if not request.length_pages or Access.READ not in access:
        raise os_error(errno.EINVAL)
    if (request.pgoff + request.length_pages) * inode.page_size > OFFSET_BYTES_MAX:
        raise os_error(errno.EOVERFLOW)
    if len(session.vmas) >= VMAS_PER_SESSION_MAX:
        raise os_error(errno.ENOMEM)
    vma = Vma(fs.next_vma_id(), session, fs.get(inode), request.pgoff, request.length_pages, access)
    session.vmas[vma.vma_id] = inode.mapping.i_mmap[vma.vma_id] = vma
    return vma.vma_id


def munmap(fs: FileSystem, session: Session, request: messages.Munmap) -> None:
    vma = session.vmas.get(request.vma_id)
    if vma is None:
        raise os_error(errno.EINVAL, f"this process has no VMA {request.vma_id}")
    remove_vma(fs, vma)


def remove_vma(fs: FileSystem, vma: Vma) -> None:
    """Take the VMA out of the rmap. Precondition: its process has no translation of it, and takes none."""
    del vma.session.vmas[vma.vma_id], vma.inode.mapping.i_mmap[vma.vma_id]
    fs.put(vma.inode)


def fsync(_fs: FileSystem, session: Session, request: messages.Fsync) -> None:
    _inode(session, request.handle)  # stores are in the region already, and the region is as durable as it gets


def maps(fs: FileSystem, _session: Session, request: messages.Maps) -> list[dict[str, Any]]:
    """For each VMA: pid, evicted, vma_id, pgoff, length_pages, access, and mapped: (pgoff, length_pages, target, pfn,
    access) for each piece of its page table, flat."""
    entries: list[dict[str, Any]] = []
    pieces = 0
    for vma in fs.lookup(request.name).mapping.i_mmap.values():  # by id: they are made in that order
        if vma.vma_id <= request.after_vma_id:
            continue
        entries.append(_map_entry(vma))
        pieces += 1 + len(vma.page_table)
        if len(entries) >= LIST_ENTRIES_MAX or pieces >= MAPPED_ENTRIES_MAX:
            break
    return entries


def _map_entry(vma: Vma) -> dict[str, Any]:
    mapped: list[int] = []
    for start, end, entry in islice(vma.page_table, MAPPED_ENTRIES_MAX):
        mapped += (start, end - start, *pte_fields(entry))
    return {
        "pid": vma.session.pid,
        "evicted": vma.session.evicted,
        "vma_id": vma.vma_id,
        "pgoff": vma.pgoff,
        "length_pages": vma.length_pages,
        "access": int(vma.access),
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
    messages.Truncate: set_size,
    messages.Fallocate: fallocate,
    messages.Read: read,
    messages.Write: write,
    messages.Seek: seek,
    messages.Extents: extents,
    messages.Mmap: mmap,
    messages.Munmap: munmap,
    messages.Fsync: fsync,
    messages.Maps: maps,
}


def perform(fs: FileSystem, session: Session, request: messages.ControlRequest) -> Steps[Any]:
    """Carry out a request to its end. Returns the reply's value; raises OSError."""
    result = REQUESTS[type(request)](fs, session, request)
    if isinstance(result, Generator):
        return (yield from result)
    return result
