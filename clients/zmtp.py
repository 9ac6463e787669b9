"""ZMTP 3.0 (https://rfc.zeromq.org/spec/23/): a DEALER on a Unix socket, for requests to the coordinator's ROUTER.

With libzmq on this side a request would wake two threads more, its I/O thread on the way out and again on the way
back, and a fork would leave its child with the parent's threads and sockets. The part of the protocol that is needed is
small: a greeting of 64 bytes each way, a READY command each way (mechanism NULL), then messages of one frame: flags,
length (one byte, or eight where the flags say so), body. `dax_mp/mmu/zmtp.c` is the same for the pager.

Whatever waits here waits for the socket and for the descriptors it is given, which say that waiting is no use any more.

An exception of a signal handler may come between any two bytecodes, and the connection can be used afterwards: what has
been sent and what has been received is written down within the very call that sends or receives, which nothing
interrupts. `list.extend(map(send, ...))` is one bytecode, and so is `reduce(iadd, map(recv, ...), received)`.
"""

import errno
import math
import operator
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Final

from dax_mp import trust
from dax_mp.errors import ProtocolError, os_error
from dax_mp.limits import MESSAGE_BYTES_MAX

_LONG: Final = 2
_COMMAND: Final = 4
_MORE: Final = 1
_GREETING: Final = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_SHORT_BYTES_MAX: Final = 255
_RECEIVE_BYTES: Final = 1 << 16
_UCRED: Final = struct.Struct("iII")  # struct ucred: of who called listen(2), for the side that connects

CONNECT_PAUSE_MIN_S: Final = 0.001
CONNECT_PAUSE_MAX_S: Final = 0.05
"""Between two attempts to connect where the listener's queue is full."""


class Interrupted(Exception):
    """One of the descriptors that end a wait is ready, or the deadline has come; `descriptor` is None then."""

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor


class Dealer:
    """A connection. After an exception of its own it is to be closed; after others, where `sent_in_part`.

    path: the ROUTER's socket. peer_pid: the process that must be listening there, of our own user. identity: what that
    calls us. until: descriptors that, when readable, end every wait.
    Raises Interrupted, ProtocolError, OSError (ConnectionError when the other side has closed it); so do all methods.
    """

    def __init__(self, path: str, peer_pid: int, identity: bytes, until: Sequence[int], deadline: float | None) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._received = bytearray()
        self._outgoing: list[Any] = []  # the last message, and how much of it each system call has sent
        self._until = until
        self._poll_in = select.poll()
        self._poll_in.register(self._socket, select.POLLIN)
        self._poll_out = select.poll()
        self._poll_out.register(self._socket, select.POLLOUT)
        for descriptor in until:
            self._poll_in.register(descriptor, select.POLLIN)
            self._poll_out.register(descriptor, select.POLLIN)
        try:
            self._socket.setblocking(False)
            self._connect(path, deadline)
            self._check_peer(path, peer_pid)
            self._shake_hands(identity, deadline)
        except BaseException:
            self.close()
            raise

    def _connect(self, path: str, deadline: float | None) -> None:
        """connect(2), again and again while the listener's queue is full.

        A Unix socket tells nobody that there is room in it again. A connect() that waits would be told, but Python
        takes one that a signal has interrupted for done.
        """
        ends = select.poll()
        for descriptor in self._until:
            ends.register(descriptor, select.POLLIN)
        pause_s = CONNECT_PAUSE_MIN_S
        while True:
            try:
                self._socket.connect(path)
            except BlockingIOError:
                pass
            else:
                return
            left_s = math.inf if deadline is None else deadline - time.monotonic()
            ready = ends.poll(max(0.0, min(pause_s, left_s) * 1000))
            if ready or left_s <= 0:
                raise Interrupted(ready[0][0] if ready else None)
            pause_s = min(2 * pause_s, CONNECT_PAUSE_MAX_S)

    def _check_peer(self, path: str, pid: int) -> None:
        """Before anything is sent: is it the coordinator's process that listens?"""
        found = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        peer_pid, peer_uid, _ = _UCRED.unpack(found)
        trust.check_peer(path, peer_uid, os.geteuid())
        if peer_pid != pid:
            raise os_error(errno.ECONNREFUSED, f"process {peer_pid} listens there, and not {pid}", path)

    def _shake_hands(self, identity: bytes, deadline: float | None) -> None:
        ready = b"\x05READY" + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", identity)
        self._send_all(_GREETING + bytes((_COMMAND, len(ready))) + ready, deadline)
        while len(self._received) < len(_GREETING):
            self._receive_more(deadline)
        theirs = self._received[: len(_GREETING)]
        del self._received[: len(_GREETING)]
        if theirs[0] != _GREETING[0] or theirs[10] < _GREETING[10] or theirs[12:32] != _GREETING[12:32]:
            raise ProtocolError("what serves there does not speak ZMTP 3 without security")
        flags, body, end = self._next_frame(deadline)
        self.discard(end)
        if not flags & _COMMAND or not body.startswith(b"\x05READY"):
            raise ProtocolError("what serves there does not shake hands as ZMTP has it")

    def begin(self) -> None:
        """Another message is about to be sent: nothing of it has been yet."""
        self._outgoing = []

    def send(self, message: bytes, deadline: float | None = None) -> None:
        """Send a message of one frame."""
        if len(message) <= _SHORT_BYTES_MAX:
            self._send_all(bytes((0, len(message))) + message, deadline)
        else:
            self._send_all(bytes((_LONG,)) + len(message).to_bytes(8, "big") + message, deadline)

    def next_message(self, deadline: float | None = None) -> tuple[bytes, int]:
        """The next message, which must have one frame, and what `discard` is to be given. Until then it is the next."""
        flags, body, end = self._next_frame(deadline)
        if flags & (_MORE | _COMMAND):
            raise ProtocolError("a message of more than one frame")
        return body, end

    def discard(self, end: int) -> None:
        """Forget the message that `next_message` has returned."""
        del self._received[:end]

    @property
    def sent_in_part(self) -> bool:
        """Has the last message been sent in part? The other side will never see it then, nor a later one."""
        outgoing = self._outgoing
        return len(outgoing) > 1 and sum(outgoing[1:]) != len(outgoing[0])

    @property
    def sent_whole(self) -> bool:
        """Has the last message been sent?"""
        outgoing = self._outgoing
        return len(outgoing) > 1 and sum(outgoing[1:]) == len(outgoing[0])

    def close(self) -> None:
        self._socket.close()

    def _send_all(self, data: bytes, deadline: float | None) -> None:
        outgoing: list[Any] = [data]
        self._outgoing = outgoing
        send: Callable[[bytes | memoryview], int] = self._socket.send
        rest: bytes | memoryview = data
        while True:
            try:
                outgoing.extend(map(send, (rest,)))
            except BlockingIOError:
                pass
            sent_bytes = sum(outgoing[1:])
            if sent_bytes == len(data):
                return
            rest = memoryview(data)[sent_bytes:]
            self._wait(self._poll_out, deadline)

    def _next_frame(self, deadline: float | None) -> tuple[int, bytes, int]:
        """Flags, body, and where the frame ends among what has been received."""
        received = self._received
        while (head_bytes := 9 if received and received[0] & _LONG else 2) > len(received):
            self._receive_more(deadline)
        body_bytes = received[1] if head_bytes == 2 else int.from_bytes(received[1:head_bytes], "big")
        if body_bytes > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"a message of {body_bytes} bytes")
        end = head_bytes + body_bytes
        while len(received) < end:
            self._receive_more(deadline)
        return received[0], bytes(memoryview(received)[head_bytes:end]), end

    def _receive_more(self, deadline: float | None) -> None:
        self._wait(self._poll_in, deadline)
        received_bytes = len(self._received)
        reduce(operator.iadd, map(self._socket.recv, (_RECEIVE_BYTES,)), self._received)
        if len(self._received) == received_bytes:
            raise os_error(errno.ECONNRESET, "the coordinator has closed the connection")

    def _wait(self, poll: select.poll, deadline: float | None) -> None:
        """Until the socket is ready; whatever else is ready then has time."""
        timeout_ms = None if deadline is None else max(0, round((deadline - time.monotonic()) * 1000))
        ready = [descriptor for descriptor, _ in poll.poll(timeout_ms)]
        if self._socket.fileno() not in ready:
            raise Interrupted(ready[0] if ready else None)


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value
