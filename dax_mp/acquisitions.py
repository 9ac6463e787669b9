"""What requests have acquired for their sessions, and how it goes back when nobody waits for the answer any more.

A client whose wait was ended, by a signal handler's exception, does not know what its request has come to, and what it
would have got by it: a handle, a VMA, a pin, a lease. Then it says Cancel. What the request has acquired is released.
One that is still under way goes on to its end (it may be waiting for a lock), and what it acquires then is released at
once.

Only the last such request of a control socket can be cancelled: the next one says that the client has got the answer.
"""

from collections.abc import Callable
from typing import Any, Final

from dax_mp import messages
from dax_mp.session import Acquisition, Session

RELEASES: Final[dict[type[Any], Callable[[Any], messages.ControlRequest]]] = {
    messages.Open: lambda value: messages.Close(0, value[0]),
    messages.Mmap: lambda value: messages.Munmap(0, value),
    messages.Pin: lambda value: messages.Unpin(0, value),
    messages.BeginRead: lambda value: messages.EndIo(0, value[0], 0),
    messages.BeginWrite: lambda value: messages.EndIo(0, value[0], 0),
}
"""What acquires something, and the request that releases what it was answered with."""


def begin(session: Session, peer: bytes, request: messages.ControlRequest) -> Acquisition | None:
    """A request of that control socket is under way. Returns None for one that acquires nothing."""
    if type(request) not in RELEASES:
        return None
    acquisition = session.acquisitions[peer] = Acquisition(request.request_id)
    return acquisition


def acquired(acquisition: Acquisition, request: messages.ControlRequest, value: Any) -> messages.ControlRequest | None:
    """It has been answered with `value`. Returns what releases that, where the request has been cancelled meanwhile."""
    release = RELEASES[type(request)](value)
    if acquisition.cancelled:
        return release
    acquisition.release = release
    return None


def cancel(session: Session, peer: bytes, target_id: int) -> messages.ControlRequest | None:
    """Returns what releases what the request `target_id` has acquired; None where that is nothing yet."""
    acquisition = session.acquisitions.get(peer)
    if acquisition is None or acquisition.request_id != target_id:
        return None  # it has never come, or is long done with
    acquisition.cancelled = True
    release, acquisition.release = acquisition.release, None
    return release
