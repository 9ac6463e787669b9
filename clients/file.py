"""A file object: io.RawIOBase over a handle, with the position kept here.

It behaves as the file that `open(name, mode, buffering=0)` gives (io.FileIO), and raises the same exceptions for the
same mistakes. The position belongs to the object; a read or write holds its lock, so two threads that use one object
get one after the other what two system calls would give them.

A read or write of at most IO_CHUNK_BYTES_MAX is one message, and atomic. A longer one goes between the buffer and the
region's frames (`direct_io.py`); it is not atomic, and other processes may see a part of it.
"""

import errno
import io
import mmap
import operator
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from dax_mp import mmu
from dax_mp.clients import file_ranges
from dax_mp.clients.file_ranges import FileRanges, as_offset
from dax_mp.clients.handle import Handle
from dax_mp.clients.map_file import map_file
from dax_mp.clients.mapping import ACCESS_DEFAULT, Mapping
from dax_mp.clients.names import check_name
from dax_mp.clients.open_modes import Layer, parse_mode
from dax_mp.clients.status import Extent, FileStat
from dax_mp.errors import os_error
from dax_mp.limits import IO_CHUNK_BYTES_MAX, OFFSET_BYTES_MAX
from dax_mp.messages import OpenFlag

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from dax_mp.clients.session import Session

_FLAGS: Final = {
    "r": OpenFlag(0),
    "w": OpenFlag.CREATE | OpenFlag.TRUNCATE,
    "x": OpenFlag.CREATE | OpenFlag.EXCLUSIVE,
    "a": OpenFlag.CREATE,
}

LINE_CHUNK_BYTES: Final = 4096


class DaxFile(FileRanges):
    """An open file. `Session.open` makes one.

        >>> file = session.open("data", "w+")
        >>> file.truncate(1 << 30)  # a hole, which takes no block
        1073741824
        >>> file.pwrite(b"hello", 1 << 20)
        5
        >>> file.seek(0, dax_mp.SEEK_DATA), file.stat().blocks
        (1048576, 1)
        >>> file.read(5)
        b'hello'
        >>> file.punch_hole(0, 1 << 30)
        >>> file.pread(5, 1 << 20), file.stat().blocks
        (b'\\x00\\x00\\x00\\x00\\x00', 0)
        >>> file.close()

    Every method raises ValueError when it is closed, and OSError for what the coordinator refuses.
    """

    name: str

    def __init__(
        self, session: "Session", name: str, mode: str, ephemeral: bool = False, unnamed: bool = False
    ) -> None:
        self._handle: Handle | None = None
        parsed = parse_mode(mode)
        self.set_state(parsed.kind, parsed.updating, position_bytes=0)
        self._lock = threading.RLock()  # a signal handler may use the file in the middle of a use
        self.name = name
        self.layers: list[weakref.ref[Layer]] = []
        """What `Session.open` has put on it, the outermost first. For the library's own modules."""
        self._channel = session.channel
        flags = OpenFlag.TMPFILE if unnamed else _FLAGS[self._kind]
        flags |= OpenFlag.EPHEMERAL if ephemeral else OpenFlag(0)
        self._handle = Handle(session, name, flags)
        if self._kind == "a":
            self._position_bytes = self._handle.size_bytes()
        session.channel.holdings.add_file(self, self._handle)

    def set_state(self, kind: str, updating: bool, position_bytes: int) -> None:
        """kind: r, w, x or a. updating: with a plus. For this module."""
        self._kind = kind
        self._updating = updating
        self._readable = kind == "r" or updating
        self._writable = kind != "r" or updating
        self._position_bytes = position_bytes

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """As io.FileIO has it: rb, rb+, wb, xb, xb+, ab, ab+."""
        kind = "r" if self._kind == "w" and self._updating else self._kind
        return f"{kind}b+" if self._updating else f"{kind}b"

    @property
    def handle(self) -> Handle:
        """For the library's own modules."""
        return self._open()

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return self._open().size_bytes()

    def readable(self) -> bool:
        self._open()
        return self._readable

    def writable(self) -> bool:
        self._open()
        return self._writable

    def seekable(self) -> bool:
        self._open()
        return True

    def stat(self) -> FileStat:
        """The file's size, blocks and mappers; also when it has been unlinked."""
        return self._open().stat()

    def utime(self, ns: tuple[int, int] | None = None) -> None:
        """Set atime and mtime, in nanoseconds since the epoch; None: both to now, by the coordinator's clock.

        Raises OSError EINVAL for times that cannot be.
        """
        if ns is not None:
            ns = operator.index(ns[0]), operator.index(ns[1])
            if not 0 <= min(ns) <= max(ns) <= OFFSET_BYTES_MAX:
                raise os_error(errno.EINVAL, filename=self.name)
        self._open().utime(ns)

    def extents(self, unwritten: bool = False) -> list[Extent]:
        """Where the file has blocks, by offset. The rest of it is holes, and reads as such also where it is allocated.

        unwritten: with those extents, which `fallocate` and `zero_range` have made and nothing has been stored to.
        """
        extents = self._open().extents()
        return sorted(extents + self._open().extents(unwritten=True)) if unwritten else extents

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"mode {self.mode!r}"
        return f"<dax_mp.DaxFile {self.name!r}, {state}>"

    # --- reading and writing ---------------------------------------------------------------------------------------

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes, fewer only at the end of the file; all that is left for a negative size or None."""
        if size is None:
            return self.readall()
        length_bytes = operator.index(size)
        if length_bytes < 0:
            return self.readall()
        handle = self._open_for_reading()
        return mmu.locked(self._lock, self._read, handle, length_bytes)

    def readall(self) -> bytes:
        """All that is left."""
        handle = self._open_for_reading()
        return mmu.locked(self._lock, self._read, handle, OFFSET_BYTES_MAX)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Up to and with the next newline, `size` bytes at most. It is looked for in chunks, read anew each time."""
        limit_bytes = -1 if size is None else operator.index(size)
        return mmu.locked(self._lock, self._read_line, self._open_for_reading(), limit_bytes)

    def _read_line(self, handle: Handle, limit_bytes: int) -> bytes:
        line, chunk_bytes = bytearray(), LINE_CHUNK_BYTES
        while limit_bytes < 0 or len(line) < limit_bytes:
            wanted_bytes = chunk_bytes if limit_bytes < 0 else min(chunk_bytes, limit_bytes - len(line))
            data = file_ranges.read(handle, wanted_bytes, self._position_bytes + len(line))
            end = data.find(b"\n") + 1
            line += data[:end] if end else data
            if end or len(data) < wanted_bytes:
                break
            chunk_bytes = min(2 * chunk_bytes, IO_CHUNK_BYTES_MAX)
        self._position_bytes += len(line)
        return bytes(line)

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill the buffer; returns the number of bytes, fewer than its length only at the end of the file."""
        handle = self._open_for_reading()
        with _view_to_fill(buffer) as view:
            return mmu.locked(self._lock, self._fill, file_ranges.readinto, handle, view)

    def readv(self, buffers: "Sequence[WriteableBuffer]", /) -> int:
        """As `preadv`, at the position."""
        handle = self._open_for_reading()
        return mmu.locked(self._lock, self._fill, file_ranges.readv, handle, buffers)

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of it; in append mode at the end of the file. Returns the number of bytes.

        Raises OSError: ENOSPC, EFBIG. Of data longer than IO_CHUNK_BYTES_MAX a part may have been written then.
        """
        handle = self._open_for_writing()
        with file_ranges.byte_view(data) as view:
            mmu.locked(self._lock, self._store, file_ranges.write, handle, view)
            return len(view)

    def writev(self, buffers: "Sequence[ReadableBuffer]", /) -> int:
        """As `pwritev`, at the position; in append mode at the end of the file."""
        handle = self._open_for_writing()
        with ExitStack() as stack:
            views = [stack.enter_context(file_ranges.byte_view(buffer)) for buffer in buffers]
            mmu.locked(self._lock, self._store, file_ranges.writev, handle, views)
            return sum(map(len, views))

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position; returns it. whence: SEEK_SET, SEEK_CUR, SEEK_END, SEEK_DATA, SEEK_HOLE.

        Raises OSError: EINVAL for a position before the start, ENXIO where there is no data or hole (lseek(2)).
        """
        handle = self._open()
        return mmu.locked(self._lock, self._seek, handle, as_offset(offset), whence)

    def _seek(self, handle: Handle, offset_bytes: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            if offset_bytes < 0:
                raise os_error(errno.ENXIO, filename=self.name)
            self._position_bytes = handle.seek(offset_bytes, whence)
            return self._position_bytes
        if whence == os.SEEK_CUR:
            offset_bytes += self._position_bytes
        elif whence == os.SEEK_END:
            offset_bytes += handle.size_bytes()
        elif whence != os.SEEK_SET:
            raise os_error(errno.EINVAL, filename=self.name)
        if not 0 <= offset_bytes <= OFFSET_BYTES_MAX:
            raise os_error(errno.EINVAL, filename=self.name)
        self._position_bytes = offset_bytes
        return offset_bytes

    def tell(self) -> int:
        """The position in bytes."""
        self._open()
        return self._position_bytes

    # --- name, size, holes, durability -----------------------------------------------------------------------------

    def link(self, name: str | os.PathLike[str] | None = None, replace: bool = False) -> None:
        """Give a file that has no name (`Session.tmpfile`, or one that was unlinked) one; None: that it was opened by.

        replace: a file that has it is unlinked, not in the way.
        Raises FileExistsError, OSError EMLINK where the file has a name, and as `Session.open` for what is no name.
        """
        text = check_name(self.name if name is None else name)
        self._open().link(text, replace)
        self.name = text

    def truncate(self, size: int | None = None, /) -> int:
        """Make the file `size` bytes long (None: the position), by throwing away or by a hole. Returns the size.

        Returns when no process can see a page past the new end any more. Raises OSError: EINVAL, EFBIG.
        """
        handle = self._open_for_writing()
        size_bytes = self._position_bytes if size is None else as_offset(size)
        if size_bytes < 0:
            raise os_error(errno.EINVAL, filename=self.name)
        handle.truncate(size_bytes)
        return size_bytes

    def fsync(self) -> None:
        """Return when all that was written and stored is as durable as the device is."""
        self._open().fsync()

    def mmap(
        self,
        length: int = 0,
        offset: int = 0,
        access: int = ACCESS_DEFAULT,
        past_eof: bool = False,
        *,
        flags: int = mmap.MAP_SHARED,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
        trackfd: bool = True,
        populate: bool = False,
    ) -> Mapping:
        """Map `length` bytes from `offset` on, both in bytes. It stays mapped when the file is closed or unlinked.

        length: 0 is up to the end of the file. access: ACCESS_READ, ACCESS_WRITE, or ACCESS_COPY, whose stores are seen
        by this process alone; ACCESS_DEFAULT is what flags and prot say, as mmap.mmap has them. past_eof: the mapping
        may be longer than the file; an access past its end is a BusError until the file grows, and again after it
        shrinks. trackfd: False refuses the mapping's `size` and `resize`, as mmap.mmap does from Python 3.13 on; a
        mapping takes no descriptor either way. populate: map all pages of the file at once, as `Mapping.populate` does.
        Of flags those are accepted whose meaning is kept: MAP_SHARED, MAP_PRIVATE, MAP_POPULATE, MAP_NORESERVE,
        MAP_NONBLOCK, and those that mean nothing in Linux.
        Raises what mmap.mmap raises: ValueError for an empty file or a length past its end, OverflowError for negative
        or too large numbers, OSError EINVAL for an offset that is not a multiple of the page size, EOPNOTSUPP for
        other flags, PermissionError where the file's mode does not allow the access; OSError ENOMEM without address
        space or VMAs left.
        """
        handle = self._open()
        length, offset = as_offset(length), as_offset(offset)
        rights = self._readable, self._writable
        return map_file(handle, *rights, length, offset, access, past_eof, flags, prot, trackfd, populate)

    # --- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the file. Its mappings stay. May be called again."""
        if not self.closed:
            self.forget()
            self._channel.settle()

    def forget(self) -> None:
        """Close it here, and leave telling the coordinator to the next request, or to the session's end."""
        self._handle = None
        super().close()

    def __del__(self) -> None:
        if self.__dict__.get("_handle") is not None and not self.closed:
            self._dealloc_warn(self)
            self.forget()

    def _dealloc_warn(self, source: object) -> None:
        """A layer that was never closed says so by this, as it does to io.FileIO."""
        warnings.warn(f"unclosed file {source!r}", ResourceWarning, stacklevel=3, source=source)

    def inherit(self) -> None:
        """In a fork's child: the thread that held the lock is not here. The position is this process's own now."""
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, a file is its name: the copy is opened anew, at the same position, in a session of its process."""
        handle = self._open()
        name = handle.stat().name or self.name
        return _reopen, (handle.session, name, handle.ino, self._kind, self._updating, self._position_bytes)

    # --- checks ----------------------------------------------------------------------------------------------------

    def _open(self) -> Handle:
        """Raises before any lock is taken: in a forked child, a thread that is not there may hold it for ever."""
        handle = self._handle
        if handle is None:
            raise ValueError("I/O operation on closed file")
        self._channel.check()
        return handle

    def _open_for_writing(self) -> Handle:
        handle = self._open()
        if not self._writable:
            raise io.UnsupportedOperation("File not open for writing")
        return handle

    def _open_for_reading(self) -> Handle:
        handle = self._open()
        if not self._readable:
            raise io.UnsupportedOperation("File not open for reading")
        return handle

    def _read(self, handle: Handle, length_bytes: int) -> bytes:
        """Up to `length_bytes` from the position on. Precondition of this and the next two: the lock is held."""
        data = file_ranges.read(handle, length_bytes, self._position_bytes)
        self._position_bytes += len(data)
        return data

    def _fill(self, read: Callable[[Handle, Any, int], int], handle: Handle, target: Any) -> int:
        filled_bytes = read(handle, target, self._position_bytes)
        self._position_bytes += filled_bytes
        return filled_bytes

    def _store(self, write: Callable[[Handle, Any, int, bool], int], handle: Handle, source: Any) -> None:
        self._position_bytes = write(handle, source, self._position_bytes, self._kind == "a")


def _view_to_fill(buffer: "WriteableBuffer") -> memoryview:
    """The buffer's memory; what cannot be filled is a TypeError, as for io.FileIO."""
    try:
        return file_ranges.writable_byte_view(buffer)
    except BufferError:
        kind = type(buffer).__name__
        text = f"readinto() argument must be a contiguous read-write bytes-like object, not {kind}"
        raise TypeError(text) from None


def _reopen(session: "Session", name: str, ino: int, kind: str, updating: bool, position_bytes: int) -> DaxFile:
    """Unpickle a file. Raises FileNotFoundError where it has no name any more, also when another file has that name."""
    file = DaxFile(session, name, "r+")
    if file.stat().ino != ino:
        file.close()
        raise os_error(errno.ENOENT, filename=name)
    file.set_state(kind, updating, position_bytes)
    return file
