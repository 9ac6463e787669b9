"""One client's connection: ZMTP 3.0 (https://rfc.zeromq.org/spec/23/) from the side that libzmq calls a ROUTER.

A greeting and a READY command each way (mechanism NULL), then messages: frames of flags, length (one byte, or eight
where the flags say so) and body. The peer is a DEALER: `clients/zmtp.py`, `dax_mp/mmu/zmtp.c`, or libzmq's own.

What a peer can make this side keep is bounded: a handshake of HANDSHAKE_BYTES_MAX; one frame of MESSAGE_BYTES_MAX; of a
message of several frames, which none of ours has, nothing but how long it is, and that is bounded too.
"""

import errno
import socket
from collections import deque
from typing import Final

from dax_mp.errors import ProtocolError, os_error
from dax_mp.limits import MESSAGE_BYTES_MAX

_MORE: Final = 1
_LONG: Final = 2
_COMMAND: Final = 4
_SHORT_BYTES_MAX: Final = 255
_GREETING: Final = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_MAJOR: Final = 10
_MECHANISM: Final = slice(12, 32)
_READY: Final = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER\x08Identity\x00\x00\x00\x00"
_OPENING: Final = _GREETING + bytes((_COMMAND, len(_READY))) + _READY

HANDSHAKE_BYTES_MAX: Final = 1024
RECEIVE_BYTES: Final = 1 << 18
_buffer: Final = bytearray(RECEIVE_BYTES)
_view: Final = memoryview(_buffer)


class Connection:
    """A connection that has just been accepted. After any exception it is to be closed.

    pid: of the process that made it.
    identity: what its peer calls itself in its READY; None until then.
    """

    __slots__ = ("_out", "_parts_bytes", "_received", "fd", "identity", "pid", "socket")

    def __init__(self, accepted: socket.socket, pid: int) -> None:
        self.socket = accepted
        self.pid = pid
        self.fd = accepted.fileno()
        self.identity: bytes | None = None
        self._received = bytearray()
        self._parts_bytes = 0  # of a message of several frames that has not ended
        self._out: deque[memoryview] = deque()
        accepted.setblocking(False)
        accepted.send(_OPENING)  # a new socket's buffer has room for it

    def receive(self) -> list[bytes]:
        """The messages that have come in whole: of each its one frame, or no bytes where it has several.

        Raises ProtocolError, OSError (ConnectionError when the other side has closed it).
        """
        try:
            count = self.socket.recv_into(_buffer)
        except BlockingIOError:
            return []
        if not count:
            raise os_error(errno.ECONNRESET, "the peer has closed the connection")
        between = self.identity is not None and not self._received and not self._parts_bytes
        if between and _buffer[0] == 0 and count == _buffer[1] + 2:  # one short message, as most are
            return [bytes(_view[2:count])]
        self._received += _view[:count]
        if self.identity is None and not self._shake_hands():
            return []
        messages: list[bytes] = []
        taken_bytes = 0
        while (frame := self._frame_at(taken_bytes)) is not None:
            flags, body, end = frame
            if flags & _COMMAND:
                raise ProtocolError("a command after the handshake")
            if flags & _MORE or self._parts_bytes:
                self._parts_bytes += end - taken_bytes
                if self._parts_bytes > MESSAGE_BYTES_MAX:
                    raise ProtocolError("a message of frames without end")
                if not flags & _MORE:
                    self._parts_bytes = 0
                    messages.append(b"")
            else:
                messages.append(bytes(memoryview(self._received)[body:end]))
            taken_bytes = end
        del self._received[:taken_bytes]
        return messages

    def send(self, message: bytes, queue_messages: int) -> bool:
        """Send it now, or when the socket has room: see `flush`. False where `queue_messages` wait for that already.

        Raises OSError where the connection is gone.
        """
        length = len(message)
        head = bytes((0, length)) if length <= _SHORT_BYTES_MAX else bytes((_LONG,)) + length.to_bytes(8, "big")
        frame = head + message
        sent_bytes = 0
        if not self._out:
            try:
                sent_bytes = self.socket.send(frame)
            except BlockingIOError:
                pass
        elif len(self._out) >= queue_messages:
            return False
        if sent_bytes < len(frame):
            self._out.append(memoryview(frame)[sent_bytes:])
        return True

    @property
    def waits_for_room(self) -> bool:
        """There is something to `flush` when the socket is writable."""
        return bool(self._out)

    def flush(self) -> None:
        """Send what waits, as far as there is room. Raises OSError where the connection is gone."""
        try:
            while self._out:
                sent_bytes = self.socket.send(self._out[0])
                if sent_bytes < len(self._out[0]):
                    self._out[0] = self._out[0][sent_bytes:]
                else:
                    self._out.popleft()
        except BlockingIOError:
            pass

    def close(self) -> None:
        self.socket.close()

    def _shake_hands(self) -> bool:
        """Take the peer's greeting and READY where they have come; False where they have not."""
        greeting = self._received[: len(_GREETING)]
        if greeting[0] != _GREETING[0]:
            raise ProtocolError("a peer that does not speak ZMTP")
        if len(greeting) < len(_GREETING):
            return False
        if greeting[_MAJOR] < _GREETING[_MAJOR] or greeting[_MECHANISM] != _GREETING[_MECHANISM]:
            raise ProtocolError("a peer that does not speak ZMTP 3 without security")
        frame = self._frame_at(len(_GREETING), HANDSHAKE_BYTES_MAX)
        if frame is None:
            return False
        flags, body, end = frame
        if not flags & _COMMAND:
            raise ProtocolError("a message before READY")
        self.identity = _identity(bytes(self._received[body:end]))
        del self._received[:end]
        return True

    def _frame_at(self, at: int, bytes_max: int = MESSAGE_BYTES_MAX) -> tuple[int, int, int] | None:
        """The frame there: its flags, where its body begins, and where it ends. None where it has not come whole."""
        received = self._received
        left = len(received) - at
        if left < 2:
            return None
        flags = received[at]
        if flags & ~(_MORE | _LONG | _COMMAND):
            raise ProtocolError("a frame with flags that there are none of")
        if flags & _LONG:
            if left < 9:
                return None
            body, length = at + 9, int.from_bytes(received[at + 1 : at + 9], "big")
        else:
            body, length = at + 2, received[at + 1]
        if length > bytes_max:
            raise ProtocolError(f"a frame of {length} bytes")
        return (flags, body, body + length) if len(received) >= body + length else None


def _identity(ready: bytes) -> bytes:
    """What a READY command says under Identity; no bytes where it says nothing. Raises ProtocolError."""
    if not ready.startswith(b"\x05READY"):
        raise ProtocolError("a handshake without READY")
    at, properties = 6, {}
    while at < len(ready):
        name_end = at + 1 + ready[at]
        value_start = name_end + 4
        value_end = value_start + int.from_bytes(ready[name_end:value_start], "big")
        if value_end > len(ready):
            raise ProtocolError("a READY that ends in the middle")
        properties[ready[at + 1 : name_end].lower()] = ready[value_start:value_end]
        at = value_end
    if properties.get(b"socket-type") != b"DEALER":
        raise ProtocolError("a peer that is no DEALER")
    return properties.get(b"identity", b"")
