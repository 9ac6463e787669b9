"""The coordinator's two ROUTER sockets: bytes in and out, never waiting for a peer that is gone or does not read."""

import os
from typing import Final

import zmq

from dax_mp.limits import MESSAGE_BYTES_MAX

_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_RCVMORE: Final = int(zmq.RCVMORE)


class Router:
    """A bound ROUTER. Its socket file is our user's alone.

    queue_messages: how many messages to one peer wait in memory before `send` says that it does not read.
    Raises OSError where it cannot be bound.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, queue_messages: int) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.may_have_more = True
        """There may be a message that `fileno` does not tell of: something was done after `receive` gave None."""
        self.socket.linger = 0
        self.socket.router_mandatory = 1
        self.socket.maxmsgsize = MESSAGE_BYTES_MAX
        self.socket.sndhwm = queue_messages
        mask = os.umask(0o077)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.socket.close()
            raise OSError(error.errno, f"cannot bind {address}: {error.strerror}") from error
        finally:
            os.umask(mask)
        self.fileno = int(self.socket.fd)
        """Becomes readable when something comes after `receive` gave None, if nothing else is done with the socket."""

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next message: its sender's identity and its one frame; no bytes where it has any other number of frames.

        None where there is no message: `fileno` tells of the next one.
        """
        socket = self.socket
        try:
            peer = socket.recv(_NOBLOCK)
        except zmq.Again:
            self.may_have_more = False
            return None
        data = socket.recv(_NOBLOCK)
        while socket.get(_RCVMORE):
            socket.recv(_NOBLOCK)
            data = b""
        self.may_have_more = True
        return peer, data

    def send(self, peer: bytes, data: bytes) -> bool:
        """False where the peer is gone, or has not read for so long that its queue is full."""
        self.may_have_more = True  # libzmq looks at what has come when it sends
        try:
            self.socket.send(peer, _NOBLOCK_MORE)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        self.socket.send(data, _NOBLOCK)
        return True

    def close(self) -> None:
        self.socket.close()
