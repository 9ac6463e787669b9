"""A mapping: a part of a file as memory.

`mmu.Window` is the memory: the address space, the buffer protocol, slices, faults. This adds what makes it a mapping of
a file: the VMA at the coordinator, which keeps the file alive, and the handle of the file, shared with the file object,
which may be closed before the mapping is (as the kernel's VMA keeps its struct file).

The end of one, in order: the window drops its translations and gives its address space back; only then may the
coordinator forget the VMA (Munmap), since from then on it no longer tells this process to unmap anything of it. That
order holds in the destructor too: see `holdings.py`.
"""

import errno
import mmap
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import dax_mp.clients.bus_error  # noqa: F401  # gives the native side its exception
from dax_mp import messages, mmu
from dax_mp.clients.page_table import PageTableEntry, read_page_table
from dax_mp.errors import os_error
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.messages import Access

if TYPE_CHECKING:
    from dax_mp.clients.handle import Handle

ACCESS_READ: Final = mmap.ACCESS_READ
ACCESS_WRITE: Final = mmap.ACCESS_WRITE


class Mapping(mmu.Window):
    """Bytes `offset_bytes` to `offset_bytes + len(mapping)` of a file. `DaxFile.mmap` makes one.

    Indexing, slicing and the buffer protocol (memoryview, numpy.frombuffer, struct, ctypes) work as with mmap.mmap. An
    access that has nothing to map raises BusError and never ends the process.
    """

    def __init__(self, handle: "Handle", vma_id: int, offset_bytes: int, length_bytes: int, access: int) -> None:
        session = handle.session
        pgoff = offset_bytes // session.page_size
        super().__init__(session.pager, vma_id, pgoff, length_bytes, access == ACCESS_WRITE)
        self._handle: Handle | None = handle
        self._channel = handle.session.channel
        self.name = handle.name
        """The file's name when it was opened."""
        self.offset_bytes = offset_bytes
        self.access = access
        session.channel.holdings.add_mapping(self)

    def close(self) -> None:
        """Unmap. Raises BufferError while a buffer of it is out (a memoryview, an array). May be called again."""
        super().close()
        self._handle = None
        self._channel.settle()

    def size(self) -> int:
        """The file's size in bytes, which need not be the mapping's. Raises OSError, ValueError when closed."""
        return self._open_handle().size_bytes()

    def flush(self) -> None:
        """Return when all that was stored is as durable as the device is: fsync of the file. Raises as `size`."""
        self._open_handle().fsync()

    def page_table(self) -> list[PageTableEntry]:
        """What this process has mapped of it now, as the kernel says. Pages that are not mapped are left out."""
        session = self._open_handle().session
        return read_page_table(self.address, len(self), self.offset_bytes // session.page_size, session.regions)

    def __enter__(self) -> Self:
        self._open_handle()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<dax_mp.Mapping of {self.name!r}, closed>"
        return f"<dax_mp.Mapping of {self.name!r}, offset {self.offset_bytes}, length {len(self)}>"

    def _open_handle(self) -> "Handle":
        handle = self._handle
        if handle is None:
            raise ValueError("the mapping is closed")
        return handle


def map_file(
    handle: "Handle", readable: bool, writable: bool, length: int, offset: int, access: int, past_eof: bool
) -> Mapping:
    """What `DaxFile.mmap` does, and raises, for an open file with these rights.

    The tests are those of mmap.mmap, in its order, then those of mmap(2).
    """
    if length < 0:
        raise OverflowError("memory mapped length must be positive")
    if offset < 0:
        raise OverflowError("memory mapped offset must be positive")
    if access not in (ACCESS_READ, ACCESS_WRITE, mmap.ACCESS_COPY):
        raise ValueError("mmap invalid access parameter.")
    if access == mmap.ACCESS_COPY:
        raise os_error(errno.ENOTSUP, "mappings with ACCESS_COPY are not supported", handle.name)
    size_bytes = handle.size_bytes()
    if length == 0:
        if size_bytes == 0:
            raise ValueError("cannot mmap an empty file")
        if offset >= size_bytes:
            raise ValueError("mmap offset is greater than file size")
        length = size_bytes - offset
    elif length + offset > size_bytes and not past_eof:
        raise ValueError("mmap length is greater than file size")
    if length + offset > OFFSET_BYTES_MAX:
        raise OverflowError("the mapping ends past the largest file offset")
    if not readable or (access == ACCESS_WRITE and not writable):
        raise os_error(errno.EACCES, filename=handle.name)
    page_size = handle.session.page_size
    if offset % page_size:
        raise os_error(errno.EINVAL, f"the offset must be a multiple of the page size, {page_size}", handle.name)
    vma_access = Access.READ | Access.WRITE if access == ACCESS_WRITE else Access.READ
    vma_id = handle.session.channel.request(
        messages.Mmap,
        handle.number,
        offset // page_size,
        -(-length // page_size),
        int(vma_access),
        0,
        filename=handle.name,
    )
    try:
        return Mapping(handle, vma_id, offset, length, access)
    except OSError:
        handle.session.channel.request(messages.Munmap, vma_id)
        raise
