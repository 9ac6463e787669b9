"""What a file can do at an offset, whatever its position: data, space, copies; and its attributes.

The names and mistakes are those of the functions of `os` (pread, preadv, posix_fallocate, copy_file_range, setxattr)
and of fallocate(2).
"""

import errno
import io
import operator
import pickle
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from dax_mp.clients import direct_io
from dax_mp.clients.handle import Handle
from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.errors import os_error
from dax_mp.limits import IO_CHUNK_BYTES_MAX, NAME_BYTES_MAX, OFFSET_BYTES_MAX, XATTR_BYTES_MAX
from dax_mp.messages import FallocateMode

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class FileRanges(io.RawIOBase):
    """The half of `DaxFile` that takes offsets.

    Every method raises ValueError when the file is closed, OSError EINVAL for a negative offset or a length that may
    not be, OverflowError for numbers that are no off_t, io.UnsupportedOperation where the mode does not allow it, and
    OSError for what the coordinator refuses.
    """

    name: str

    def _open(self) -> Handle:
        raise NotImplementedError

    def _open_for_reading(self) -> Handle:
        raise NotImplementedError

    def _open_for_writing(self) -> Handle:
        raise NotImplementedError

    # --- data ------------------------------------------------------------------------------------------------------

    def pread(self, length: int, offset: int, /) -> bytes:
        """At most `length` bytes from `offset` on, fewer only at the end of the file."""
        handle = self._open_for_reading()
        return read(handle, self._at_least_0(length), self._at_least_0(offset))

    def pwrite(self, data: "ReadableBuffer", offset: int, /) -> int:
        """Write all of it at `offset`. Returns the number of bytes. ENOSPC, EFBIG."""
        handle = self._open_for_writing()
        offset_bytes = self._at_least_0(offset)
        with byte_view(data) as view:
            write(handle, view, offset_bytes, False)
            return len(view)

    def preadv(self, buffers: "Sequence[WriteableBuffer]", offset: int, /) -> int:
        """Fill the buffers one after the other. Returns the number of bytes in all.

        Up to IO_CHUNK_BYTES_MAX in all are read at once; more than that in turns.
        """
        handle = self._open_for_reading()
        return readv(handle, buffers, self._at_least_0(offset))

    def pwritev(self, buffers: "Sequence[ReadableBuffer]", offset: int, /) -> int:
        """Write the buffers one after the other. Returns the number of bytes in all. As `preadv`."""
        handle = self._open_for_writing()
        offset_bytes = self._at_least_0(offset)
        return writev(handle, buffers, offset_bytes, False) - offset_bytes

    def copy_range(self, offset: int, target: "FileRanges", target_offset: int, length: int) -> int:
        """Copy `length` bytes of this file into `target`. Returns how many: fewer at its end, or on a full device.

        Up to IO_CHUNK_BYTES_MAX are copied at once; more in turns. A hole over a hole stays one. Raises OSError: EXDEV
        for a file of another session, EINVAL where the ranges overlap in one file, EFBIG; ENOSPC where nothing at all
        could be copied, and then nothing is changed.
        """
        source, destination = self._open_for_reading(), target._open_for_writing()
        if source.session is not destination.session:
            raise os_error(errno.EXDEV, filename=self.name)
        offset_bytes, target_offset_bytes = self._at_least_0(offset), self._at_least_0(target_offset)
        length_bytes = self._at_least_0(length)
        if source.ino == destination.ino and abs(offset_bytes - target_offset_bytes) < length_bytes:
            raise os_error(errno.EINVAL, "the ranges overlap", self.name)
        done_bytes = 0
        while done_bytes < length_bytes:
            chunk_bytes = min(length_bytes - done_bytes, IO_CHUNK_BYTES_MAX)
            try:
                copied_bytes = source.copy_range(
                    offset_bytes + done_bytes, destination, target_offset_bytes + done_bytes, chunk_bytes
                )
            except OSError as error:
                if done_bytes and error.errno == errno.ENOSPC:
                    break
                raise
            done_bytes += copied_bytes
            if copied_bytes < chunk_bytes:
                break
        return done_bytes

    # --- space -----------------------------------------------------------------------------------------------------

    def fallocate(self, offset: int, length: int, keep_size: bool = False) -> None:
        """Give the range blocks, which read as zero: no later store to it finds the device full.

        The file grows where the range reaches past its end, unless `keep_size`. ENOSPC: nothing is allocated.
        """
        self._fallocate(FallocateMode.KEEP_SIZE if keep_size else FallocateMode(0), offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Make these bytes read as zero, and free the blocks that lie wholly in them; the size stays."""
        self._fallocate(FallocateMode(PUNCH_HOLE), offset, length)

    def zero_range(self, offset: int, length: int, keep_size: bool = False) -> None:
        """Make these bytes read as zero, and give them blocks, as `fallocate`."""
        self._fallocate(
            FallocateMode.ZERO_RANGE | (FallocateMode.KEEP_SIZE if keep_size else FallocateMode(0)), offset, length
        )

    def collapse_range(self, offset: int, length: int) -> None:
        """Take the range out; what follows moves down. Whole pages, and not up to the end of the file: else EINVAL."""
        self._fallocate(FallocateMode.COLLAPSE_RANGE, offset, length)

    def insert_range(self, offset: int, length: int) -> None:
        """Put a hole in; what was there moves up. Whole pages, and before the end of the file: else EINVAL."""
        self._fallocate(FallocateMode.INSERT_RANGE, offset, length)

    def _fallocate(self, mode: FallocateMode, offset: int, length: int) -> None:
        handle = self._open_for_writing()
        offset_bytes, length_bytes = self._at_least_0(offset), self._at_least_0(length)
        if not length_bytes:
            raise os_error(errno.EINVAL, filename=self.name)
        handle.fallocate(int(mode), offset_bytes, length_bytes)

    # --- attributes ------------------------------------------------------------------------------------------------

    def setxattr(self, attribute: str, value: "ReadableBuffer") -> None:
        """Keep a value with the file, under a name of its own. Raises OSError: E2BIG, ERANGE, ENOSPC (too many)."""
        handle = self._open_for_writing()
        data = bytes(value)
        if len(data) > XATTR_BYTES_MAX:
            raise os_error(errno.E2BIG, filename=self.name)
        handle.setxattr(self._attribute(attribute), data)

    def getxattr(self, attribute: str) -> bytes:
        """The value. Raises OSError ENODATA where there is none."""
        return self._open().getxattr(self._attribute(attribute))

    def listxattr(self) -> list[str]:
        """The names, in order."""
        return self._open().listxattr()

    def removexattr(self, attribute: str) -> None:
        """Forget it. Raises OSError ENODATA where there is none."""
        self._open_for_writing().removexattr(self._attribute(attribute))

    def _attribute(self, attribute: str) -> str:
        if not isinstance(attribute, str):
            raise TypeError(f"an attribute's name must be str, not {type(attribute).__name__}")
        if "\0" in attribute:
            raise ValueError("embedded null byte")
        if not 0 < len(attribute.encode()) <= NAME_BYTES_MAX:
            raise os_error(errno.ERANGE, filename=self.name)
        return attribute

    def _at_least_0(self, value: int) -> int:
        offset_bytes = as_offset(value)
        if offset_bytes < 0:
            raise os_error(errno.EINVAL, filename=self.name)
        return offset_bytes


def read(handle: Handle, length_bytes: int, offset_bytes: int) -> bytes:
    """Up to `length_bytes`, fewer at the end of the file."""
    if length_bytes <= IO_CHUNK_BYTES_MAX:
        return handle.read(offset_bytes, length_bytes) if length_bytes else b""
    length_bytes = min(length_bytes, max(0, handle.size_bytes() - offset_bytes))
    if not length_bytes:
        return b""
    buffer = io.BytesIO()  # what gives bytes of what was filled in place, without copying it
    buffer.seek(length_bytes - 1)
    buffer.write(b"\0")
    with buffer.getbuffer() as view:
        filled_bytes = direct_io.readinto(handle, view, offset_bytes)
    buffer.truncate(filled_bytes)
    return buffer.getvalue()


def readinto(handle: Handle, view: memoryview, offset_bytes: int) -> int:
    """Fill the view. Returns how much there was."""
    if len(view) > IO_CHUNK_BYTES_MAX:
        return direct_io.readinto(handle, view, offset_bytes)
    data = handle.read(offset_bytes, len(view)) if view else b""
    view[: len(data)] = data
    return len(data)


def write(handle: Handle, view: memoryview, offset_bytes: int, append: bool) -> int:
    """Write all of the view. Returns the offset after it."""
    if not append and offset_bytes + len(view) > OFFSET_BYTES_MAX:
        raise os_error(errno.EFBIG, filename=handle.name)
    if len(view) > IO_CHUNK_BYTES_MAX:
        return direct_io.write(handle, view, offset_bytes, append)
    return handle.write(offset_bytes, bytes(view), append) if view else offset_bytes


def readv(handle: Handle, buffers: "Sequence[WriteableBuffer]", offset_bytes: int) -> int:
    """Fill the buffers one after the other; what fits into one message is read at once."""
    with ExitStack() as stack:
        views = [stack.enter_context(writable_byte_view(buffer)) for buffer in buffers]
        total_bytes = sum(map(len, views))
        if total_bytes <= IO_CHUNK_BYTES_MAX:
            data = read(handle, total_bytes, offset_bytes)
            position = 0
            for view in views:
                part = data[position : position + len(view)]
                view[: len(part)] = part
                position += len(part)
            return len(data)
        done_bytes = 0
        for view in views:
            filled_bytes = readinto(handle, view, offset_bytes + done_bytes)
            done_bytes += filled_bytes
            if filled_bytes < len(view):
                break
        return done_bytes


def writev(handle: Handle, buffers: "Sequence[ReadableBuffer]", offset_bytes: int, append: bool) -> int:
    """Write the buffers one after the other; what fits into one message at once. Returns the offset after them."""
    with ExitStack() as stack:
        views = [stack.enter_context(byte_view(buffer)) for buffer in buffers]
        if sum(map(len, views)) <= IO_CHUNK_BYTES_MAX:
            with memoryview(b"".join(views)) as joined:
                return write(handle, joined, offset_bytes, append)
        for view in views:
            offset_bytes = write(handle, view, offset_bytes, append)
        return offset_bytes


def as_offset(value: int) -> int:
    """`value` as an off_t. Raises OverflowError, TypeError."""
    offset_bytes = operator.index(value)
    if not -OFFSET_BYTES_MAX - 1 <= offset_bytes <= OFFSET_BYTES_MAX:
        raise OverflowError("Python int too large to convert to a file offset")
    return offset_bytes


def byte_view(buffer: "ReadableBuffer") -> memoryview:
    """The buffer's memory as bytes, whatever its format and shape. Raises TypeError, BufferError."""
    with memoryview(buffer) as view:
        if not view.c_contiguous:
            raise BufferError("memoryview: underlying buffer is not C-contiguous")
    return pickle.PickleBuffer(buffer).raw()


def writable_byte_view(buffer: "WriteableBuffer") -> memoryview:
    """The same for a buffer that is to be filled. Raises TypeError, BufferError."""
    view = byte_view(buffer)
    if view.readonly:
        raise BufferError("Object is not writable.")
    return view
