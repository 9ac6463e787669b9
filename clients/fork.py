"""fork(2): the child gets what its parent has, as dup_mmap() and dup_fd() give it.

The windows' memory is not inherited (`dax_mp/mmu/window.c`): the coordinator would know nothing of the child's
translations. So the child connects at once, before any other code of it runs, and has the coordinator copy the parent's
handles and VMAs to its new session (Adopt). Then each window is bound to its copy, at the same address, and the first
access faults as in any new mapping; copies of pages of private mappings come with the fork itself.

The parent waits in os.fork() until that is done, so that it cannot close, unlink or exit first: its end of a pipe
becomes readable when the child has closed the other, or is dead. Neither waits for longer than a few seconds; a child
that could not adopt by then goes on without a session.

Threads: what opens, closes, maps, resizes or unmaps in other threads is held back from before the fork until the child
has adopted, so that the coordinator's books are those of the moment of the fork. Other locks may be held by threads
that are not in the child; it makes them anew.

Exceptions in the parent: that of a signal handler (Ctrl-C), or a BusError that was pending when os.fork() was called,
does not end what is done before the fork, nor the wait. It is raised in the parent when os.fork() has returned. Of what
os.register_at_fork calls, Python would only print it.

The child of a subprocess with a preexec_fn only runs that and then another program: it connects to nothing.
"""

import contextlib
import functools
import os
import select
import sys
import threading
import time
import weakref
from io import FileIO
from types import FrameType
from typing import TYPE_CHECKING, Final

from dax_mp import mmu

if TYPE_CHECKING:
    from dax_mp.clients.session import Session

CHILD_TIMEOUT_S: Final = 3.0
"""How long the child tries to adopt."""

PARENT_TIMEOUT_S: Final = 4.0
"""How long the parent waits for the child."""

HOLD_TIMEOUT_S: Final = 1.0
"""How long a fork waits for other threads' requests."""


class _Fork:
    """One fork under way."""

    __slots__ = ("held", "locked", "pipe", "sessions")

    def __init__(self) -> None:
        self.sessions: list[Session] | None = None
        """Those that the child is to adopt; None before they are chosen."""
        self.locked = False
        self.held: list[Session] = []
        """Those whose changes are held back."""
        self.pipe: tuple[FileIO, FileIO] | None = None
        """Where there are sessions; none where no descriptors are left: the parent does not wait then."""


class _Forks(threading.local):
    """Of this thread; a signal handler may fork in the middle of a fork."""

    def __init__(self) -> None:
        self.begun: _Fork | None = None
        self.under_way: list[_Fork] = []


_forks: Final = _Forks()
_sessions: "Final[set[weakref.ref[Session]]]" = set()
_lock = threading.RLock()  # one fork at a time: another's child would keep the pipe of this one open


def register(session: "Session") -> None:
    """From now on the children of this process take the session over."""
    _sessions.add(weakref.ref(session, _sessions.discard))


def _all_sessions() -> "list[Session]":
    return [session for reference in list(_sessions) if (session := reference()) is not None]


def _before(_failed: bool) -> None:
    """Called again where it is interrupted: it goes on with the fork that it has begun."""
    fork = _forks.begun
    if fork is None:
        fork = _forks.begun = _Fork()
    if fork.sessions is None:
        another = _runs_another_program(sys._getframe(1))
        fork.sessions = [] if another else [session for session in _all_sessions() if session.usable]
    if fork.sessions and not fork.locked:
        fork.locked = _lock.acquire(timeout=PARENT_TIMEOUT_S)
    for session in fork.sessions:
        if session not in fork.held:
            fork.held.append(session)  # before it is: to let go what is not held does nothing
            session.channel.hold_changes(HOLD_TIMEOUT_S)
    if fork.sessions and fork.pipe is None:
        with contextlib.suppress(OSError):
            fork.pipe = _pipe()
    if fork not in _forks.under_way:
        _forks.under_way.append(fork)
    _forks.begun = None  # no call comes behind it, so no interrupt


def _runs_another_program(caller: FrameType) -> bool:
    """Is it subprocess.Popen that forks? It is a fork that Python sees only where there is a preexec_fn."""
    return caller.f_code.co_name == "_execute_child" and caller.f_globals.get("__name__") == "subprocess"


def _pipe() -> tuple[FileIO, FileIO]:
    reader, writer = os.pipe()
    return FileIO(reader), FileIO(writer, "w")


def _after_in_parent(_failed: bool) -> None:
    """Called again where it is interrupted: what is done already has nothing to do any more."""
    if not _forks.under_way:
        return
    fork = _forks.under_way[-1]
    if fork.pipe is not None:
        _await_child(*fork.pipe)
    for session in fork.held:
        session.channel.let_changes_go()
    if fork.locked:
        with contextlib.suppress(RuntimeError):  # released already
            _lock.release()
    del _forks.under_way[-1:]  # no call, so that no interrupt comes after it


def _await_child(reader: FileIO, writer: FileIO) -> None:
    writer.close()
    if not reader.closed:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        poll.poll(PARENT_TIMEOUT_S * 1000)
        reader.close()


def _after_in_child() -> None:
    global _lock
    _lock = threading.RLock()
    fork = _forks.under_way.pop()
    deadline_s = time.monotonic() + CHILD_TIMEOUT_S
    try:
        for session in _all_sessions():
            session.inherit(deadline_s if session in (fork.sessions or ()) else None)
    finally:
        for end in fork.pipe or ():
            end.close()


os.register_at_fork(
    before=functools.partial(mmu.postponed, _before),
    after_in_parent=functools.partial(mmu.postponed, _after_in_parent),
    after_in_child=_after_in_child,
)
