"""A mapping: a part of a file as memory, with the interface of mmap.mmap.

`mmu.Window` is the memory: the address space, the buffer protocol, slices, faults. `MappingCursor` makes it like a
file. This adds what makes it a mapping of a file: the VMA at the coordinator, which keeps the file alive, and the
handle of the file, shared with the file object, which may be closed before the mapping is (as the kernel's VMA keeps
its struct file).

The end of one, in order: the window drops its translations (its address range stays out of use); only then may the
coordinator forget the VMA (Munmap), since from then on it no longer tells this process to unmap anything of it. That
order holds in the destructor too: see `holdings.py`.
"""

import errno
import mmap
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from dax_mp import messages, mmu
from dax_mp.clients.bus_error import BusError
from dax_mp.clients.lane import Call, Claim
from dax_mp.clients.mapping_cursor import MappingCursor, as_c_int, as_ssize
from dax_mp.clients.page_table import PageTableEntry, read_page_table
from dax_mp.clients.pin import Pin
from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.errors import os_error

if TYPE_CHECKING:
    from dax_mp.clients.channel import Channel
    from dax_mp.clients.handle import Handle
    from dax_mp.clients.lane import RequestType

ACCESS_DEFAULT: Final = mmap.ACCESS_DEFAULT
ACCESS_READ: Final = mmap.ACCESS_READ
ACCESS_WRITE: Final = mmap.ACCESS_WRITE
ACCESS_COPY: Final = mmap.ACCESS_COPY

_MADVICES: Final = frozenset(value for name, value in vars(mmap).items() if name.startswith("MADV_"))


class Mapping(MappingCursor):
    """Bytes `offset_bytes` to `offset_bytes + len(mapping)` of a file. `DaxFile.mmap` makes one.

    It has the interface of mmap.mmap, buffer protocol included (memoryview, numpy.frombuffer, struct, ctypes), and
    raises the same exceptions for the same mistakes. An access that has nothing to map raises BusError and never ends
    the process.

        >>> file = session.open("mapped", "w+")
        >>> file.truncate(1000)
        1000
        >>> mapping = file.mmap()
        >>> mapping.write(b"one\\ntwo\\n")
        8
        >>> mapping[0], mapping[4:7], mapping.find(b"two", 0), len(mapping)
        (111, b'two', 4, 1000)
        >>> view = memoryview(mapping)
        >>> mapping.resize(1 << 20)  # the file too; and the view stays valid
        >>> bytes(view[:3]), file.size
        (b'one', 1048576)
        >>> view.release(); mapping.close(); file.close()
    """

    def __init__(self, handle: "Handle", vma_id: int, offset_bytes: int, length_bytes: int, access: int) -> None:
        session = handle.session
        pgoff = offset_bytes // session.page_size
        writable, private = access in (ACCESS_WRITE, ACCESS_COPY), access == ACCESS_COPY
        super().__init__(session.pager, vma_id, pgoff, length_bytes, writable, private)
        self._handle: Handle | None = handle
        self._channel = session.channel
        self.inherit()
        self.name = handle.name
        """The file's name when it was opened."""
        self.offset_bytes = offset_bytes
        self.access = access
        self.trackfd = True
        """Are `size` and `resize` allowed?"""
        session.channel.holdings.add_mapping(self)

    def inherit(self) -> None:
        """Also in a fork's child: a thread that held the lock is not here."""
        self._resizing = threading.RLock()  # a signal handler may resize it in the middle of a resize

    def close(self) -> None:
        """Unmap. Raises BufferError while a buffer of it is out (a memoryview, an array). May be called again."""
        super().close()
        self._handle = None
        self._channel.settle()

    def size(self) -> int:
        """The file's size in bytes, which need not be the mapping's. Raises OSError, ValueError when closed."""
        handle = self._open_handle()
        if not self.trackfd:
            raise ValueError("can't get size with trackfd=False")
        return handle.size_bytes()

    def flush(self, offset: int = 0, size: int | None = None, /) -> None:
        """Return when all that was stored is as durable as the device is: fsync of the file.

        Raises ValueError for a range that is not in the mapping, OSError (EINVAL for an offset within a page).
        """
        handle = self._open_handle()
        offset, length_bytes = as_ssize(offset), len(self) if size is None else as_ssize(size)
        if offset < 0 or length_bytes < 0 or offset + length_bytes > len(self):
            raise ValueError("flush values out of range")
        if self.access != ACCESS_WRITE:
            return
        if offset % handle.session.page_size:
            raise os_error(errno.EINVAL, filename=self.name)
        handle.msync(self.vma_id)

    def resize(self, newsize: int, /) -> None:
        """Give file and mapping another length: the file then ends where the mapping does.

        Buffers that are out stay valid, and go on showing what they show; past the file's end an access to them is a
        BusError. Raises TypeError for a mapping that is read-only or private, ValueError, OSError, and BufferError
        where the mapping cannot grow at its place and has buffers out. What raises has changed nothing.
        """
        handle = self._open_handle()
        newsize = as_ssize(newsize)
        if self.access != ACCESS_WRITE:
            raise TypeError("mmap can't resize a readonly or copy-on-write memory map.")
        if not self.trackfd:
            raise ValueError("mmap can't resize with trackfd=False.")
        if newsize < 0 or newsize > sys.maxsize - self.offset_bytes:
            raise ValueError("new size out of range")
        if not newsize:
            raise os_error(errno.EINVAL, "a mapping has a length", self.name)
        self._set_length(newsize, handle)

    def remap(self, length: int) -> None:
        """Give the mapping another length, and leave the file as it is (mremap(2)). Buffers as by `resize`.

        It may be longer than the file: past the end an access is a BusError until the file grows.
        Raises ValueError, OSError, BufferError as `resize`.
        """
        self._open_handle()
        length = as_ssize(length)
        if length <= 0 or length > sys.maxsize - self.offset_bytes:
            raise ValueError("length out of range")
        self._set_length(length, None)

    def _set_length(self, length_bytes: int, truncated: "Handle | None") -> None:
        """Of the mapping, and of the file where a handle of it is given."""
        self._open_handle()
        mmu.locked(self._resizing, self._channel.changing, self._change_length, length_bytes, truncated)

    def _change_length(self, length_bytes: int, truncated: "Handle | None") -> None:
        truncate = None
        if truncated is not None:
            truncate = Call(messages.Truncate, (truncated.number, self.offset_bytes + length_bytes))
        agree = partial(self._agree, len(self), length_bytes, truncate)
        mmu.settled(agree, self._change_each_length, length_bytes, truncate)

    def _change_each_length(self, length_bytes: int, truncate: Call | None) -> None:
        before_bytes = len(self)
        if length_bytes > before_bytes:  # address space first: without it nothing is changed
            try:
                super().resize(length_bytes)
            except OSError as error:
                if error.filename is None:
                    error.filename = self.name
                raise
        if truncate is not None:
            self._channel.complete(truncate, self.name)
        self._request(messages.Mremap, self.vma_id, self._pages(length_bytes))
        if length_bytes < before_bytes:
            super().resize(length_bytes)

    def _agree(self, before_bytes: int, length_bytes: int, truncate: Call | None, failed: bool) -> None:
        """After an exception: window and VMA are as long as before, or as the file is to be, where it is."""
        if not failed or self.closed:
            return
        if truncate is not None and isinstance(truncate.answer, messages.Reply):
            before_bytes = length_bytes
        # Answered before anybody goes on: a fault of a page that the VMA has not got back yet would be a BusError.
        self._channel.ask_quietly(messages.Mremap, self.vma_id, self._pages(before_bytes))
        with suppress(OSError, ValueError, BufferError):
            super().resize(before_bytes)

    def _pages(self, length_bytes: int) -> int:
        return -(-length_bytes // self._open_handle().session.page_size)

    def madvise(self, option: int, start: int = 0, length: int | None = None, /) -> None:
        """Advice as madvise(2). MADV_WILLNEED maps the blocks that are there, MADV_DONTNEED drops what is mapped,
        private copies included, MADV_REMOVE punches a hole; others have no effect.

        Raises ValueError, OverflowError; OSError EINVAL (no advice; an offset within a page), EACCES (MADV_REMOVE of
        what is no shared writable mapping), EBUSY (of pages that are pinned).
        """
        handle = self._open_handle()
        option, start = as_c_int(option), as_ssize(start)
        length_bytes = len(self) if length is None else as_ssize(length)
        if not 0 <= start < len(self):
            raise ValueError("madvise start out of bounds")
        if length_bytes < 0:
            raise ValueError("madvise length invalid")
        if start > sys.maxsize - length_bytes:
            raise OverflowError("madvise length too large")
        page_size = handle.session.page_size
        if option not in _MADVICES or start % page_size:
            raise os_error(errno.EINVAL, filename=self.name)
        whole_bytes = -(-min(length_bytes, len(self) - start) // page_size) * page_size
        if not whole_bytes:
            return
        if option == mmap.MADV_DONTNEED:
            self.drop(start, min(whole_bytes, len(self) - start))
        elif option == mmap.MADV_WILLNEED:
            self._will_need(handle, start, whole_bytes)
        elif option == mmap.MADV_REMOVE:
            if self.access != ACCESS_WRITE:
                raise os_error(errno.EACCES, filename=self.name)
            handle.fallocate(PUNCH_HOLE, self.offset_bytes + start, whole_bytes)

    def _will_need(self, handle: "Handle", start: int, length_bytes: int) -> None:
        """Map the blocks of the range. It is advice: what goes meanwhile, or does not fit, is left out."""
        with suppress(BusError):
            for extent in handle.extents():
                first = max(extent.offset_bytes - self.offset_bytes, start)
                end = min(
                    extent.offset_bytes + extent.length_bytes - self.offset_bytes, start + length_bytes, len(self)
                )
                if first < end:
                    super().populate(first, end - first, False)

    def populate(self, start: int = 0, length: int | None = None, write: bool = False) -> None:
        """Map every page of the range now, for stores if `write`: holes get their blocks.

        Raises BusError where that cannot be, ValueError for a range that is not in the mapping, TypeError read-only.
        """
        self._check_open()
        start = as_ssize(start)
        super().populate(start, len(self) - start if length is None else as_ssize(length), write)

    def unmap(self, start: int, length: int) -> None:
        """Take whole pages out of the mapping: an access to them is a BusError (EFAULT) from now on (munmap(2)).

        Raises OSError EINVAL for what are no whole pages of it, EBUSY where they are pinned.
        """
        page_size = self._open_handle().session.page_size
        start, length = as_ssize(start), as_ssize(length)
        if start < 0 or length <= 0 or start % page_size or start + length > len(self):
            raise os_error(errno.EINVAL, filename=self.name)
        if length % page_size and start + length != len(self):
            raise os_error(errno.EINVAL, filename=self.name)
        pgoff = (self.offset_bytes + start) // page_size
        self._request(messages.MunmapRange, self.vma_id, pgoff, -(-length // page_size))

    def pin(self, start: int = 0, length: int | None = None) -> Pin:
        """The range as a memoryview whose pages are mapped, and stay so until the end of the `with`.

        It can be given to what does not fault pages in: io_uring, devices, system calls past the libc. Holes get their
        blocks, but in a read-only mapping: there they stay holes, and are there all the same while another process
        fills them. A truncate, punch and the like of the file that would take the pages waits meanwhile, and fails with
        EBUSY after the coordinator's ack timeout. Views of it that are kept are views of the mapping afterwards, and
        pin nothing.
        Raises ValueError for a range that is not in the mapping, OSError EFAULT where it has pages that are past the
        end of the file or have been unmapped, and ENOSPC.
        """
        page_size = self._open_handle().session.page_size
        start = as_ssize(start)
        length_bytes = len(self) - start if length is None else as_ssize(length)
        if start < 0 or length_bytes <= 0 or start + length_bytes > len(self):
            raise ValueError("the range is not in the mapping")
        first = (self.offset_bytes + start) // page_size
        end = -(-(self.offset_bytes + start + length_bytes) // page_size)
        return Pin(self, start, length_bytes, first, end - first)

    def acquire_pin(self, owner: Pin, claim: Claim, first: int, pages: int) -> None:
        """For `Pin`: pin these pages of the file."""
        self.channel.holdings.add_claim(owner, claim)
        self._by_number(partial(self.channel.acquire, claim, messages.Pin, self.vma_id, first, pages))

    def unpin(self, number: int) -> None:
        """For `Pin`."""
        self._request(messages.Unpin, number)

    def protect(self, start: int, length: int | None = None, access: int = mmap.PROT_READ | mmap.PROT_WRITE) -> None:
        """Say what the pages of a range may be used for, as mprotect(2).

        start: where a page begins; length: up to the mapping's end where it is None. access: mmap.PROT_READ,
        mmap.PROT_READ | mmap.PROT_WRITE, or 0 for neither. An access that it forbids, by whatever thread and means, is
        SIGSEGV, as with any memory: it goes to the program's own handler, or ends the process. It holds until it is
        changed, the mapping shrinks or is closed; a fork's child has it too. What the pages hold stays. The libc's
        mprotect, called for the mapping's memory by C code or by ctypes, does the same; but for a process of
        connect(system_calls=False), where the next fault undoes it.

            >>> file = session.open("protected", "w+"); file.truncate(8192)
            8192
            >>> mapping = file.mmap()
            >>> mapping.protect(0, 4096, mmap.PROT_READ)
            >>> mapping[0], mapping.protect(0)
            (0, None)
            >>> mapping.close(); file.close()

        Raises ValueError for a range that is not in the mapping, OSError EINVAL (a start within a page, other bits),
        EACCES (PROT_WRITE on a read-only mapping, PROT_EXEC).
        """
        self._check_open()
        start = as_ssize(start)
        try:
            super().protect(start, len(self) - start if length is None else as_ssize(length), as_c_int(access))
        except OSError as error:
            error.filename = self.name
            raise

    def drop_pages(self, pgoff: int, length_pages: int) -> None:
        """For a fork's child: drop what this has of these pages of the file, copies included."""
        page_size = self._open_handle().session.page_size
        start = max(0, pgoff * page_size - self.offset_bytes)
        end = min(len(self), (pgoff + length_pages) * page_size - self.offset_bytes)
        if start < end:
            self.drop(start, end - start)

    def renamed(self, name: str) -> None:
        """For the library's own modules: the file has another name now, for what is raised."""
        self.name = self._open_handle().name = name

    def page_table(self) -> list[PageTableEntry]:
        """What this process has mapped of it now, as the kernel says. Pages that are not mapped are left out."""
        session = self._open_handle().session
        pgoff = self.offset_bytes // session.page_size
        return read_page_table(self.address, len(self), pgoff, session.regions, session.faults == "userfaultfd")

    def __enter__(self) -> Self:
        self._open_handle()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<dax_mp.Mapping of {self.name!r}, closed>"
        return f"<dax_mp.Mapping of {self.name!r}, offset {self.offset_bytes}, length {len(self)}>"

    def __reduce__(self) -> Any:
        """The file is opened by its name in the other process, and mapped alike; private copies stay here."""
        handle = self._open_handle()
        name = handle.stat().name or handle.name
        return _remap, (handle.session, name, handle.ino, self.offset_bytes, len(self), self.access, self.trackfd)

    @property
    def usable(self) -> bool:
        """Whether its session is. Raises ValueError when closed."""
        return self._open_handle().session.usable

    def has_name(self) -> bool:
        """Whether the file has a name, by which another process finds it. Raises OSError, ValueError when closed."""
        return self._open_handle().stat().name is not None

    @property
    def channel(self) -> "Channel":
        """For the library's own modules."""
        return self._channel

    def _request(self, kind: "RequestType", *fields: object) -> None:
        self._by_number(partial(self._channel.request, kind, *fields))

    def _by_number(self, request: Callable[..., Any]) -> None:
        """A request about the VMA. Raises ValueError where another thread has closed the mapping meanwhile."""
        try:
            request(filename=self.name)
        except OSError:
            self._check_open()
            raise

    def _open_handle(self) -> "Handle":
        handle = self._handle
        if handle is None:
            raise ValueError("mmap closed or invalid")
        return handle


def _remap(
    session: Any, name: str, ino: int, offset_bytes: int, length_bytes: int, access: int, trackfd: bool
) -> Mapping:
    """Unpickle a mapping. Raises FileNotFoundError where the file has no name any more, also when another has that."""
    with session.open(name, "r+" if access == ACCESS_WRITE else "r") as file:
        if file.stat().ino != ino:
            raise os_error(errno.ENOENT, filename=name)
        mapping: Mapping = file.mmap(length_bytes, offset_bytes, access, past_eof=True, trackfd=trackfd)
        return mapping
