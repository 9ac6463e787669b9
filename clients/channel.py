"""Requests to the coordinator: a pool of control sockets.

A request takes a lane (`lane.py`) for as long as it is under way. So a request that waits (a truncate waits for other
processes) holds up no other thread, and no socket is used by two threads at once. Lanes are made on demand and kept.

A request takes along what has been let go of meanwhile (`holdings.py`).

An exception of a signal handler may end any of this between two bytecodes. What it must not tear apart, taking a lane
and giving it back, is done in C (`mmu.borrowed`); there is no lock that could stay locked.

A fork's child has the same channel, for a session of its own (`fork.py`). While a fork is under way, requests of other
threads that would change which handles and VMAs the session has are held back.
"""

import errno
import itertools
import math
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from dax_mp import messages, mmu
from dax_mp.clients.holdings import Holdings
from dax_mp.clients.lane import Call, Claim, CoordinatorProcess, Lane, RequestType
from dax_mp.clients.undo import close_all
from dax_mp.errors import ProtocolError, os_error

T = TypeVar("T")

_LANE_NUMBER_BYTES: Final = 4
_CHANGES: Final = frozenset({messages.Open, messages.Close, messages.Mmap, messages.Munmap})
"""What changes which handles and VMAs a session has."""

POLL_S: Final = 0.001
"""How often what waits for other threads looks."""

POST_TIMEOUT_S: Final = 1.0
"""How long what an interrupted operation says at its end may take, to a coordinator that does not listen."""

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
        self._events = list(map(os.eventfd, (0,), (os.EFD_CLOEXEC | os.EFD_NONBLOCK,)))  # one: the session is closing
        # Changed by operations that the GIL makes atomic: all lanes, and of these those that no thread uses; below, the
        # threads that are in `changing`, and those that fork.
        self._lanes: list[Lane] = []
        self._idle: list[Lane] = []
        self._numbers = itertools.count(1)
        self._closed = False
        self._changing: list[int] = []
        self._forking: list[int] = []
        self._stale = False
        self._greeted = False
        self.failure: str | None = None
        """What the coordinator did that the protocol does not allow: that ends the session."""

    def hello(self, timeout_s: float) -> Any:
        """Begin the session. Returns the coordinator's welcome. Raises ProtocolError, TimeoutError, OSError."""
        self._greeted = True  # from here on the coordinator may have it
        try:
            return self.request(messages.Hello, messages.PROTOCOL_VERSION, timeout_s=timeout_s)
        except ProtocolError:
            self._greeted = False
            raise

    def check(self) -> None:
        """Raises ValueError after close(), OSError (ESTALE) in a fork's child that could not take the session over,
        ProtocolError after another.
        """
        if self._stale:
            text = "the session could not be taken over from the parent process; connect() again"
            raise os_error(errno.ESTALE, text, self._coordinator.endpoint)
        if self._closed:
            raise ValueError("the session is closed")
        if self.failure is not None:
            raise ProtocolError(self.failure)

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
        call = Call(kind, fields)
        self.carry_out(call, timeout_s)
        return _value(call.answer, filename)

    def acquire(self, claim: Claim, kind: RequestType, *fields: object, filename: str) -> Any:
        """`request` for what acquires something: it is the claim's, or has been refused, or goes back."""
        self.check()
        while self.holdings:
            self._send_released()
        call = Call(kind, fields, claim)
        self.carry_out(call, None)
        return _value(call.answer, filename)

    def post(self, kind: RequestType, *fields: object) -> None:
        """`request`, but without a wait for the answer, which must not matter. Raises ConnectionError, ValueError."""
        self.check()
        self._by_lane(Lane.post, Call(kind, fields), self._deadline(None))

    def carry_out(self, call: Call, timeout_s: float | None) -> None:
        """Send the request and wait for its answer, which the call has then. Raises as `request`."""
        deadline = self._deadline(timeout_s)
        exchange = Lane.exchange if call.claim is None else Lane.acquire
        if call.kind in _CHANGES:
            self.changing(self._by_lane, exchange, call, deadline)
        else:
            self._by_lane(exchange, call, deadline)

    def complete(self, call: Call, filename: str) -> None:
        """`request`; where an exception ends the wait it goes on a little longer, so that the call has its answer."""
        self.check()
        self._by_lane(Lane.complete, call, self._deadline(None))
        _value(call.answer, filename)

    def post_quietly(self, kind: RequestType, *fields: object) -> None:
        """`post` after an exception: where the session is over, or nobody listens, there is nothing to be told."""
        with suppress(OSError, ValueError):
            self._by_lane(Lane.post, Call(kind, fields), time.monotonic() + POST_TIMEOUT_S)

    def ask_quietly(self, kind: RequestType, *fields: object) -> Any:
        """`request` after an exception, with little patience. Returns None where there is no answer, or a refusal."""
        call = Call(kind, fields)
        with suppress(OSError, ValueError):
            self._by_lane(Lane.exchange, call, time.monotonic() + POST_TIMEOUT_S)
        return call.answer.value if isinstance(call.answer, messages.Reply) else None

    def post_released(self) -> None:
        """Tell what has been let go of, after an exception, and wait for nothing."""
        with suppress(OSError, ValueError):
            while release := self.holdings.first():
                kind, number, forget = release
                self._by_lane(Lane.post, Call(kind, (number,)), time.monotonic() + POST_TIMEOUT_S)
                forget()

    def settle(self) -> None:
        """Tell the coordinator now what has been let go of. Where the session is over, there is nobody to tell."""
        while self.holdings:
            try:
                self.check()
                self._send_released()
            except (OSError, ValueError):
                if not self._over():
                    raise
                self.holdings.clear()

    def _over(self) -> bool:
        poll = select.poll()
        poll.register(self._coordinator.pidfd, select.POLLIN)
        return self._closed or self._stale or self.failure is not None or bool(poll.poll(0))

    def bye(self, timeout_s: float) -> None:
        """End the session. Precondition: the pager has dropped every translation."""
        self.holdings.clear()
        if not self._greeted:
            return
        self.failure = None  # it is told all the same, should it listen
        try:
            self.request(messages.Bye, timeout_s=timeout_s)
            self._greeted = False
        except OSError:
            pass  # evicted, or no coordinator any more: the session is over all the same

    def cancel(self) -> None:
        """End the requests that are under way, and let none begin."""
        self._closed = True
        for event in self._events:
            os.eventfd_write(event, 1)

    def close(self, timeout_s: float) -> bool:
        """End the requests that are under way in other threads, and close all sockets.

        Returns whether all are closed: False when a thread still has one, stuck in a signal handler perhaps.
        """
        self.cancel()
        deadline = time.monotonic() + timeout_s
        while True:
            self._drop_idle()
            if not self._lanes:
                break
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        close_all(self._events)
        return True

    # --- fork ------------------------------------------------------------------------------------------------------

    def hold_changes(self, timeout_s: float) -> None:
        """Wait until no thread opens, closes, maps or unmaps, and let none begin to, until `let_changes_go`."""
        this = threading.get_ident()
        self._forking.append(this)
        deadline = time.monotonic() + timeout_s
        while any(thread != this for thread in list(self._changing)) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def let_changes_go(self) -> None:
        this = threading.get_ident()
        if this in self._forking:
            self._forking.remove(this)

    def inherit(self, token: bytes) -> None:
        """In a fork's child: from now on this is the channel of the session `token`; the parent's lanes stay open.

        What other threads hold or wait for is never released here, so all that is made anew.
        """
        for lane in self._lanes:
            lane.close()
        close_all(self._events)
        self._start(token)

    def set_stale(self) -> None:
        """In a fork's child: there is no session."""
        self._stale = True

    def changing(self, function: Callable[..., T], *args: Any) -> T:
        """Call the function. While it lasts no thread forks: of its several steps a child must see all or none."""
        this = threading.get_ident()
        deadline = time.monotonic() + HOLD_TIMEOUT_S
        while True:
            done: bool
            result: T
            done, result = mmu.marked(self._changing, this, self._unless_forking, this, deadline, function, args)
            if done:
                return result
            time.sleep(POLL_S)

    def _unless_forking(
        self, this: int, deadline: float, function: Callable[..., T], args: tuple[Any, ...]
    ) -> tuple[bool, Any]:
        """The mark is there; a fork that begins from now on waits for it. Was the function called, and its result."""
        inside = this in self._forking or self._changing.count(this) > 1
        if self._forking and not inside and time.monotonic() < deadline:
            return False, None
        return True, function(*args)

    # --- lanes -----------------------------------------------------------------------------------------------------

    def _send_released(self) -> None:
        release = self.holdings.first()
        if release is not None:
            kind, number, forget = release
            self.carry_out(Call(kind, (number,)), None)  # an Error would say that it is gone already
            forget()

    def _deadline(self, timeout_s: float | None) -> float | None:
        """Of time.monotonic(). timeout_s: None is the channel's own."""
        if timeout_s is None:
            timeout_s = self.timeout_s
        return None if timeout_s == math.inf else time.monotonic() + timeout_s

    def _by_lane(self, function: Callable[..., None], call: Call, *args: Any) -> None:
        """Call the function with an idle lane, or a new one that has said Hello."""
        try:
            while mmu.borrowed(self._idle, self._use, function, call, args) is False:
                if not self._idle:
                    self._add_lane(*args)
        except ProtocolError as error:
            self.failure = error.strerror
            raise

    def _use(self, lane: Lane, function: Callable[..., None], call: Call, args: tuple[Any, ...]) -> bool:
        """Returns False where the lane was broken; it is no lane any more then."""
        if lane.broken:
            return self._drop(lane)
        self.check()
        function(lane, call, *args)
        return True

    def _add_lane(self, deadline: float | None = None) -> None:
        self.check()
        identity = self._token + next(self._numbers).to_bytes(_LANE_NUMBER_BYTES, "big")
        lane = Lane(self._coordinator, identity, self._events[0], deadline)
        hello = Call(messages.Hello, (messages.PROTOCOL_VERSION,))
        try:
            lane.exchange(hello, deadline)
            if isinstance(hello.answer, messages.Error):
                raise _as_exception(hello.answer, self._coordinator.endpoint)
        except BaseException:
            lane.close()
            raise
        self._lanes.append(lane)
        self._idle.append(lane)
        if self._closed:
            self._drop_idle()

    def _drop_idle(self) -> None:
        while self._idle:
            mmu.borrowed(self._idle, self._drop)

    def _drop(self, lane: Lane) -> bool:
        """Returns False: the lane is none any more."""
        lane.close()
        if lane in self._lanes:
            self._lanes.remove(lane)
        return False


def _value(answer: messages.ControlAnswer | None, filename: str | None) -> Any:
    if isinstance(answer, messages.Error):
        raise _as_exception(answer, filename)
    assert answer is not None
    return answer.value


def _as_exception(answer: messages.Error, filename: str | None) -> OSError:
    if answer.errno == errno.EPROTO:
        return ProtocolError(answer.text)
    return os_error(answer.errno, answer.text, filename)
