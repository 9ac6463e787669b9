"""The coordinator's state machine: messages and facts go in, effects come out.

Everything that happens comes in through one of the methods of `Coordinator`, and what is to be done about it is in
`take_effects()` afterwards. There is no I/O, no clock and no randomness in here: the same calls give the same effects.

    receive_control    a request       -> a Reply or an Error to the same peer, at once or when its operation has ended
    receive_pager      a fault, an ack -> Maps, Unmaps
    session_opened     a process has come, and the kernel has said who it is
    session_gone       the kernel says that it is dead: all it had goes
    protocol_error     it has broken the protocol: it is evicted
    tick               time has passed: who has not acknowledged by now is evicted

After each of these every operation has gone as far as it can (`Scheduler.run`). With `debug`, every invariant is then
checked (`dax_mp.validate`).
"""

import errno
import os
from collections.abc import Generator, Iterator
from typing import Any

from dax_mp import acquisitions, direct_io, pins
from dax_mp.device import Device
from dax_mp.effects import Effect, EndSession, SendControl
from dax_mp.errors import ProtocolError, os_error
from dax_mp.fault import handle_fault
from dax_mp.file_system import FileSystem
from dax_mp.inode import Inode
from dax_mp.limits import FAULTS_PER_SESSION_MAX
from dax_mp.messages import (
    PROTOCOL_VERSION,
    Adopt,
    Bye,
    Cancel,
    ControlRequest,
    Dropped,
    Error,
    Evict,
    Fault,
    Hello,
    PagerHello,
    PagerReady,
    PagerRequest,
    Reply,
    Statfs,
    Target,
    UnmapAck,
)
from dax_mp.requests import REQUESTS, copy_vma, remove_vma
from dax_mp.session import Session, SessionState
from dax_mp.transaction import Steps
from dax_mp.validate import validate


class Coordinator:
    """The coordinator of one device.

    device: its frames and memory. ack_timeout_s: how long a process has to acknowledge an Unmap before it is evicted.
    welcome: the reply to Hello, filled in by the daemon. debug: check every invariant after every event.
    """

    def __init__(
        self, device: Device, ack_timeout_s: float, welcome: dict[str, Any] | None = None, debug: bool = False
    ) -> None:
        self.fs = FileSystem(device, ack_timeout_s)
        self.sessions: dict[bytes, Session] = {}
        self.welcome = welcome if welcome is not None else {}
        self._ack_timeout_s = ack_timeout_s
        self._debug = debug

    def take_effects(self) -> list[Effect]:
        """What is to be done now, in this order; each is given once."""
        if not self.fs.effects:
            return []
        effects = self.fs.effects.copy()
        self.fs.effects.clear()
        return effects

    def has_session(self, token: bytes) -> bool:
        return token in self.sessions

    def session_opened(self, token: bytes, pid: int) -> None:
        """Process `pid` holds the lock of the session `token`."""
        assert token not in self.sessions, f"session {token.hex()} opened twice"
        self.sessions[token] = Session(token, pid)

    def session_gone(self, token: bytes) -> None:
        """The session's process is dead, or has said Bye: it holds no translation and no lock."""
        session = self.sessions.pop(token)
        session.state = SessionState.GONE
        self.fs.effects.append(EndSession(token))
        self._let_go(session)
        self.fs.unmapper.session_over(session)
        self._holds_nothing(session)
        self._settle()

    def protocol_error(self, token: bytes, error: ProtocolError) -> None:
        """The session has sent what the protocol does not allow: it is evicted with that error's errno."""
        self.fs.counters["protocol_errors"] += 1
        self._evict(self.sessions[token], error.errno or errno.EPROTO)
        self._settle()

    def tick(self, now_s: float) -> None:
        """It is `now_s`, on a clock that never goes back."""
        fs = self.fs
        fs.timers.tick(now_s)
        if fs.unmapper.outstanding or fs.leases:
            for session in (*fs.unmapper.overdue(self._ack_timeout_s), *direct_io.overdue(fs)):
                self._evict(session, errno.ESTALE)
        if fs.scheduler.ready:
            self._settle()

    def next_deadline_s(self) -> float | None:
        """When `tick` is due at the latest; None when nothing waits for a deadline."""
        oldest_s = self.fs.unmapper.oldest_sent_s()
        deadlines_s = (
            None if oldest_s is None else oldest_s + self._ack_timeout_s,
            self.fs.timers.next_s(),
            direct_io.next_deadline_s(self.fs),
        )
        return min((deadline_s for deadline_s in deadlines_s if deadline_s is not None), default=None)

    # --- control ---------------------------------------------------------------------------------------------------

    def receive_control(self, token: bytes, peer: bytes, request: ControlRequest) -> None:
        """A request of the session `token`, to be answered to `peer`."""
        session = self.sessions[token]
        if type(request) in REQUESTS:
            self.fs.scheduler.start(self._perform(session, peer, request))
        elif isinstance(request, Hello):
            self._reply(peer, request.request_id, self.welcome)
        elif isinstance(request, Bye):
            self._reply(peer, request.request_id, None)
            self.session_gone(token)
        elif isinstance(request, Adopt):
            self._adopt(session, peer, request)
        elif isinstance(request, Cancel):
            self._cancel(session, peer, request)
        else:
            assert isinstance(request, Statfs)
            self._reply(peer, request.request_id, self._statfs())
        self._settle()

    def _adopt(self, session: Session, peer: bytes, request: Adopt) -> None:
        """The session is a fork's child: give it what its parent has, as dup_mmap() and dup_fd() do."""
        parent = self.sessions.get(request.parent_token)
        if parent is None or parent.ended:
            code = errno.ENOENT
        elif parent is session or session.ended or session.handles or session.vmas:
            code = errno.EINVAL
        else:
            session.next_handle = parent.next_handle
            session.handles = {number: self.fs.get(inode) for number, inode in parent.handles.items()}
            copies = [
                number
                for vma in parent.vmas.values()
                for number in (vma.vma_id, copy_vma(self.fs, session, vma, request.last_unmap))
            ]
            self._reply(peer, request.request_id, copies)
            return
        answer = Error(request.request_id, code, "the parent's session cannot be taken over")
        self.fs.effects.append(SendControl(peer, answer))

    def _perform(self, session: Session, peer: bytes, request: ControlRequest) -> Steps[None]:
        """Carry out the request and answer; it holds the files that it is about until the end, whoever closes them."""
        inodes = [self.fs.get(inode) for inode in _inodes_of(session, request)]
        try:
            if session.evicted:
                raise os_error(session.evict_errno, "the coordinator has evicted this session; connect() again")
            acquisition = acquisitions.begin(session, peer, request)
            value = yield from self._value(session, request)
            if acquisition is not None and (release := acquisitions.acquired(acquisition, request, value)):
                yield from self._release(session, release)
                raise os_error(errno.ECANCELED)
            self._reply(peer, request.request_id, value)
        except OSError as error:
            code = error.errno or errno.EIO
            answer = Error(request.request_id, code, error.strerror or os.strerror(code))
            self.fs.effects.append(SendControl(peer, answer))
        finally:
            for inode in inodes:
                self.fs.put(inode)

    def _value(self, session: Session, request: ControlRequest) -> Steps[Any]:
        value = REQUESTS[type(request)](self.fs, session, request)
        if isinstance(value, Generator):
            value = yield from value
        return value

    def _release(self, session: Session, release: ControlRequest) -> Steps[None]:
        try:
            yield from self._value(session, release)
        except OSError:
            pass  # the client has released it, or the session has ended

    def _cancel(self, session: Session, peer: bytes, request: Cancel) -> None:
        if release := acquisitions.cancel(session, peer, request.target_id):
            self.fs.scheduler.start(self._release(session, release))
        self._reply(peer, request.request_id, None)

    def _reply(self, peer: bytes, request_id: int, value: Any) -> None:
        self.fs.effects.append(SendControl(peer, Reply(request_id, value)))

    def _statfs(self) -> dict[str, Any]:
        device = self.fs.device
        dram = device.dram_frames
        return {
            "page_size": device.page_size,
            "hole_policy": device.hole_policy_name,
            "pages": device.pmem_pages,
            "pages_free": device.frames.free_pages,
            "pages_quarantined": device.frames.quarantined_pages,
            "dram_pages": device.dram_pages,
            "dram_pages_free": dram.free_pages if dram is not None else 0,
            "files": len(self.fs.names),
            "sessions": len(self.sessions),
            "handles": sum(len(session.handles) for session in self.sessions.values()),
            "vmas": sum(len(session.vmas) for session in self.sessions.values()),
            "counters": self.fs.counters.copy(),
        }

    # --- pager -----------------------------------------------------------------------------------------------------

    def receive_pager(self, token: bytes, message: PagerRequest) -> None:
        """A message of the session's pager. One that breaks the protocol evicts the session."""
        session = self.sessions[token]
        try:
            if isinstance(message, Fault):
                self._fault(session, message)
            elif isinstance(message, UnmapAck):
                self._unmap_ack(session, message)
            elif isinstance(message, PagerHello):
                self._pager_hello(session, message)
            else:
                self._dropped(session, message)
        except ProtocolError as error:
            self.protocol_error(token, error)
        self._settle()

    def _fault(self, session: Session, fault: Fault) -> None:
        if session.state is not SessionState.SERVING:
            if session.evicted:
                return  # its pager fails every fault itself once it has the Evict
            raise ProtocolError("a fault before PagerHello")
        if session.faults >= FAULTS_PER_SESSION_MAX:
            raise ProtocolError(f"more than {FAULTS_PER_SESSION_MAX} faults at once")
        vma = session.vmas.get(fault.vma_id)
        if vma is None:
            return  # unmapped since: the pager, which has dropped the window, is not waiting
        if fault.pgoff < vma.pgoff:  # one past its end may have been on its way when the VMA shrank
            raise ProtocolError(f"a fault at page {fault.pgoff}, outside VMA {fault.vma_id}")
        if fault.write and not vma.writable:
            raise ProtocolError(f"a write fault in the read-only VMA {fault.vma_id}")
        self.fs.scheduler.start(handle_fault(self.fs, vma, fault))

    def _unmap_ack(self, session: Session, ack: UnmapAck) -> None:
        # An evicted session's acknowledgement may come too late to be waited for; it has no request any more.
        if not self.fs.unmapper.acknowledged(session, ack.request_id) and not session.evicted:
            raise ProtocolError(f"an acknowledgement of {ack.request_id}, which was not asked for")

    def _pager_hello(self, session: Session, hello: PagerHello) -> None:
        if session.state is not SessionState.OPENED or hello.version != PROTOCOL_VERSION:
            raise ProtocolError(f"PagerHello of version {hello.version} in state {session.state.name}")
        session.state = SessionState.SERVING
        self.fs.send_pager(session, PagerReady(PROTOCOL_VERSION))

    def _dropped(self, session: Session, _message: Dropped) -> None:
        if not session.evicted:
            raise ProtocolError("Dropped from a session that was not evicted")
        session.state = SessionState.DROPPED
        self._holds_nothing(session)

    # --- ends ------------------------------------------------------------------------------------------------------

    def _evict(self, session: Session, code: int) -> None:
        """End the session without its consent. It may still hold what translations it has now, and gets no other."""
        if session.evicted:
            return
        self.fs.counters["evictions"] += 1
        self.fs.send_pager(session, Evict(code))
        session.state = SessionState.EVICTED
        session.evict_errno = code
        self.fs.device.hold(session.token, session.reach(Target.PMEM), session.reach(Target.DRAM))
        self._let_go(session)
        self.fs.unmapper.session_over(session)

    def _let_go(self, session: Session) -> None:
        """Take back what the session keeps others from: what it was lent, its pins, its handles."""
        direct_io.abort_all(self.fs, session)
        for pin_id, pinned in list(session.pins.items()):
            pins.unpin(pinned.vma, pin_id)
        handles, session.handles = session.handles, {}
        for inode in handles.values():
            self.fs.put(inode)

    def _holds_nothing(self, session: Session) -> None:
        """The process has no translation left: its VMAs leave the rmap, and what only it held back is free."""
        for vma in list(session.vmas.values()):
            remove_vma(self.fs, vma)
        self.fs.device.holder_gone(session.token)

    def _settle(self) -> None:
        if self.fs.scheduler.ready:
            self.fs.scheduler.run()
        if self._debug:
            validate(self.fs, self.sessions)


def _inodes_of(session: Session, request: ControlRequest) -> Iterator[Inode]:
    """The files that a request names by handles or by a VMA."""
    for field in ("handle", "source_handle"):
        if inode := session.handles.get(getattr(request, field, 0)):  # handles start at 1
            yield inode
    if vma := session.vmas.get(getattr(request, "vma_id", 0)):
        yield vma.inode
