"""The messages of the control sockets: what a client's library asks for, and the answers. Those about VMAs are in
`vma_messages.py`.

A control socket's ZeroMQ identity is the session's token and one or more bytes of its own. Each request carries an id
that its Reply or Error repeats.
"""

from enum import IntEnum, IntFlag
from typing import Any, Final, NamedTuple

from dax_mp import schema
from dax_mp.limits import IO_CHUNK_BYTES_MAX, IO_LEASE_BYTES_MAX, OFFSET_BYTES_MAX, XATTR_BYTES_MAX
from dax_mp.vma_messages import VmaRequest


class OpenFlag(IntFlag):
    CREATE = 1
    EXCLUSIVE = 2
    TRUNCATE = 4
    EPHEMERAL = 8
    """A file that this creates loses its name when its last user is gone."""
    TMPFILE = 16
    """A new file without a name, as O_TMPFILE of open(2), whatever files there are: Link gives it one."""


class FallocateMode(IntFlag):
    """As FALLOC_FL_* of fallocate(2), with its numbers. 0 allocates."""

    KEEP_SIZE = 1
    PUNCH_HOLE = 2
    COLLAPSE_RANGE = 8
    ZERO_RANGE = 16
    INSERT_RANGE = 32


PUNCH_HOLE: Final = int(FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE)
"""The mode that punches a hole: fallocate(2) refuses one without KEEP_SIZE."""


class RenameFlag(IntFlag):
    """As RENAME_* of renameat2(2)."""

    NOREPLACE = 1


class Whence(IntEnum):
    """As os.SEEK_DATA and os.SEEK_HOLE."""

    DATA = 3
    HOLE = 4


# --- client to coordinator --------------------------------------------------------------------------------


@schema.register(32, schema.U32, schema.U32)
class Hello(NamedTuple):
    """The first message of a control socket. Reply: the Welcome mapping (`Coordinator.welcome`)."""

    request_id: int
    version: int


@schema.register(33, schema.U32)
class Bye(NamedTuple):
    """The process has dropped every translation; its session ends. Reply: None."""

    request_id: int


@schema.register(34, schema.U32, schema.name, 31)
class Open(NamedTuple):
    """flags: OpenFlag. Reply: [handle, ino, size_bytes]. ENOENT, EEXIST, EINVAL (a bad name), EMFILE."""

    request_id: int
    name: str
    flags: int


@schema.register(35, schema.U32, schema.UINT)
class Close(NamedTuple):
    """Reply: None. EBADF."""

    request_id: int
    handle: int


@schema.register(36, schema.U32, schema.name)
class Stat(NamedTuple):
    """Reply: a mapping with ino, name, size_bytes, blocks, nlink, atime_ns, mtime_ns, ctime_ns, mappers. ENOENT."""

    request_id: int
    name: str


@schema.register(37, schema.U32, schema.UINT)
class Fstat(NamedTuple):
    """Reply: as Stat. EBADF."""

    request_id: int
    handle: int


@schema.register(38, schema.U32, schema.text)
class List(NamedTuple):
    """The files whose names come after `after`, by name. Reply: a list, as Stat, empty at the end."""

    request_id: int
    after: str


@schema.register(39, schema.U32, schema.name)
class Unlink(NamedTuple):
    """Reply: None. ENOENT."""

    request_id: int
    name: str


@schema.register(40, schema.U32, schema.name, schema.name, 1)
class Rename(NamedTuple):
    """flags: RenameFlag; with none of them `new` is replaced if it is there. Reply: None. ENOENT, EEXIST, EINVAL."""

    request_id: int
    old: str
    new: str
    flags: int


@schema.register(97, schema.U32, schema.UINT, schema.name, 1)
class Link(NamedTuple):
    """Give a file that has no name one, as linkat(2) does. flags: as Rename.

    Reply: None. EBADF, EEXIST, EINVAL, EMLINK (it has a name).
    """

    request_id: int
    handle: int
    name: str
    flags: int


@schema.register(41, schema.U32, schema.UINT, schema.UINT)
class Truncate(NamedTuple):
    """Reply: None. EBADF, EFBIG."""

    request_id: int
    handle: int
    size_bytes: int


@schema.register(42, schema.U32, schema.UINT, 63, schema.UINT, schema.UINT)
class Fallocate(NamedTuple):
    """mode: FallocateMode. Reply: None. EBADF, EINVAL, EFBIG, ENOSPC, EBUSY (a pin), EOPNOTSUPP (no such mode)."""

    request_id: int
    handle: int
    mode: int
    offset_bytes: int
    length_bytes: int


@schema.register(43, schema.U32, schema.UINT, schema.UINT, IO_CHUNK_BYTES_MAX)
class Read(NamedTuple):
    """Reply: the bytes, fewer than asked for at the end of the file. EBADF."""

    request_id: int
    handle: int
    offset_bytes: int
    length_bytes: int


@schema.register(44, schema.U32, schema.UINT, OFFSET_BYTES_MAX, 1, schema.data(IO_CHUNK_BYTES_MAX))
class Write(NamedTuple):
    """With `append`, `offset_bytes` is ignored and the data goes to the end. Reply: the offset after the data.

    EBADF, ENOSPC, EFBIG. Either all is written or nothing.
    """

    request_id: int
    handle: int
    offset_bytes: int
    append: int
    data: bytes


@schema.register(45, schema.U32, schema.UINT, schema.UINT, 4)
class Seek(NamedTuple):
    """whence: Whence. Reply: the offset. EBADF, EINVAL, ENXIO as lseek(2)."""

    request_id: int
    handle: int
    offset_bytes: int
    whence: int


@schema.register(46, schema.U32, schema.UINT, schema.UINT, 1)
class Extents(NamedTuple):
    """The extents from page `after_pgoff` on; unwritten: those that read as holes, else the others.

    Reply: flat, (pgoff, length_pages, pfn) each. EBADF.
    """

    request_id: int
    handle: int
    after_pgoff: int
    unwritten: int = 0


@schema.register(49, schema.U32, schema.UINT)
class Fsync(NamedTuple):
    """Reply: None, when all that was stored is as durable as the region is. EBADF."""

    request_id: int
    handle: int


@schema.register(50, schema.U32, schema.name, schema.UINT, schema.UINT)
class Maps(NamedTuple):
    """The rmap of a file: the VMAs from `vma_id` on (ids start at 1); of that one what it has mapped from `pgoff` on.

    It is left out where that is nothing and pgoff not 0. Reply: a list (`requests.maps`), empty at the end. ENOENT.
    """

    request_id: int
    name: str
    vma_id: int
    pgoff: int


@schema.register(51, schema.U32)
class Statfs(NamedTuple):
    """Reply: a mapping with the device's sizes in pages, and the counters of events."""

    request_id: int


@schema.register(52, schema.U32, schema.UINT, schema.UINT, schema.UINT, schema.UINT, IO_CHUNK_BYTES_MAX)
class CopyRange(NamedTuple):
    """As copy_file_range(2). Reply: the bytes copied, fewer at the source's end or on a full device.

    EBADF, EINVAL, ENOSPC.
    """

    request_id: int
    source_handle: int
    source_offset_bytes: int
    handle: int
    offset_bytes: int
    length_bytes: int


@schema.register(53, schema.U32, schema.UINT, schema.UINT, 1, IO_LEASE_BYTES_MAX)
class BeginWrite(NamedTuple):
    """Lend the frames of this range to the process, which stores into them itself and then says EndIo.

    Until then no other read, write or change of size of the file goes on. With `append`, `offset_bytes` is ignored.
    Reply: [io_id, offset_bytes, whether EndIo will have something to do, flat (offset in the region, length) in bytes];
    they may add up to less than was asked for. EBADF, ENOSPC, EFBIG.
    """

    request_id: int
    handle: int
    offset_bytes: int
    append: int
    length_bytes: int


@schema.register(54, schema.U32, schema.UINT, schema.UINT, IO_LEASE_BYTES_MAX)
class BeginRead(NamedTuple):
    """Lend the frames of this range to the process, to be loaded from. EndIo ends it.

    Reply: [io_id, flat (offset in the region, length) in bytes]; offset 0 is a hole; shorter at the end of the file.
    EBADF.
    """

    request_id: int
    handle: int
    offset_bytes: int
    length_bytes: int


@schema.register(55, schema.U32, schema.UINT, IO_LEASE_BYTES_MAX)
class EndIo(NamedTuple):
    """The process does not touch the lent frames any more. done_bytes: how many, from the first on, it has stored.

    Reply: None. EINVAL (no such io_id).
    """

    request_id: int
    io_id: int
    done_bytes: int


@schema.register(98, schema.U32, schema.UINT, 1, schema.UINT, schema.UINT)
class Utime(NamedTuple):
    """Set the file's times, as utimensat(2); now: to now, whatever the numbers say. Reply: None. EBADF."""

    request_id: int
    handle: int
    now: int
    atime_ns: int
    mtime_ns: int


@schema.register(61, schema.U32, schema.UINT, schema.name, schema.data(XATTR_BYTES_MAX))
class Setxattr(NamedTuple):
    """Keep a value with the file. Reply: None. EBADF, ENOSPC (too many)."""

    request_id: int
    handle: int
    name: str
    value: bytes


@schema.register(62, schema.U32, schema.UINT, schema.name)
class Getxattr(NamedTuple):
    """Reply: the value. EBADF, ENODATA."""

    request_id: int
    handle: int
    name: str


@schema.register(63, schema.U32, schema.UINT)
class Listxattr(NamedTuple):
    """Reply: the names, in order. EBADF."""

    request_id: int
    handle: int


@schema.register(96, schema.U32, schema.UINT, schema.name)
class Removexattr(NamedTuple):
    """Reply: None. EBADF, ENODATA."""

    request_id: int
    handle: int
    name: str


# --- coordinator to client --------------------------------------------------------------------------------


@schema.register(64, schema.U32, schema.anything)
class Reply(NamedTuple):
    request_id: int
    value: Any


@schema.register(65, schema.U32, schema.U32, schema.text)
class Error(NamedTuple):
    """request_id 0: the request could not be read, so its id is not known."""

    request_id: int
    errno: int
    text: str


FileRequest = (
    Hello
    | Bye
    | Open
    | Close
    | Stat
    | Fstat
    | List
    | Unlink
    | Rename
    | Link
    | Truncate
    | Fallocate
    | Read
    | Write
    | Seek
    | Extents
    | Fsync
    | Maps
    | Statfs
    | CopyRange
    | BeginWrite
    | BeginRead
    | EndIo
    | Utime
    | Setxattr
    | Getxattr
    | Listxattr
    | Removexattr
)
ControlRequest = FileRequest | VmaRequest
ControlAnswer = Reply | Error
