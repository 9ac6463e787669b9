"""BusError: an access to a mapping had nothing to map. Where Linux sends SIGBUS, this is raised.

The native side knows what happened (`mmu.take_bus_error`) and when to raise it, and calls the class without
arguments: at once in a mapping's own methods and slices; after an access through a raw buffer, in the thread that
made it, when the interpreter next looks for an asynchronous exception. It does so where a Python function begins,
where a loop turns and after many calls, but not after those of some builtins (len, isinstance, append). So a `try`
around a lone `array[i] = 1` is left before the exception comes. `bus_errors` and `check` raise it in time.

A thread that is not Python's (the pool of a native library) has nobody to raise it in. The thread that has called into
the library must get it. One that is in a `bus_errors` block has said so (`mmu/watch.c`). Else `_suspects` looks for
threads that can be in a call of C.
"""

import errno
import os
import sys
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import TYPE_CHECKING, Final

from dax_mp import mmu

if TYPE_CHECKING:
    from dax_mp.clients.mapping import Mapping

_REASONS: Final = {
    errno.EFAULT: "access past the end of the file",
    errno.ENOSPC: "no space left on the device for a store to a hole",
    errno.ENOMEM: "no page-cache page left for a load from a hole",
    errno.EACCES: "store to a mapping that is read-only",
    errno.ESTALE: "the session is closed, or was evicted: connect() again",
    errno.EIO: "the coordinator has ended: start another and connect() again",
    errno.ETIMEDOUT: "the coordinator is alive but does not answer",
}
_CLOSED: Final = "the mapping was closed: np.frombuffer(mapping) keeps it open, np.ndarray(buffer=mapping) does not"
_MOVED: Final = (
    "the mapping has moved, by a resize: np.frombuffer(mapping) keeps it there, np.ndarray(buffer=mapping) does not"
)


class BusError(OSError):
    """An access to a mapping that cannot be served.

        >>> file = session.open("short", "w+")
        >>> mapping = file.mmap(100, past_eof=True)
        >>> try:
        ...     mapping[5]
        ... except dax_mp.BusError as error:
        ...     print(errno.errorcode[error.errno], error.filename, error.offset_bytes)
        EFAULT short 5
        >>> mapping.close(); file.close()

    errno: EFAULT past the end of the file, ENOSPC no block for a store, ENOMEM no frame for a load from a hole, ESTALE
    session closed or evicted, or mapping closed, EIO coordinator gone, or silent for the session's `timeout`.
    filename: the file's name when it was opened; None where the mapping is closed since, and its object is gone.
    """

    offset_bytes: int | None
    """Where in the file; None where the mapping is closed since."""

    def __init__(self, *args: object) -> None:
        """With no arguments, as the native side calls it: this thread's last failed access."""
        self.offset_bytes = None
        if args:  # a copy, unpickled in another process
            super().__init__(*args)
            return
        code, window, offset_bytes = mmu.take_bus_error() or (errno.EFAULT, None, 0)
        text = _REASONS.get(code, os.strerror(code))
        if code == errno.ETIMEDOUT:
            code = errno.EIO
        if window is None:
            text = _CLOSED if code == errno.ESTALE else f"{text} (through a mapping that is closed now)"
            super().__init__(code, text)
            return
        mapping: Mapping = window  # type: ignore[assignment]  # this library makes no other windows
        if mapping.closed:
            text = _CLOSED
        elif code == errno.ESTALE and mapping.usable:
            text = _MOVED
        self.offset_bytes = mapping.offset_bytes + offset_bytes
        super().__init__(code, f"{text} (at offset {self.offset_bytes})", mapping.name)


def check() -> None:
    """Raise the BusError that is pending for this thread, if there is one: of its raw accesses (numpy, memoryview), or
    of threads of a native library that it has called. It is not raised a second time.

        >>> file = session.open("short", "w+")
        >>> mapping = file.mmap(100, past_eof=True)
        >>> view = memoryview(mapping)
        >>> def first_byte():
        ...     byte = view[0]  # a scratch page's, since there is nothing to map
        ...     dax_mp.check()
        ...     return byte
        >>> try:
        ...     first_byte()
        ... except dax_mp.BusError as error:
        ...     print(errno.errorcode[error.errno])
        EFAULT
        >>> view.release(); mapping.close(); file.close()
    """
    mmu.check()


def bus_errors() -> AbstractContextManager[None]:
    """A block at whose end every BusError of this thread has been raised: a raw access in it fails in it.

    Where a thread of a native library fails, the threads that are in such a block get the error, each of them.
    An exception that ends the block anyway is the context of the BusError; one that is no Exception (KeyboardInterrupt,
    asyncio.CancelledError) goes on, and has the BusError for its context.

        >>> file = session.open("short", "w+")
        >>> mapping = file.mmap(100, past_eof=True)
        >>> view = memoryview(mapping)
        >>> try:
        ...     with dax_mp.bus_errors():
        ...         view[0] = 1
        ... except dax_mp.BusError as error:
        ...     print(errno.errorcode[error.errno])
        EFAULT
        >>> view.release(); mapping.close(); file.close()
    """
    return mmu.BusErrors()


# --- whose call is it ------------------------------------------------------------------------------------------------

_LIBRARY: Final = os.path.dirname(os.__file__) + os.sep
_PACKAGES: Final = (os.path.join(_LIBRARY, "site-packages"), os.path.join(_LIBRARY, "dist-packages"))
_NO_CALLS: Final = frozenset({"RESUME", "RESUME_CHECK", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"})


def _suspects() -> list[int]:
    """The threads that can be in a call of C, by their idents. Called by a thread of the native side, with the GIL."""
    this = threading.get_ident()
    return [ident for ident, frame in sys._current_frames().items() if ident != this and _may_call_c(frame)]


def _may_call_c(frame: FrameType) -> bool:
    """Is the frame in a call that may be one of a native library?

    Not if it is between two instructions; nor if it is one of the standard library, which waits there for a lock, a
    socket, another thread. But `run` calls what a thread is made for.
    """
    import opcode  # needed by few

    code = frame.f_code
    if code.co_filename.startswith("<frozen"):
        return False
    if code.co_filename.startswith(_LIBRARY) and not code.co_filename.startswith(_PACKAGES):
        return code.co_name == "run"
    return frame.f_lasti < 0 or opcode.opname[code.co_code[frame.f_lasti]] not in _NO_CALLS


mmu.set_bus_error(BusError, _suspects)
