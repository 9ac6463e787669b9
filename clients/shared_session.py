"""The session that a process shares among all in it who do not bring one of their own: memory, lists, pickles."""

import os
import threading
from typing import Final

from dax_mp import mmu
from dax_mp.clients import attach
from dax_mp.clients import faults as ways
from dax_mp.clients.session import Session

_shared: Final[dict[tuple[str, str, bool, str], Session]] = {}
_shared_lock = threading.RLock()  # a signal handler may want one in the middle of this


def shared_session(
    endpoint: str | os.PathLike[str] | None = None,
    bus_error: str = "raise",
    system_calls: bool = True,
    faults: str | None = None,
) -> Session:
    """This process's session at that endpoint, for all who do not bring one of their own. Arguments as `connect`.

    It ends with the process. One that has been closed, or was evicted, or whose coordinator has ended, is replaced.
    Raises as `connect`.

        >>> dax_mp.shared_session(daemon.endpoint) is dax_mp.shared_session(daemon.endpoint)
        True
    """
    path = os.path.abspath(attach.user_endpoint() if endpoint is None else os.fspath(endpoint))
    key = path, bus_error, system_calls, ways.way(faults)
    return mmu.locked(_shared_lock, _usable, key, faults)


def _usable(key: tuple[str, str, bool, str], faults: str | None) -> Session:
    session = _shared.get(key)
    if session is None or not session.usable:
        path, bus_error, system_calls, _ = key
        session = _shared[key] = Session(path, bus_error, system_calls, faults=faults)
    return session


def _unlock_shared_sessions() -> None:
    """In a fork's child: the thread that held the lock is not here."""
    global _shared_lock
    _shared_lock = threading.RLock()


os.register_at_fork(after_in_child=_unlock_shared_sessions)
