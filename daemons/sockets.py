"""The coordinator's two sockets: bytes in and out, never waiting for a peer that is gone or does not read.

Each is what libzmq calls a ROUTER: a listening Unix socket, and of each connection the identity by which it is spoken
to. libzmq itself is not used. It accepts whoever comes, and ends the process when no descriptor is left for that. It
puts no bound on a message of many frames. And its I/O thread makes two more wake-ups of each request.

A connection is a stranger until the loop says that it belongs to a session (`settle`). There are places for a few
strangers, and each has one for HANDSHAKE_TIMEOUT_S at most; meanwhile others wait in the listener's queue.
"""

import logging
import os
import select
import socket
import struct
from collections import deque
from typing import Final

from dax_mp.daemons.connection import Connection
from dax_mp.daemons.descriptors import CONNECTION_DESCRIPTORS, Descriptors
from dax_mp.daemons.log import event, process_name

HANDSHAKE_TIMEOUT_S: Final = 10.0
"""How long a connection may be a stranger's."""
ACCEPT_PAUSE_S: Final = 1.0
"""After the system, not this process, had no descriptor left."""
EVENTS_MAX: Final = 64
BACKLOG: Final = 4096
"""As much as net.core.somaxconn allows."""

_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_READABLE: Final = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR


class Router:
    """A bound socket, its file our user's alone.

    directory: a descriptor on where it lies. name: of its file. queue_messages: how many messages to one peer wait in
    memory before `send` says that it does not read. counted: a settled connection takes room in `descriptors` for as
    long as it lasts; else its session has taken it. Raises OSError where it cannot be bound.
    """

    def __init__(
        self, directory: int, name: str, queue_messages: int, descriptors: Descriptors, *, counted: bool
    ) -> None:
        self._queue_messages = queue_messages
        self._descriptors = descriptors
        self._counted = counted
        self._connections: dict[int, Connection] = {}
        self._by_identity: dict[bytes, Connection] = {}
        self._strangers: dict[Connection, float] = {}
        self._inbox: deque[tuple[bytes, bytes]] = deque()
        self._now_s = 0.0
        self._accept_again_s = 0.0
        self._names_given = 0
        self._epoll = select.epoll()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        try:
            # By its descriptor, so that it is this directory, whatever has its name by now.
            self._listener.bind(f"/proc/self/fd/{directory}/{name}")
            self._listener.listen(BACKLOG)
        except OSError:
            self.close()
            raise
        self._epoll.register(self._listener, select.EPOLLIN)
        self._listening = True
        self.fileno = self._epoll.fileno()
        """Readable when `fill` has something to do."""

    def fill(self) -> None:
        """Receive what has come, for `next`. Precondition: `next` has given all that there was."""
        listener = self._listener.fileno()
        for fd, events in self._epoll.poll(0, EVENTS_MAX):
            if fd == listener:
                self._accept()
            elif (connection := self._connections.get(fd)) is not None:
                self._serve(connection, events)

    @property
    def has_more(self) -> bool:
        """`next` has something to give."""
        return bool(self._inbox)

    def next(self) -> tuple[bytes, bytes] | None:
        """The next message: its sender's identity and its one frame; no bytes where it has any other number of frames.

        None where there is none that has been received.
        """
        return self._inbox.popleft() if self._inbox else None

    def send(self, peer: bytes, data: bytes) -> bool:
        """False where the peer is gone, or has not read for so long that its queue is full."""
        connection = self._by_identity.get(peer)
        if connection is None:
            return False
        waited = connection.waits_for_room
        try:
            taken = connection.send(data, self._queue_messages)
        except OSError:
            self._drop(connection)
            return False
        if connection.waits_for_room and not waited:
            self._epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLOUT)
        return taken

    def settle(self, peer: bytes) -> None:
        """The connection belongs to a session from now on. Raises OSError (EMFILE) where there is no room for it."""
        connection = self._by_identity.get(peer)
        if connection in self._strangers:
            if self._counted:
                self._descriptors.take(CONNECTION_DESCRIPTORS)
            del self._strangers[connection]
            self._listen()

    def pid_of(self, peer: bytes) -> int:
        """The process that made the connection; 0 where it is gone."""
        connection = self._by_identity.get(peer)
        return connection.pid if connection is not None else 0

    def unsettle(self, peer: bytes) -> None:
        """Its session has ended: it has some time left to close the connection."""
        connection = self._by_identity.get(peer)
        if connection is not None and connection not in self._strangers:
            self._strangers[connection] = self._now_s + HANDSHAKE_TIMEOUT_S
            if self._counted:
                self._descriptors.give_back(CONNECTION_DESCRIPTORS)

    def tick(self, now_s: float) -> None:
        """It is `now_s`: strangers whose time is over are sent away."""
        self._now_s = now_s
        while self._strangers and (stranger := next(iter(self._strangers))) and self._strangers[stranger] <= now_s:
            self._drop(stranger)
        if not self._listening:
            self._listen()

    def next_deadline_s(self) -> float | None:
        """When `tick` is due at the latest; None when there is nothing to wait for."""
        deadlines_s = [self._strangers[next(iter(self._strangers))]] if self._strangers else []
        if self._accept_again_s > self._now_s:
            deadlines_s.append(self._accept_again_s)
        return min(deadlines_s, default=None)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._listener.close()
        self._epoll.close()

    def _accept(self) -> None:
        while self._may_accept():
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # ENFILE, ENOMEM: others have taken all of the machine's
                event(logging.ERROR, "accept", f"cannot accept connections for now: {error.strerror}")
                self._accept_again_s = self._now_s + ACCEPT_PAUSE_S
                break
            pid, uid, _ = _UCRED.unpack(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if uid != os.geteuid():  # has got into our directory, which only root can
                accepted.close()
                event(logging.WARNING, "refusal", f"refused {process_name(pid)} of user {uid}", pid=pid, uid=uid)
                continue
            try:
                connection = Connection(accepted, pid)
            except OSError:  # gone already
                accepted.close()
                continue
            self._connections[connection.fd] = connection
            self._strangers[connection] = self._now_s + HANDSHAKE_TIMEOUT_S
            self._epoll.register(connection.fd, select.EPOLLIN)
        self._epoll.modify(self._listener, 0)
        self._listening = False

    def _may_accept(self) -> bool:
        return len(self._strangers) < self._descriptors.strangers_max and self._accept_again_s <= self._now_s

    def _listen(self) -> None:
        """Go on accepting where that has stopped and may go on."""
        if not self._listening and self._may_accept():
            self._epoll.modify(self._listener, select.EPOLLIN)
            self._listening = True

    def _serve(self, connection: Connection, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                connection.flush()
                if not connection.waits_for_room:
                    self._epoll.modify(connection.fd, select.EPOLLIN)
            if events & _READABLE:
                new = connection.identity is None
                messages = connection.receive()
                if new and connection.identity is not None and not self._name(connection):
                    self._drop(connection)
                    return
                identity = connection.identity
                if identity is not None:
                    self._inbox.extend((identity, message) for message in messages)
        except OSError:
            self._drop(connection)

    def _name(self, connection: Connection) -> bool:
        """Enter the connection under its identity, one of our own where it has none. False where that is taken."""
        if not connection.identity:
            self._names_given += 1
            connection.identity = b"\0" + self._names_given.to_bytes(4, "big")
        if connection.identity in self._by_identity:
            return False
        self._by_identity[connection.identity] = connection
        return True

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection.fd]
        if connection.identity is not None and self._by_identity.get(connection.identity) is connection:
            del self._by_identity[connection.identity]
        if connection in self._strangers:
            del self._strangers[connection]
        elif self._counted:
            self._descriptors.give_back(CONNECTION_DESCRIPTORS)
        self._epoll.unregister(connection.fd)
        connection.close()
        self._listen()
