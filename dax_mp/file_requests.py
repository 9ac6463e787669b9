"""What a client may ask for by a handle about the contents of a file: one function a request, as in `requests.py`."""

import errno
from collections.abc import Callable
from itertools import chain
from typing import Any, Final

from dax_mp import copy_range, direct_io, messages, read_write, truncate
from dax_mp import fallocate as fallocate_
from dax_mp.errors import os_error
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import LIST_ENTRIES_MAX, OFFSET_BYTES_MAX, XATTRS_PER_FILE_MAX
from dax_mp.messages import FallocateMode, Whence
from dax_mp.session import Session
from dax_mp.transaction import Steps


def inode_of(session: Session, handle: int) -> Inode:
    """The file of that handle. Raises OSError EBADF."""
    inode = session.handles.get(handle)
    if inode is None:
        raise os_error(errno.EBADF)
    return inode


def set_size(fs: FileSystem, session: Session, request: messages.Truncate) -> Steps[None]:
    return truncate.truncate(fs, inode_of(session, request.handle), request.size_bytes)


def fallocate(fs: FileSystem, session: Session, request: messages.Fallocate) -> Steps[None]:
    inode, mode = inode_of(session, request.handle), FallocateMode(request.mode)
    return fallocate_.fallocate(fs, inode, mode, request.offset_bytes, request.length_bytes)


def copy(fs: FileSystem, session: Session, request: messages.CopyRange) -> Steps[int]:
    source, inode = inode_of(session, request.source_handle), inode_of(session, request.handle)
    return copy_range.copy_range(
        fs, source, request.source_offset_bytes, inode, request.offset_bytes, request.length_bytes
    )


def read(fs: FileSystem, session: Session, request: messages.Read) -> Steps[bytes]:
    return read_write.read(fs, inode_of(session, request.handle), request.offset_bytes, request.length_bytes)


def write(fs: FileSystem, session: Session, request: messages.Write) -> Steps[int]:
    offset_bytes = None if request.append else request.offset_bytes
    return read_write.write(fs, inode_of(session, request.handle), offset_bytes, request.data)


def seek(_fs: FileSystem, session: Session, request: messages.Seek) -> int:
    if request.whence not in (Whence.DATA, Whence.HOLE):
        raise os_error(errno.EINVAL)
    return read_write.seek(inode_of(session, request.handle), request.offset_bytes, Whence(request.whence))


def extents(_fs: FileSystem, session: Session, request: messages.Extents) -> list[int]:
    flat: list[int] = []
    inode = inode_of(session, request.handle)
    block_map = inode.unwritten if request.unwritten else inode.block_map
    for start, end, pfn in block_map.pieces(request.after_pgoff, OFFSET_BYTES_MAX):
        flat += (start, end - start, pfn)
        if len(flat) >= 3 * LIST_ENTRIES_MAX:
            break
    return flat


def begin_read(fs: FileSystem, session: Session, request: messages.BeginRead) -> Steps[list[Any]]:
    inode = inode_of(session, request.handle)
    io_id, pieces = yield from direct_io.begin_read(fs, session, inode, request.offset_bytes, request.length_bytes)
    return [io_id, list(chain.from_iterable(pieces))]


def begin_write(fs: FileSystem, session: Session, request: messages.BeginWrite) -> Steps[list[Any]]:
    inode = inode_of(session, request.handle)
    offset_bytes = None if request.append else request.offset_bytes
    io_id, start_bytes, pieces = yield from direct_io.begin_write(
        fs, session, inode, offset_bytes, request.length_bytes
    )
    return [io_id, start_bytes, int(fs.leases[io_id].changes_file), list(chain.from_iterable(pieces))]


def end_io(fs: FileSystem, session: Session, request: messages.EndIo) -> Steps[None]:
    return direct_io.end(fs, session, request.io_id, request.done_bytes)


def fsync(_fs: FileSystem, session: Session, request: messages.Fsync) -> None:
    inode_of(session, request.handle)  # stores are in the region already, and the region is as durable as it gets


def utime(fs: FileSystem, session: Session, request: messages.Utime) -> None:
    inode = inode_of(session, request.handle)
    inode.atime_ns = fs.now_ns if request.now else request.atime_ns
    inode.mtime_ns = fs.now_ns if request.now else request.mtime_ns
    inode.ctime_ns = fs.now_ns


def setxattr(fs: FileSystem, session: Session, request: messages.Setxattr) -> None:
    inode = inode_of(session, request.handle)
    xattrs = inode.xattrs
    if request.name not in xattrs and len(xattrs) >= XATTRS_PER_FILE_MAX:
        raise os_error(errno.ENOSPC, f"a file has at most {XATTRS_PER_FILE_MAX} attributes")
    xattrs[request.name] = request.value
    inode.ctime_ns = fs.now_ns


def getxattr(_fs: FileSystem, session: Session, request: messages.Getxattr) -> bytes:
    value = inode_of(session, request.handle).xattrs.get(request.name)
    if value is None:
        raise os_error(errno.ENODATA)
    return value


def listxattr(_fs: FileSystem, session: Session, request: messages.Listxattr) -> list[str]:
    return sorted(inode_of(session, request.handle).xattrs)


def removexattr(fs: FileSystem, session: Session, request: messages.Removexattr) -> None:
    inode = inode_of(session, request.handle)
    if inode.xattrs.pop(request.name, None) is None:
        raise os_error(errno.ENODATA)
    inode.ctime_ns = fs.now_ns


FILE_REQUESTS: Final[dict[type[Any], Callable[[FileSystem, Session, Any], Any]]] = {
    messages.Truncate: set_size,
    messages.Fallocate: fallocate,
    messages.CopyRange: copy,
    messages.Read: read,
    messages.Write: write,
    messages.BeginRead: begin_read,
    messages.BeginWrite: begin_write,
    messages.EndIo: end_io,
    messages.Seek: seek,
    messages.Extents: extents,
    messages.Fsync: fsync,
    messages.Utime: utime,
    messages.Setxattr: setxattr,
    messages.Getxattr: getxattr,
    messages.Listxattr: listxattr,
    messages.Removexattr: removexattr,
}
