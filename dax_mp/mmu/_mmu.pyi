"""The native part, as Python sees it. Nothing here is public: `dax_mp.clients` builds the library on it."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, SupportsIndex, TypeVar, overload

from typing_extensions import Buffer

T = TypeVar("T")

class Pager:
    """One session's native pager: a ZeroMQ DEALER and the thread that serves it.

    The thread never takes the GIL and blocks all signals, so it answers an unmap at once whatever Python is doing.
    """

    def __init__(
        self,
        *,
        path: str,
        token: bytes,
        version: int,
        pmem_fd: int,
        dram_fd: int,
        timeout_ms: int,
        sigbus: bool,
        userfaultfd: bool,
        answer_timeout_ms: int,
    ) -> None:
        """Connect to the Unix socket at `path`, say PagerHello and wait for PagerReady.

        dram_fd: -1 where there is no DRAM region. The file descriptors are duplicated.
        sigbus: an access that has nothing to map ends in SIGBUS, as the kernel has it, and not in an exception.
        answer_timeout_ms: an access that the coordinator does not answer for so long has nothing to map either
        (ETIMEDOUT); negative: it waits for ever.
        userfaultfd: faults arrive through userfaultfd(2), and not as SIGSEGV. OSError EPERM, ENOSYS, ENOTSUP where that
        is not to be had.
        Raises TimeoutError when no PagerReady comes, ConnectionError when the coordinator is gone, OSError else.
        """

    def close(self, errno: int = ...) -> None:
        """Drop every translation of every window, end the thread, and leave the windows reserved.

        Every fault that waits, and every later one, is a BusError with `errno` (ESTALE). May be called again.
        """

    @property
    def errno(self) -> int:
        """0 while the pager serves; else why it does not: ESTALE evicted or closed, EIO coordinator gone."""

    @property
    def last_unmap(self) -> int:
        """The id of the last Unmap that has been carried out. In a fork's child: before the fork."""

    @property
    def serves_system_calls(self) -> bool:
        """A system call that meets an unmapped page waits for it: with userfaultfd(2), where the process may do so."""

    @property
    def closed_vmas(self) -> list[int]:
        """The vma_id of each window that is closed now, by close() or by its destructor; the caller empties it.

        An id is here only when the process has no translation of that window any more.
        """

    def store(self, buffer: Buffer, region_offset_bytes: int, /) -> int:
        """Store the whole buffer into lent frames of the PMem region (BeginWrite), without the GIL.

        Returns how many bytes: fewer than its length where a page of the buffer is not mapped (pwrite(2), EFAULT).
        Raises OSError: ESTALE and what else `errno` says when the pager does not serve; Dropped is said to the
        coordinator only when no such call is under way any more.
        """

    def load(self, buffer: Buffer, region_offset_bytes: int, /) -> int:
        """Fill the buffer from lent frames (BeginRead). As `store`."""

    def counters(self) -> dict[str, int]:
        """Since the start: faults, bus_errors, maps and unmaps (messages), and drops.

        Drops are mappings given up for vm.max_map_count.
        """

class Window:
    """A range of reserved address space that shows `length_bytes` of a file from page `pgoff` on.

    Has the buffer protocol (unsigned bytes, C-contiguous) and counts its exports. Indexing and slicing are as those of
    mmap.mmap, and raise BusError at the access itself.
    """

    def __init__(
        self, pager: Pager, vma_id: int, pgoff: int, length_bytes: int, writable: bool, private: bool = False
    ) -> None:
        """Reserve the range and let faults on it go to `pager`. Raises OSError (ENOMEM).

        Address space behind it is reserved ahead, for resize().
        private: a store copies the page (MAP_PRIVATE); `writable` is True, and its faults are read faults. Raises
        OSError ENOTSUP where /proc/self/pagemap, which tells copies from the file's pages, cannot be read.
        """

    def resize(self, length_bytes: int, /) -> None:
        """Let the window end after `length_bytes`, in place: views that are out stay valid.

        Growing within what is reserved always works; past that it takes the address space behind where that is free,
        and moves the window where it has no exports. Raises BufferError where it cannot do either, OSError (ENOMEM).
        Before shrinking, the coordinator has had the pages past the new end dropped (Mremap).
        """

    def populate(self, offset_bytes: int, length_bytes: int, write: bool, /) -> None:
        """Touch every page of the range, without the GIL and without changing a byte. Raises BusError."""

    def drop(self, offset_bytes: int, length_bytes: int, /) -> None:
        """Drop the translations of the whole pages of the range, and private copies (madvise(2), MADV_DONTNEED)."""

    def keep(self, offset_bytes: int, length_bytes: int, keep: bool, /) -> None:
        """Never give up the range's translations for vm.max_map_count (a pin), or take one such call back.

        Raises ValueError for a range that is not in the window, OSError ENOENT where there is no call to take back.
        """

    def protect(self, offset_bytes: int, length_bytes: int, prot: int, /) -> None:
        """mprotect(2) of the pages of the range. prot: PROT_READ and PROT_WRITE, or 0; PROT_WRITE includes PROT_READ.

        An access that it forbids is SIGSEGV. Raises ValueError for a range that is not in the window, OSError EINVAL
        (within a page; other bits), EACCES (PROT_EXEC; PROT_WRITE in a read-only window).
        """

    def rebind(self, pager: Pager, vma_id: int, /) -> None:
        """In the child of a fork: faults go to this pager, as this VMA's, from now on."""

    def move(self, dest: int, src: int, count: int, /) -> None:
        """mmap.mmap.move: the ranges may overlap. Raises ValueError out of bounds, TypeError read-only, BusError."""

    def close(self) -> None:
        """Drop the translations. May be called again.

        Where the address was out, it stays out of use while the object lives: an access to it is a BusError (ESTALE).
        Raises BufferError while exports are out.
        """

    @property
    def closed(self) -> bool: ...
    @property
    def address(self) -> int:
        """Where it is mapped; 0 when closed. It is out from then on: see close()."""

    @property
    def exports(self) -> int: ...
    @property
    def vma_id(self) -> int: ...
    @property
    def private(self) -> bool: ...
    @property
    def writable(self) -> bool: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: SupportsIndex, /) -> int: ...
    @overload
    def __getitem__(self, key: slice, /) -> bytes: ...
    @overload
    def __setitem__(self, key: SupportsIndex, value: int, /) -> None: ...
    @overload
    def __setitem__(self, key: slice, value: Buffer, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class BusErrors:
    """A context manager. At its end it raises what has failed and was not raised in the block.

    An exception that is no Exception (KeyboardInterrupt) goes on, with that as its context. Also in another thread than
    the one that entered it. Failed accesses of threads that are not Python's go to threads that are in such a block.
    """

    def __enter__(self) -> None: ...
    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> Literal[False]: ...

def check() -> None:
    """Raise what is pending for this thread: its own failed raw access, or one of a thread that is not Python's."""

def set_bus_error(cls: type[BaseException], suspects: Callable[[], Sequence[int]] = ..., /) -> None:
    """The class that is raised: by a Window's own methods, and in a thread whose raw access had nothing to map.

    suspects: the idents of the threads that may have called what runs in a thread that is not Python's; empty: the main
    thread is taken.

    It is called without arguments, and takes what happened from `take_bus_error`.
    """

def take_bus_error() -> tuple[int, Window | None, int] | None:
    """(errno, window, offset_bytes in it) of this thread's last failed access, once; drops its scratch pages.

    None when there was none. The window is None when it has been closed since. With ESTALE it may be one that was
    closed before the access, or that has moved: then it is None when the object is gone.
    """

def interpose_system_calls() -> None:
    """Have the libc's read, write and their kin map the pages of windows that their buffers lie in, from now on.

    Whoever calls them: all that is loaded, and what will be. Raises OSError.
    """

def claim_signals() -> None:
    """Make the fault handler the first of SIGSEGV and SIGBUS again, with what is installed now behind it."""

def release_signals() -> None:
    """Put back what is behind the fault handler, for SIGSEGV and SIGBUS, where the handler is the first.

    For code that must find its own handlers installed, such as faulthandler.enable() and disable(): release, call it,
    claim. Between the two, an access to a page that is not mapped ends the process.
    """

def keep_forever(object: object, /) -> None:
    """Never run this object's destructor, not even at the interpreter's end: it works on what is not this process's."""

# --- calls that end, whatever exception comes between two bytecodes -------------------------------------------------

def settled(conclude: Callable[[bool], object], function: Callable[..., T], /, *args: Any) -> T:
    """Call the function, then `conclude(failed)`, whatever happened; `failed`: the function has raised.

    Where an exception ends `conclude` too early (a signal handler's: it must have none of its own), it is called
    again, and the exception is raised afterwards.
    """

def locked(lock: Any, function: Callable[..., T], /, *args: Any) -> T:
    """Call the function between `lock.acquire()` and `lock.release()`."""

def borrowed(items: list[Any], function: Callable[..., T], /, *args: Any) -> T | Literal[False]:
    """Take the last item out of the list, call `function(item, *args)`, and put the item back.

    Returns False where there is none; where the function returns False the item is not put back.
    """

def marked(marks: list[Any], mark: Any, function: Callable[..., T], /, *args: Any) -> T:
    """Call the function; while it lasts the mark is in the list."""

def postponed(function: Callable[[bool], object], /) -> None:
    """Call the function as `settled` calls `conclude`; its exception is raised in the main thread, soon: not before the
    call that the caller's frame is in has returned.
    """
