"""The loop around the state machine: bytes into messages, facts of the kernel into events, effects into bytes.

One turn: sleep until something is ready; tell the state machine the time; then deaths (so that who has waited for
another's end finds its files gone), pager traffic and control traffic, in this order and each at most a batch, so that
none starves another and a fault waits for as little as possible. The processes behind the sessions hang on one epoll
descriptor: a turn costs the same however many there are.

A peer's mistake ends here: it is answered, or evicts the peer's session, and never ends the loop.
"""

import errno
import logging
import math
import os
import select
import signal
import socket
import time
from typing import Final, get_args

from dax_mp.coordinator import Coordinator
from dax_mp.daemons.descriptors import SESSION_DESCRIPTORS, Descriptors
from dax_mp.daemons.liveness import SessionProcesses
from dax_mp.daemons.log import Log, event, logger, process_name
from dax_mp.daemons.sockets import Router
from dax_mp.effects import SendControl, SendPager
from dax_mp.errors import ProtocolError
from dax_mp.messages import (
    PROTOCOL_VERSION,
    TOKEN_BYTES,
    ControlAnswer,
    ControlRequest,
    Error,
    Evict,
    Hello,
    PagerHello,
    PagerRequest,
    decode,
    encode,
)

PAGER_BATCH_MESSAGES: Final = 64
CONTROL_BATCH_MESSAGES: Final = 8
SIGNALS_MAX: Final = 64
DEADLINE_STEPS: Final = 4
"""In how many steps the time to acknowledge passes: see `Clock`."""

_PAGER_REQUESTS: Final = frozenset(get_args(PagerRequest))
_CONTROL_REQUESTS: Final = frozenset(get_args(ControlRequest))


_EVICTED_FOR: Final = {
    errno.ESTALE: "it did not let go of pages, or of what it was lent, within --ack-timeout",
    errno.EPROTO: "it broke the protocol",
}


class Clock:
    """Seconds in which this process was there to listen.

    No turn of the loop counts for more than a step. So when the coordinator itself has been stopped or starved, its
    clients, whose acknowledgements lie in the socket, are not evicted for it.
    """

    def __init__(self, step_s: float) -> None:
        self.now_s = 0.0
        self.step_s = step_s
        self._last_s = time.monotonic()

    def advance(self) -> float:
        last_s, self._last_s = self._last_s, time.monotonic()
        self.now_s += min(self._last_s - last_s, self.step_s)
        return self.now_s


class Loop:
    """Serves until a signal says to stop, or `processes.stop_requested`.

    signals: a socket from which the numbers of signals are received. log: opened again on SIGHUP, where there is one.
    ack_timeout_s: as the coordinator has it.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        pager: Router,
        control: Router,
        processes: SessionProcesses,
        descriptors: Descriptors,
        signals: socket.socket,
        log: Log | None,
        ack_timeout_s: float,
    ) -> None:
        self._coordinator = coordinator
        self._pager = pager
        self._control = control
        self._processes = processes
        self._descriptors = descriptors
        self._signals = signals
        self._log = log
        self._stopped_by = ""
        self._quarantined_pages = 0
        self._clock = Clock(ack_timeout_s / DEADLINE_STEPS)
        self._poll = select.poll()
        for descriptor in (pager.fileno, control.fileno, processes.fileno(), signals.fileno()):
            self._poll.register(descriptor, select.POLLIN)

    def run(self) -> str:
        """Serve. Returns what ended it."""
        while not (self._stopped_by or self._processes.stop_requested):
            more = self._pager.has_more or self._control.has_more
            ready = [descriptor for descriptor, _ in self._poll.poll(0 if more else self._timeout_ms())]
            now_s = self._clock.advance()
            self._pager.tick(now_s)
            self._control.tick(now_s)
            self._coordinator.fs.now_ns = time.time_ns()
            self._coordinator.tick(now_s)
            self._carry_out_effects()
            if self._processes.fileno() in ready:
                self._serve_deaths()
            if self._pager.has_more or self._pager.fileno in ready:
                self._serve_pager()
            if self._control.has_more or self._control.fileno in ready:
                self._serve_control()
            if self._signals.fileno() in ready:
                self._serve_signals()
        return self._stopped_by or "the end of its launcher"

    def _serve_signals(self) -> None:
        for number in self._signals.recv(SIGNALS_MAX):
            if number != signal.SIGHUP:
                self._stopped_by = signal.Signals(number).name
            elif self._log is not None:
                self._log.reopen()

    def _timeout_ms(self) -> int | None:
        deadlines_s = (
            self._coordinator.next_deadline_s(),
            self._pager.next_deadline_s(),
            self._control.next_deadline_s(),
        )
        deadline_s = min((deadline_s for deadline_s in deadlines_s if deadline_s is not None), default=None)
        if deadline_s is None:
            return None
        wait_s = min(deadline_s - self._clock.now_s, self._clock.step_s)
        return max(0, math.ceil(wait_s * 1000))

    def _serve_pager(self) -> None:
        coordinator, pager = self._coordinator, self._pager
        if not pager.has_more:
            pager.fill()
        for _ in range(PAGER_BATCH_MESSAGES):
            received = pager.next()
            if received is None:
                return
            token, data = received
            if not coordinator.has_session(token):
                self._count_protocol_error()  # nobody, or a session that has ended: there is no one to tell
            else:
                try:
                    message = decode(data)
                    if type(message) not in _PAGER_REQUESTS:
                        raise ProtocolError(f"{type(message).__name__} on the pager socket")
                except ProtocolError as error:
                    coordinator.protocol_error(token, error)
                else:
                    if type(message) is PagerHello:
                        pager.settle(token)
                    coordinator.receive_pager(token, message)
                self._carry_out_effects()

    def _serve_control(self) -> None:
        if not self._control.has_more:
            self._control.fill()
        for _ in range(CONTROL_BATCH_MESSAGES):
            received = self._control.next()
            if received is None:
                return
            peer, data = received
            try:
                message = decode(data)
                if type(message) not in _CONTROL_REQUESTS:
                    raise ProtocolError(f"{type(message).__name__} on the control socket")
            except ProtocolError as error:
                self._refuse(peer, 0, error)
            else:
                self._receive_request(peer, message)
                self._carry_out_effects()

    def _receive_request(self, peer: bytes, request: ControlRequest) -> None:
        token = peer[:TOKEN_BYTES]
        try:
            if isinstance(request, Hello):
                self._open_session(peer, request)
            elif not self._coordinator.has_session(token):
                raise ProtocolError("no such session: say Hello first; if you have, it has ended, so connect() again")
        except ProtocolError as error:
            self._refuse(peer, request.request_id, error)
        except OSError as error:
            code = errno.EMFILE if error.errno in (errno.EMFILE, errno.ENFILE) else errno.EACCES
            self._note_refusal(peer, code, f"no session: {error.strerror}")
            self._answer(peer, Error(request.request_id, code, f"no session: {error.strerror}"))
        else:
            self._coordinator.receive_control(token, peer, request)

    def _open_session(self, peer: bytes, hello: Hello) -> None:
        """Open the session if this is the first Hello of its token; the connection is the session's from now on.

        Raises ProtocolError for another version or an identity that is none, OSError where the session's process cannot
        be found and watched, or there is no room for another session or connection (EMFILE).
        """
        if hello.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the coordinator speaks version {PROTOCOL_VERSION} of the protocol, and the client version "
                f"{hello.version}: run both from the same release of dax-mp"
            )
        if len(peer) <= TOKEN_BYTES:
            raise ProtocolError(f"a control socket's identity is its session's {TOKEN_BYTES} bytes and one or more")
        token = peer[:TOKEN_BYTES]
        if not self._coordinator.has_session(token):
            self._descriptors.take(SESSION_DESCRIPTORS)
            try:
                self._control.settle(peer)
                pid = self._processes.open(token)
            except BaseException:
                self._descriptors.give_back(SESSION_DESCRIPTORS)
                self._control.unsettle(peer)
                raise
            self._coordinator.session_opened(token, pid)
            if logger.isEnabledFor(logging.DEBUG):
                event(logging.DEBUG, "session", f"session of {process_name(pid)} began", pid=pid)
        else:
            self._control.settle(peer)

    def _serve_deaths(self) -> None:
        for token in self._processes.ended():
            self._coordinator.session_gone(token)
            self._carry_out_effects()

    def _carry_out_effects(self) -> None:
        while effects := self._coordinator.take_effects():
            for effect in effects:
                if isinstance(effect, SendPager):
                    self._send_pager(effect)
                elif isinstance(effect, SendControl):
                    self._answer(effect.peer, effect.message)
                else:
                    self._note_end(effect.token)
                    self._processes.forget(effect.token)
                    self._pager.unsettle(effect.token)
                    self._descriptors.give_back(SESSION_DESCRIPTORS)

    def _send_pager(self, effect: SendPager) -> None:
        """A pager that does not take its orders keeps others waiting, and may reach what it must not: it is evicted.

        But where the process has called exec(), pager, mappings and lock are gone with the program that it was.
        """
        if isinstance(effect.message, Evict):
            self._note_eviction(effect.token, effect.message.errno)
        if self._pager.send(effect.token, encode(effect.message)) or not self._coordinator.has_session(effect.token):
            return
        if self._processes.has_let_go(effect.token):
            self._coordinator.session_gone(effect.token)
        elif not isinstance(effect.message, Evict):
            self._coordinator.protocol_error(effect.token, ProtocolError("its pager is gone or does not read"))

    def _note_eviction(self, token: bytes, code: int) -> None:
        pid = self._processes.pid_of(token)
        why = _EVICTED_FOR.get(code, os.strerror(code))
        event(logging.WARNING, "eviction", f"evicted {process_name(pid)}: {why}", pid=pid, errno=code)
        self._note_quarantine()

    def _note_end(self, token: bytes) -> None:
        pid = self._processes.pid_of(token)
        event(logging.DEBUG, "session", f"session of pid {pid} ended", pid=pid)
        self._note_quarantine()

    def _note_quarantine(self) -> None:
        """Changes of how much is in quarantine: it grows when an evicted process may reach more, and ends with it."""
        pages = self._coordinator.fs.device.frames.quarantined_pages
        if pages != self._quarantined_pages:
            event(logging.WARNING, "quarantine", f"{pages} pages are in quarantine", pages=pages)
            self._quarantined_pages = pages

    def _note_refusal(self, peer: bytes, code: int, text: str) -> None:
        if logger.isEnabledFor(logging.WARNING):
            pid = self._control.pid_of(peer)
            event(logging.WARNING, "refusal", f"refused {process_name(pid)}: {text}", pid=pid, errno=code)

    def _answer(self, peer: bytes, answer: ControlAnswer) -> None:
        self._control.send(peer, encode(answer))  # a peer that is gone, or does not read its answers, needs none

    def _refuse(self, peer: bytes, request_id: int, error: ProtocolError) -> None:
        self._count_protocol_error()
        self._note_refusal(peer, errno.EPROTO, str(error.strerror))
        self._answer(peer, Error(request_id, errno.EPROTO, str(error.strerror)))

    def _count_protocol_error(self) -> None:
        self._coordinator.fs.counters["protocol_errors"] += 1
