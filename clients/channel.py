"""Requests to the coordinator: a pool of control sockets.

A request takes a *lane*, a DEALER of its own, for as long as it is under way. So a request that waits (a truncate waits
for other processes) holds up no other thread, and no socket is used by two threads at once. Lanes are made on demand
and kept.

A lane has at most one request under way. When the wait for its answer ends in any other way than by the answer
(KeyboardInterrupt, the coordinator's death), the lane is closed: a late answer then has nowhere to go and cannot be
taken for that of a later request. What such a request was for may or may not have been done; what it has acquired (a
handle, a VMA) goes with the session.

A wait ends at the answer, at the coordinator's death (its pidfd), or when the session is closed by another thread (an
eventfd): it never lasts for ever on a coordinator that is gone.

A request takes along what has been let go of meanwhile (`holdings.py`).

A fork's child has the same channel, for a session of its own (`fork.py`). While a fork is under way, requests of other
threads that would change which handles and VMAs the session has are held back.
"""

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from dax_mp import messages
from dax_mp.clients.holdings import Holdings
from dax_mp.clients.zmtp import Dealer, Interrupted
from dax_mp.endpoint import control_path
from dax_mp.errors import ProtocolError, os_error

RequestType = Callable[..., messages.ControlRequest]

_LANE_NUMBER_BYTES: Final = 4
_REQUEST_IDS: Final = (1 << 32) - 1
_CHANGES: Final = frozenset({messages.Open, messages.Close, messages.Mmap, messages.Munmap})
"""What changes which handles and VMAs a session has."""

LATE_TIMEOUT_S: Final = 5.0
"""How long an interrupted `borrow` waits for what is to be given back."""

HOLD_TIMEOUT_S: Final = 5.0
"""How long a fork may hold requests back: should it never end, they go on."""


class CoordinatorProcess(NamedTuple):
    """The process that serves at an endpoint."""

    endpoint: str
    pid: int
    pidfd: int

    def gone(self) -> OSError:
        """What is raised when it is found dead."""
        return os_error(
            errno.ECONNRESET,
            f"the coordinator (pid {self.pid}) has ended, and its files with it; start another and connect() again",
            self.endpoint,
        )


class _Lane:
    """One control socket, used by one thread at a time. After any exception it is to be closed."""

    def __init__(self, coordinator: CoordinatorProcess, identity: bytes, closing: int, deadline: float | None) -> None:
        self._coordinator = coordinator
        self._next_id = 1
        self._waiting = False
        try:
            path = control_path(coordinator.endpoint)
            self._dealer = Dealer(path, identity, (coordinator.pidfd, closing), deadline)
        except Interrupted as interrupted:
            raise self._reason(interrupted) from None
        except (ConnectionResetError, ConnectionRefusedError, FileNotFoundError, BrokenPipeError):
            raise coordinator.gone() from None

    def exchange(self, kind: RequestType, fields: tuple[object, ...], deadline: float | None) -> messages.ControlAnswer:
        """Send the request and wait for its answer."""
        request_id = self._next_id
        self._next_id = self._next_id % _REQUEST_IDS + 1
        try:
            self._dealer.send(messages.encode(kind(request_id, *fields)), deadline)
            self._waiting = True
            answer = messages.decode(self._dealer.receive(deadline))
            self._waiting = False
        except Interrupted as interrupted:
            raise self._reason(interrupted) from None
        except (ConnectionResetError, BrokenPipeError):
            raise self._coordinator.gone() from None
        if not isinstance(answer, messages.Reply | messages.Error) or answer.request_id not in (request_id, 0):
            raise ProtocolError(f"the coordinator answered a request with {type(answer).__name__}")
        return answer

    def late_answer(self, deadline: float) -> messages.ControlAnswer | None:
        """After an exception in `exchange`: the answer, where that was still waiting for it and it comes."""
        try:
            return messages.decode(self._dealer.receive(deadline)) if self._waiting else None
        except (Interrupted, OSError):
            return None

    def _reason(self, interrupted: Interrupted) -> Exception:
        if interrupted.descriptor is None:
            return os_error(
                errno.ETIMEDOUT,
                f"the coordinator (pid {self._coordinator.pid}) is alive but does not answer",
                self._coordinator.endpoint,
            )
        if interrupted.descriptor == self._coordinator.pidfd:
            return self._coordinator.gone()
        return ValueError("the session was closed during the request")

    def close(self) -> None:
        self._dealer.close()


class Channel:
    """A session's way to the coordinator. Any thread may use it."""

    def __init__(self, coordinator: CoordinatorProcess, token: bytes) -> None:
        self._coordinator = coordinator
        self.holdings = Holdings()
        self._start(token)

    def _start(self, token: bytes) -> None:
        self._token = token
        self._closing = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # A lock that may be taken again: a destructor or a signal handler may make a request in the middle of one.
        self._changed = threading.Condition(threading.RLock())
        # Lanes that no thread uses. Taken and given back without the lock, by operations that the GIL makes atomic.
        self._idle: list[_Lane] = []
        # Protected by _changed: _lanes (all that are open), _lanes_made, _closed,
        # _changing (how many requests of _CHANGES are under way), _forking (the threads that fork).
        self._lanes: set[_Lane] = set()
        self._lanes_made = 0
        self._closed = False
        self._changing = 0
        self._forking: list[int] = []
        self._stale = False

    def hello(self, timeout_s: float) -> Any:
        """Begin the session. Returns the coordinator's welcome. Raises ProtocolError, TimeoutError, OSError."""
        return self.request(messages.Hello, messages.PROTOCOL_VERSION, timeout_s=timeout_s)

    def check(self) -> None:
        """Raises ValueError after close(), OSError (ESTALE) in a fork's child that could not take the session over."""
        if self._stale:
            text = "the session could not be taken over from the parent process; connect() again"
            raise os_error(errno.ESTALE, text, self._coordinator.endpoint)
        if self._closed:
            raise ValueError("the session is closed")

    def request(
        self, kind: RequestType, *fields: object, filename: str | None = None, timeout_s: float | None = None
    ) -> Any:
        """Send a request, wait for its answer and return the value of it.

        kind: the class of the message; fields: all of its fields but the id. timeout_s: None waits for as long as the
        coordinator lives.
        Raises OSError: what the coordinator answered, with `filename`; ConnectionError when it is gone; TimeoutError;
        ESTALE as `check`. Raises ValueError when the session is closed, or is closed meanwhile.
        """
        self.check()
        while self.holdings:
            self._send_released()
        return _value(self._exchange(kind, fields, timeout_s), filename)

    def borrow(self, kind: RequestType, *fields: object, filename: str) -> Any:
        """`request` for a BeginRead or BeginWrite.

        What is lent keeps others waiting, and is to be given back in time. So when an exception (KeyboardInterrupt)
        ends the wait, it is waited for and given back before that goes on.
        """
        self.check()
        lane = self._take(None)
        try:
            answer = lane.exchange(kind, fields, None)
        except BaseException:
            try:
                late = lane.late_answer(time.monotonic() + LATE_TIMEOUT_S)
                if isinstance(late, messages.Reply):
                    lane.exchange(messages.EndIo, (late.value[0], 0), time.monotonic() + LATE_TIMEOUT_S)
            finally:
                with self._changed:
                    self._drop(lane)
            raise
        self._give_back(lane)
        return _value(answer, filename)

    def settle(self) -> None:
        """Tell the coordinator now what has been let go of. Where the session is over, there is nobody to tell."""
        try:
            while self.holdings:
                self.check()
                self._send_released()
        except (OSError, ValueError):
            self.holdings.clear()

    def bye(self, timeout_s: float) -> None:
        """End the session. Precondition: the pager has dropped every translation."""
        self.holdings.clear()
        try:
            self.request(messages.Bye, timeout_s=timeout_s)
        except OSError:
            pass  # evicted, or no coordinator any more: the session is over all the same

    def close(self, timeout_s: float) -> bool:
        """End the requests that are under way in other threads, and close all sockets.

        Returns whether all are closed: False when a thread still has one, stuck in a signal handler perhaps.
        """
        with self._changed:
            self._closed = True
            os.eventfd_write(self._closing, 1)
            self._drop_idle()
            all_closed = self._changed.wait_for(lambda: not self._lanes, timeout_s)
        if all_closed:
            os.close(self._closing)
        return all_closed

    # --- fork ------------------------------------------------------------------------------------------------------

    def hold_changes(self, timeout_s: float) -> None:
        """Wait until no thread opens, closes, maps or unmaps, and let none begin to, until `let_changes_go`."""
        with self._changed:
            self._forking.append(threading.get_ident())
            self._changed.wait_for(lambda: not self._changing, timeout_s)

    def let_changes_go(self) -> None:
        with self._changed:
            self._forking.remove(threading.get_ident())
            self._changed.notify_all()

    def inherit(self, token: bytes) -> None:
        """In a fork's child: from now on this is the channel of the session `token`; the parent's lanes stay open.

        What other threads hold or wait for is never released here, so all that is made anew.
        """
        for lane in self._lanes:
            lane.close()
        os.close(self._closing)
        self._start(token)

    def set_stale(self) -> None:
        """In a fork's child: there is no session."""
        self._stale = True

    def _begin_change(self) -> None:
        with self._changed:
            if self._forking and threading.get_ident() not in self._forking:
                self._changed.wait_for(lambda: not self._forking, HOLD_TIMEOUT_S)
            self._changing += 1

    def _end_change(self) -> None:
        with self._changed:
            self._changing -= 1
            if self._forking:
                self._changed.notify_all()

    # --- lanes -----------------------------------------------------------------------------------------------------

    def _send_released(self) -> None:
        release = self.holdings.take()
        if release is not None:
            kind, number = release
            self._exchange(kind, (number,), None)  # an Error would say that it is gone already

    def _exchange(
        self, kind: RequestType, fields: tuple[object, ...], timeout_s: float | None
    ) -> messages.ControlAnswer:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if kind in _CHANGES:
            self._begin_change()
            try:
                return self._exchange_by_lane(kind, fields, deadline)
            finally:
                self._end_change()
        return self._exchange_by_lane(kind, fields, deadline)

    def _exchange_by_lane(
        self, kind: RequestType, fields: tuple[object, ...], deadline: float | None
    ) -> messages.ControlAnswer:
        lane = self._take(deadline)
        try:
            answer = lane.exchange(kind, fields, deadline)
        except BaseException:
            with self._changed:
                self._drop(lane)
            raise
        self._give_back(lane)
        return answer

    def _take(self, deadline: float | None) -> _Lane:
        """An idle lane, or a new one that has said Hello."""
        self.check()
        try:
            return self._idle.pop()
        except IndexError:
            pass
        with self._changed:
            self.check()
            self._lanes_made += 1
            identity = self._token + self._lanes_made.to_bytes(_LANE_NUMBER_BYTES, "big")
        lane = _Lane(self._coordinator, identity, self._closing, deadline)
        with self._changed:
            self._lanes.add(lane)
        try:
            answer = lane.exchange(messages.Hello, (messages.PROTOCOL_VERSION,), deadline)
            if isinstance(answer, messages.Error):
                raise _as_exception(answer, self._coordinator.endpoint)
        except BaseException:
            with self._changed:
                self._drop(lane)
            raise
        return lane

    def _give_back(self, lane: _Lane) -> None:
        self._idle.append(lane)
        if self._closed:
            with self._changed:
                self._drop_idle()

    def _drop_idle(self) -> None:
        while self._idle:
            self._drop(self._idle.pop())

    def _drop(self, lane: _Lane) -> None:
        lane.close()
        self._lanes.discard(lane)
        self._changed.notify_all()


def _value(answer: messages.ControlAnswer, filename: str | None) -> Any:
    if isinstance(answer, messages.Error):
        raise _as_exception(answer, filename)
    return answer.value


def _as_exception(answer: messages.Error, filename: str | None) -> OSError:
    if answer.errno == errno.EPROTO:
        return ProtocolError(answer.text)
    return os_error(answer.errno, answer.text, filename)
