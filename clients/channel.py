"""Requests to the coordinator: a pool of control sockets.

A request takes a lane (`lane.py`) for as long as it is under way. So a request that waits (a truncate waits for other
processes) holds up no other thread, and no socket is used by two threads at once. Lanes are made on demand and kept.

A request takes along what has been let go of meanwhile (`holdings.py`).

A fork's child has the same channel, for a session of its own (`fork.py`). While a fork is under way, requests of other
threads that would change which handles and VMAs the session has are held back.
"""

import errno
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from dax_mp import messages
from dax_mp.clients.holdings import Holdings
from dax_mp.clients.lane import CoordinatorProcess, Lane, RequestType
from dax_mp.errors import ProtocolError, os_error

_LANE_NUMBER_BYTES: Final = 4
_CHANGES: Final = frozenset({messages.Open, messages.Close, messages.Mmap, messages.Munmap})
"""What changes which handles and VMAs a session has."""

LATE_TIMEOUT_S: Final = 5.0
"""How long an interrupted `borrow` waits for what is to be given back."""

HOLD_TIMEOUT_S: Final = 5.0
"""How long a fork may hold requests back: should it never end, they go on."""


class Channel:
    """A session's way to the coordinator. Any thread may use it."""

    def __init__(self, coordinator: CoordinatorProcess, token: bytes) -> None:
        self._coordinator = coordinator
        self.timeout_s = math.inf
        """How long a request waits for a coordinator that lives but does not answer."""
        self.holdings = Holdings()
        self._start(token)

    def _start(self, token: bytes) -> None:
        self._token = token
        self._closing = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # A lock that may be taken again: a destructor or a signal handler may make a request in the middle of one.
        self._changed = threading.Condition(threading.RLock())
        # Lanes that no thread uses. Taken and given back without the lock, by operations that the GIL makes atomic.
        self._idle: list[Lane] = []
        # Protected by _changed: _lanes (all that are open), _lanes_made, _closed,
        # _changing (the threads in `change`), _forking (the threads that fork).
        self._lanes: set[Lane] = set()
        self._lanes_made = 0
        self._closed = False
        self._changing: list[int] = []
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

        kind: the class of the message; fields: all of its fields but the id. timeout_s: None is the channel's own.
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
        lane = self._take(self._deadline(None))
        try:
            answer = lane.exchange(kind, fields, self._deadline(None))
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

    def post(self, kind: RequestType, *fields: object) -> None:
        """`request`, but without a wait for the answer, which must not matter. Raises ConnectionError, ValueError."""
        self.check()
        lane = self._take(self._deadline(None))
        try:
            lane.post(kind, fields, self._deadline(None))
        except BaseException:
            with self._changed:
                self._drop(lane)
            raise
        self._give_back(lane)

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

    @contextmanager
    def change(self) -> Iterator[None]:
        """While it lasts no thread forks: for what has several steps of which a child must see all or none."""
        this = threading.get_ident()
        with self._changed:
            if self._forking and this not in (*self._forking, *self._changing):
                self._changed.wait_for(lambda: not self._forking, HOLD_TIMEOUT_S)
            self._changing.append(this)
        try:
            yield
        finally:
            with self._changed:
                if this in self._changing:  # not in the child of a fork that came in the middle of it, by this thread
                    self._changing.remove(this)
                if self._forking:
                    self._changed.notify_all()

    # --- lanes -----------------------------------------------------------------------------------------------------

    def _send_released(self) -> None:
        release = self.holdings.take()
        if release is not None:
            kind, number = release
            self._exchange(kind, (number,), None)  # an Error would say that it is gone already

    def _deadline(self, timeout_s: float | None) -> float | None:
        """Of time.monotonic(). timeout_s: None is the channel's own."""
        if timeout_s is None:
            timeout_s = self.timeout_s
        return None if timeout_s == math.inf else time.monotonic() + timeout_s

    def _exchange(
        self, kind: RequestType, fields: tuple[object, ...], timeout_s: float | None
    ) -> messages.ControlAnswer:
        deadline = self._deadline(timeout_s)
        if kind in _CHANGES:
            with self.change():
                return self._exchange_by_lane(kind, fields, deadline)
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

    def _take(self, deadline: float | None) -> Lane:
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
        lane = Lane(self._coordinator, identity, self._closing, deadline)
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

    def _give_back(self, lane: Lane) -> None:
        self._idle.append(lane)
        if self._closed:
            with self._changed:
                self._drop_idle()

    def _drop_idle(self) -> None:
        while self._idle:
            self._drop(self._idle.pop())

    def _drop(self, lane: Lane) -> None:
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
