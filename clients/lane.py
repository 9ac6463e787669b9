"""A lane: one control socket, with one request at a time that is waited for.

A wait may be ended by an exception (of a signal handler, or the request's deadline) between any two bytecodes. The lane
can be used afterwards. It numbers its requests, and the answer repeats the number: an answer that comes late is told
from that of a later request, and passed over. Only where a request has been sent in part the lane is given up; that
request will never be seen.

What the interrupted request was for may be done all the same. What it has acquired, or will, goes back: `acquire` says
Cancel where its wait has not ended in the answer being written down in the `Claim`, which was there before.

A wait ends at the answer, at the coordinator's death (its pidfd), when the session is closed by another thread (an
eventfd), or at the deadline of the request: it never lasts for ever, neither on a coordinator that is gone nor on one
that is silent.
"""

import errno
import select
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple

from dax_mp import messages, mmu, replies
from dax_mp.clients.zmtp import Dealer, Interrupted
from dax_mp.endpoint import control_path
from dax_mp.errors import ProtocolError, os_error

RequestType = Callable[..., messages.ControlRequest]

ENDING_S: Final = 1.0
"""How long a coordinator may take from the end of its sockets to its own."""

_REQUEST_IDS: Final = (1 << 32) - 1

LATE_TIMEOUT_S: Final = 5.0
"""How long an operation that was interrupted waits to hear what its last request has come to."""

CANCEL_TIMEOUT_S: Final = 1.0
"""How long it tries to say Cancel, to a coordinator that does not listen."""

_LATE_MAX: Final = 1 << 31
"""How many requests may have been sent since the one that is answered."""


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


class Claim:
    """On what a request acquires: a handle, a VMA, a pin, a lease. It is there before the request is sent.

    release: the message that gives it back; it has one field, the number.
    """

    __slots__ = ("number", "release")

    def __init__(self, release: RequestType) -> None:
        self.release = release
        self.number: int | None = None
        """None: nothing has been acquired, or it has gone back."""


class Call:
    """A request, and its answer once that is there."""

    __slots__ = ("answer", "claim", "fields", "kind", "request_id")

    def __init__(self, kind: RequestType, fields: tuple[object, ...], claim: Claim | None = None) -> None:
        self.kind = kind
        self.fields = fields
        self.claim = claim
        self.answer: messages.ControlAnswer | None = None
        self.request_id = 0


class Lane:
    """One control socket, used by one thread at a time. Where it is `broken` it is to be closed."""

    def __init__(self, coordinator: CoordinatorProcess, identity: bytes, closing: int, deadline: float | None) -> None:
        self._coordinator = coordinator
        self._next_id = 1
        self._sending_id = 0
        self._failed = False
        try:
            path = control_path(coordinator.endpoint)
            self._dealer = Dealer(path, coordinator.pid, identity, (coordinator.pidfd, closing), deadline)
        except Interrupted as interrupted:
            raise self._reason(interrupted) from None
        except (ConnectionResetError, ConnectionRefusedError, FileNotFoundError, BrokenPipeError):
            raise self._unreachable() from None

    @property
    def broken(self) -> bool:
        return self._failed or self._dealer.sent_in_part

    def exchange(self, call: Call, deadline: float | None) -> None:
        """Send the request, wait for its answer and write that down in the call."""
        try:
            self._send(call, deadline)
            while call.answer is None:
                self._receive(call, deadline)
        except Interrupted as interrupted:
            self._failed = interrupted.descriptor is not None
            raise self._reason(interrupted) from None
        except (ConnectionResetError, BrokenPipeError):
            self._failed = True
            raise self._coordinator.gone() from None
        except ProtocolError:
            self._failed = True
            raise

    def acquire(self, call: Call, deadline: float | None) -> None:
        """`exchange` for a request that acquires something, which is the claim's then, or goes back."""
        mmu.settled(partial(self._settle_claim, call), self._acquire, call, deadline)

    def _acquire(self, call: Call, deadline: float | None) -> None:
        assert call.claim is not None
        self.exchange(call, deadline)
        if isinstance(call.answer, messages.Reply):
            value = call.answer.value
            call.claim.number = value[0] if isinstance(value, list) else value

    def _settle_claim(self, call: Call, failed: bool) -> None:
        claim = call.claim
        if failed and claim is not None and claim.number is None and not isinstance(call.answer, messages.Error):
            with suppress(Interrupted, OSError):  # the session is over then, or the lane, and with it the request
                if call.request_id and not self.broken:
                    self._send(Call(messages.Cancel, (call.request_id,)), time.monotonic() + CANCEL_TIMEOUT_S)

    def post(self, call: Call, deadline: float | None) -> None:
        """Send the request; its answer is passed over when it comes."""
        try:
            self._send(call, deadline)
        except Interrupted as interrupted:
            self._failed = True
            raise self._reason(interrupted) from None
        except (ConnectionResetError, BrokenPipeError):
            self._failed = True
            raise self._coordinator.gone() from None

    def complete(self, call: Call, deadline: float | None) -> None:
        """`exchange`, and where an exception ends it, wait a little longer for the answer if the request was sent."""
        mmu.settled(partial(self._await_late, call), self.exchange, call, deadline)

    def _await_late(self, call: Call, failed: bool) -> None:
        if failed and not self.broken and self._is_sent(call):
            deadline = time.monotonic() + LATE_TIMEOUT_S
            with suppress(Interrupted, OSError):
                while call.answer is None:
                    self._receive(call, deadline)

    def _is_sent(self, call: Call) -> bool:
        return bool(call.request_id) and self._sending_id == call.request_id and self._dealer.sent_whole

    def _send(self, call: Call, deadline: float | None) -> None:
        call.request_id = self._next_id
        self._next_id = call.request_id % _REQUEST_IDS + 1
        message = messages.encode(call.kind(call.request_id, *call.fields))
        self._dealer.begin()
        self._sending_id = call.request_id
        self._dealer.send(message, deadline)

    def _receive(self, call: Call, deadline: float | None) -> None:
        """The next answer: the call's, or one that nobody waits for any more. Until it is discarded it is the next."""
        message, end = self._dealer.next_message(deadline)
        answer = messages.decode(message)
        if not isinstance(answer, messages.Reply | messages.Error):
            raise ProtocolError(f"the coordinator answered a request with {type(answer).__name__}")
        if answer.request_id in (call.request_id, 0):
            if isinstance(answer, messages.Reply) and (wrong := replies.misfit(call.kind, call.fields, answer.value)):
                raise ProtocolError(wrong)
            call.answer = answer
        elif (call.request_id - answer.request_id) % _REQUEST_IDS > _LATE_MAX:
            raise ProtocolError("the coordinator answered another request than it was sent")
        self._dealer.discard(end)

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

    def _unreachable(self) -> OSError:
        """Nothing serves at the endpoint, or another process than this session's coordinator."""
        ends = select.poll()
        ends.register(self._coordinator.pidfd, select.POLLIN)
        if ends.poll(ENDING_S * 1000):
            return self._coordinator.gone()
        return os_error(
            errno.ECONNREFUSED,
            f"the coordinator (pid {self._coordinator.pid}) lives, but its endpoint has been removed or replaced",
            self._coordinator.endpoint,
        )

    def close(self) -> None:
        self._dealer.close()
