"""A lane: one control socket, with at most one request under way.

When the wait for its answer ends in any other way than by the answer (KeyboardInterrupt, the coordinator's death), the
lane is closed: a late answer then has nowhere to go and cannot be taken for that of a later request. What such a
request was for may or may not have been done; what it has acquired (a handle, a VMA) goes with the session.

A wait ends at the answer, at the coordinator's death (its pidfd), when the session is closed by another thread (an
eventfd), or at the deadline of the request: it never lasts for ever, neither on a coordinator that is gone nor on one
that is silent.
"""

import errno
import select
from collections.abc import Callable
from typing import Final, NamedTuple

from dax_mp import messages
from dax_mp.clients.zmtp import Dealer, Interrupted
from dax_mp.endpoint import control_path
from dax_mp.errors import ProtocolError, os_error

RequestType = Callable[..., messages.ControlRequest]

ENDING_S: Final = 1.0
"""How long a coordinator may take from the end of its sockets to its own."""

_REQUEST_IDS: Final = (1 << 32) - 1


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


class Lane:
    """One control socket, used by one thread at a time. After any exception it is to be closed."""

    def __init__(self, coordinator: CoordinatorProcess, identity: bytes, closing: int, deadline: float | None) -> None:
        self._coordinator = coordinator
        self._next_id = 1
        self._owed_id = 0  # of a request whose answer nobody waits for, until it has come
        self._waiting = False
        try:
            path = control_path(coordinator.endpoint)
            self._dealer = Dealer(path, coordinator.pid, identity, (coordinator.pidfd, closing), deadline)
        except Interrupted as interrupted:
            raise self._reason(interrupted) from None
        except (ConnectionResetError, ConnectionRefusedError, FileNotFoundError, BrokenPipeError):
            raise self._unreachable() from None

    def exchange(self, kind: RequestType, fields: tuple[object, ...], deadline: float | None) -> messages.ControlAnswer:
        """Send the request and wait for its answer."""
        try:
            request_id = self._send(kind, fields, deadline)
            self._waiting = True
            answer = self._receive(deadline)
            self._waiting = False
        except Interrupted as interrupted:
            raise self._reason(interrupted) from None
        except (ConnectionResetError, BrokenPipeError):
            raise self._coordinator.gone() from None
        if answer.request_id not in (request_id, 0):
            raise ProtocolError("the coordinator answered another request than it was sent")
        return answer

    def post(self, kind: RequestType, fields: tuple[object, ...], deadline: float | None) -> None:
        """Send the request; its answer is passed over when it comes, before that of the next one."""
        try:
            if self._owed_id:  # by what another thread posted, which had this lane meanwhile
                self._receive_owed(deadline)
            self._owed_id = self._send(kind, fields, deadline)
        except Interrupted as interrupted:
            raise self._reason(interrupted) from None
        except (ConnectionResetError, BrokenPipeError):
            raise self._coordinator.gone() from None

    def _send(self, kind: RequestType, fields: tuple[object, ...], deadline: float | None) -> int:
        request_id = self._next_id
        self._next_id = self._next_id % _REQUEST_IDS + 1
        self._dealer.send(messages.encode(kind(request_id, *fields)), deadline)
        return request_id

    def _receive(self, deadline: float | None) -> messages.ControlAnswer:
        """The answer of the last request that was sent."""
        if self._owed_id:
            self._receive_owed(deadline)
        return self._receive_next(deadline)

    def _receive_owed(self, deadline: float | None) -> None:
        answer = self._receive_next(deadline)
        if answer.request_id != self._owed_id:
            raise ProtocolError("the coordinator answered another request than it was sent")
        self._owed_id = 0

    def _receive_next(self, deadline: float | None) -> messages.ControlAnswer:
        answer = messages.decode(self._dealer.receive(deadline))
        if not isinstance(answer, messages.Reply | messages.Error):
            raise ProtocolError(f"the coordinator answered a request with {type(answer).__name__}")
        return answer

    def late_answer(self, deadline: float) -> messages.ControlAnswer | None:
        """After an exception in `exchange`: the answer, where that was still waiting for it and it comes."""
        try:
            return self._receive(deadline) if self._waiting else None
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
