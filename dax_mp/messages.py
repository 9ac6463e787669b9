"""The wire: every message, its fields and their limits.

A message is one msgpack array whose first element is its type. `encode` and `decode` are the only way in and out of
bytes; `decode` checks the type, the number of fields, and the type and range of each, and raises ProtocolError, so that
what reaches the state machine is well formed.

Two sockets a client, each a DEALER to a ROUTER of the coordinator:

- *pager* (native, `dax_mp/mmu/pager.c`): its ZeroMQ identity is the session's token. Everything about translations goes
  this way and in order: an Unmap can never overtake, or be overtaken by, a Map. All its fields are unsigned integers.
- *control* (Python): its identity is the session's token and one or more bytes of its own. Each request carries an id
  that its Reply or Error repeats.

Hello, PagerHello, Error and their numbers do not change between protocol versions: that is how two versions can tell
each other that they differ.
"""

from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import Any, Final, NamedTuple, TypeVar

import msgpack

from dax_mp.errors import ProtocolError
from dax_mp.limits import (
    IO_CHUNK_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    NAME_BYTES_MAX,
    OFFSET_BYTES_MAX,
    SEGMENTS_MAX,
)

PROTOCOL_VERSION: Final = 1
TOKEN_BYTES: Final = 16
"""A session's token: random, the name of its file in the runtime directory (in hex), and its pager's identity."""


class Access(IntFlag):
    """What a VMA or a fault may do, as PROT_READ and PROT_WRITE."""

    READ = 1
    WRITE = 2


class Target(IntEnum):
    """What a segment of a Map is backed by."""

    PMEM = 0
    """Frames of the PMem region."""
    DRAM = 1
    """Frames of the DRAM region: page-cache pages."""
    ZERO = 2
    """The kernel's zero page: private anonymous memory that is never written."""


class OpenFlag(IntFlag):
    CREATE = 1
    EXCLUSIVE = 2
    TRUNCATE = 4


class Whence(IntEnum):
    """As os.SEEK_DATA and os.SEEK_HOLE."""

    DATA = 3
    HOLE = 4


Check = int | Callable[[Any], bool]
"""What a field must be: an unsigned integer up to that, or what the function accepts."""


def _bytes(length_max: int) -> Check:
    return lambda value: type(value) is bytes and len(value) <= length_max


def _tuples(width: int, length_max: int) -> Check:
    """A flat array of unsigned integers, `width` of them to an entry."""

    def check(value: Any) -> bool:
        if type(value) is not list or len(value) % width or len(value) > width * length_max:
            return False
        return all(type(item) is int and 0 <= item <= OFFSET_BYTES_MAX for item in value)

    return check


def _name(value: Any) -> bool:
    return type(value) is str and 0 < len(value.encode("utf-8", "surrogatepass")) <= NAME_BYTES_MAX


def _text(value: Any) -> bool:
    return type(value) is str and len(value) <= 4096


def _anything(_value: Any) -> bool:
    return True  # the client reads it; the coordinator never decodes one


UINT: Final = OFFSET_BYTES_MAX
U32: Final = (1 << 32) - 1

_types: dict[int, tuple[type[Any], tuple[Check, ...]]] = {}
CODES: Final[dict[type[Any], int]] = {}
"""The type of each message, by its class."""

M = TypeVar("M", bound=type[Any])


def _register(code: int, *checks: Check) -> Callable[[M], M]:
    def register(cls: M) -> M:
        assert code not in _types, f"two messages of type {code}"
        CODES[cls] = code
        _types[code] = (cls, checks)
        return cls

    return register


# --- pager, client to coordinator ----------------------------------------------------------------------------------


@_register(1, U32)
class PagerHello(NamedTuple):
    """The first message of a pager: its session's file is locked, and Hello has been answered."""

    version: int


@_register(2, UINT, UINT, UINT, 1)
class Fault(NamedTuple):
    """A thread sleeps in the fault handler until this is answered by a Map or a FaultError with its id."""

    fault_id: int
    vma_id: int
    pgoff: int
    write: int


@_register(3, UINT)
class UnmapAck(NamedTuple):
    """The process has no translation left to any range of that Unmap."""

    request_id: int


@_register(4)
class Dropped(NamedTuple):
    """The answer to Evict: the process has no translation at all, and will ask for none."""


# --- pager, coordinator to client ----------------------------------------------------------------------------------


@_register(16, U32)
class PagerReady(NamedTuple):
    version: int


@_register(17, UINT, UINT, _tuples(5, SEGMENTS_MAX))
class Map(NamedTuple):
    """Map each segment, then let the thread go on.

    `segments`: five integers each, (pgoff, length_pages, Target, pfn, Access). pfn counts frames of the target region,
    and is 0 for ZERO.
    """

    fault_id: int
    vma_id: int
    segments: list[int]


@_register(18, UINT, UINT, UINT, UINT, U32)
class FaultError(NamedTuple):
    """There is nothing to map: a BusError with this errno for the pages from pgoff on."""

    fault_id: int
    vma_id: int
    pgoff: int
    length_pages: int
    errno: int


@_register(19, UINT, _tuples(3, SEGMENTS_MAX))
class Unmap(NamedTuple):
    """Drop every translation of these ranges, then acknowledge. `ranges`: (vma_id, pgoff, length_pages) each."""

    request_id: int
    ranges: list[int]


@_register(20, U32)
class Evict(NamedTuple):
    """The session is over, for this reason (errno): drop everything and answer Dropped."""

    errno: int


# --- control, client to coordinator --------------------------------------------------------------------------------


@_register(32, U32, U32)
class Hello(NamedTuple):
    """The first message of a control socket. Reply: the Welcome mapping (`Coordinator.welcome`)."""

    request_id: int
    version: int


@_register(33, U32)
class Bye(NamedTuple):
    """The process has dropped every translation; its session ends. Reply: None."""

    request_id: int


@_register(34, U32, _name, 7)
class Open(NamedTuple):
    """flags: OpenFlag. Reply: [handle, ino, size_bytes]. ENOENT, EEXIST, EINVAL (a bad name), EMFILE."""

    request_id: int
    name: str
    flags: int


@_register(35, U32, UINT)
class Close(NamedTuple):
    """Reply: None. EBADF."""

    request_id: int
    handle: int


@_register(36, U32, _name)
class Stat(NamedTuple):
    """Reply: a mapping with ino, name, size_bytes, blocks, nlink, mappers. ENOENT."""

    request_id: int
    name: str


@_register(37, U32, UINT)
class Fstat(NamedTuple):
    """Reply: as Stat. EBADF."""

    request_id: int
    handle: int


@_register(38, U32, _text)
class List(NamedTuple):
    """The files whose names come after `after`, by name. Reply: a list, as Stat, empty at the end."""

    request_id: int
    after: str


@_register(39, U32, _name)
class Unlink(NamedTuple):
    """Reply: None. ENOENT."""

    request_id: int
    name: str


@_register(40, U32, _name, _name)
class Rename(NamedTuple):
    """`new` is replaced if it is there. Reply: None. ENOENT, EINVAL."""

    request_id: int
    old: str
    new: str


@_register(41, U32, UINT, UINT)
class Truncate(NamedTuple):
    """Reply: None. EBADF, EFBIG."""

    request_id: int
    handle: int
    size_bytes: int


@_register(42, U32, UINT, UINT, UINT)
class PunchHole(NamedTuple):
    """Reply: None. EBADF, EINVAL (no length)."""

    request_id: int
    handle: int
    offset_bytes: int
    length_bytes: int


@_register(43, U32, UINT, UINT, IO_CHUNK_BYTES_MAX)
class Read(NamedTuple):
    """Reply: the bytes, fewer than asked for at the end of the file. EBADF."""

    request_id: int
    handle: int
    offset_bytes: int
    length_bytes: int


@_register(44, U32, UINT, OFFSET_BYTES_MAX, 1, _bytes(IO_CHUNK_BYTES_MAX))
class Write(NamedTuple):
    """With `append`, `offset_bytes` is ignored and the data goes to the end. Reply: the offset after the data.

    EBADF, ENOSPC, EFBIG. Either all is written or nothing.
    """

    request_id: int
    handle: int
    offset_bytes: int
    append: int
    data: bytes


@_register(45, U32, UINT, UINT, 4)
class Seek(NamedTuple):
    """whence: Whence. Reply: the offset. EBADF, EINVAL, ENXIO as lseek(2)."""

    request_id: int
    handle: int
    offset_bytes: int
    whence: int


@_register(46, U32, UINT, UINT)
class Extents(NamedTuple):
    """The extents from page `after_pgoff` on. Reply: flat, (pgoff, length_pages, pfn) each. EBADF."""

    request_id: int
    handle: int
    after_pgoff: int


@_register(47, U32, UINT, UINT, UINT, 3)
class Mmap(NamedTuple):
    """access: Access. Reply: the VMA's id. EBADF, EINVAL, ENOMEM (too many VMAs)."""

    request_id: int
    handle: int
    pgoff: int
    length_pages: int
    access: int


@_register(48, U32, UINT)
class Munmap(NamedTuple):
    """The process has dropped every translation of the VMA and ignores any that is on its way. Reply: None. EINVAL."""

    request_id: int
    vma_id: int


@_register(49, U32, UINT)
class Fsync(NamedTuple):
    """Reply: None, when all that was stored is as durable as the region is. EBADF."""

    request_id: int
    handle: int


@_register(50, U32, _name, UINT)
class Maps(NamedTuple):
    """The rmap of a file: the VMAs after `after_vma_id` (ids start at 1). Reply: a list (`requests.maps`), empty at the
    end. ENOENT.
    """

    request_id: int
    name: str
    after_vma_id: int


@_register(51, U32)
class Statfs(NamedTuple):
    """Reply: a mapping with the device's sizes in pages, and the counters of events."""

    request_id: int


# --- control, coordinator to client --------------------------------------------------------------------------------


@_register(64, U32, _anything)
class Reply(NamedTuple):
    request_id: int
    value: Any


@_register(65, U32, U32, _text)
class Error(NamedTuple):
    """request_id 0: the request could not be read, so its id is not known."""

    request_id: int
    errno: int
    text: str


PagerRequest = PagerHello | Fault | UnmapAck | Dropped
PagerOrder = PagerReady | Map | FaultError | Unmap | Evict
ControlRequest = (
    Hello
    | Bye
    | Open
    | Close
    | Stat
    | Fstat
    | List
    | Unlink
    | Rename
    | Truncate
    | PunchHole
    | Read
    | Write
    | Seek
    | Extents
    | Mmap
    | Munmap
    | Fsync
    | Maps
    | Statfs
)
ControlAnswer = Reply | Error
AnyMessage = PagerRequest | PagerOrder | ControlRequest | ControlAnswer


def encode(message: AnyMessage) -> bytes:
    """The message as bytes. Precondition: its fields keep to the schema (they are not checked again)."""
    packed: bytes = msgpack.packb((CODES[type(message)], *message))
    return packed


def decode(data: bytes) -> Any:
    """The message in `data`, of the class that its type names.

    Raises ProtocolError when it is not msgpack, not an array, of no known type, or when a field is missing, too many,
    of another type or out of range.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"a message of {len(data)} bytes")
    try:
        fields = msgpack.unpackb(data)
    except Exception as error:  # msgpack documents no closed list of what unpackb may raise on garbage
        raise ProtocolError(f"not a msgpack message: {type(error).__name__}") from error
    if type(fields) is not list or not fields or type(fields[0]) is not int or fields[0] not in _types:
        raise ProtocolError("not a message of this protocol")
    cls, checks = _types[fields[0]]
    if len(fields) != len(checks) + 1:
        raise ProtocolError(f"{cls.__name__} with {len(fields) - 1} fields, not {len(checks)}")
    for index, check in enumerate(checks, 1):
        field = fields[index]
        if not (type(field) is int and 0 <= field <= check if isinstance(check, int) else check(field)):
            raise ProtocolError(f"{cls.__name__}: field {index} is not as the schema has it")
    return cls(*fields[1:])
