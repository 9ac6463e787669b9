"""BusError: an access to a mapping had nothing to map. Where Linux sends SIGBUS, this is raised.

The native side knows what happened (`mmu.take_bus_error`) and when to raise it, and calls the class without
arguments: at once in a mapping's own methods and slices; after an access through a raw buffer, in the thread that
made it, when the interpreter next looks for an asynchronous exception. It does so where a Python function begins,
where a loop turns and after most calls; so a `try` around a lone `array[i] = 1` is left before the exception comes,
one around a function that goes on to do more is not.
"""

import errno
import os
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


mmu.set_bus_error(BusError)
