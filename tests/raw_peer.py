"""A client that is nothing but sockets: it sends what a test tells it to, right or wrong."""

import fcntl
import os
import secrets
import subprocess
import sys
from types import TracebackType
from typing import Any, Final, Self

import zmq

from dax_mp import messages
from dax_mp.endpoint import control_address, pager_address, session_path

ANSWER_TIMEOUT_MS: Final = 30_000

_HOLD_LOCK: Final = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR, 0o600)
fcntl.lockf(fd, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


class RawPeer:
    """A session's sockets in this process; `process` is another one, which holds the session's file locked.

    locked: False leaves the file out.
    """

    def __init__(self, endpoint: str, *, locked: bool = True) -> None:
        self.endpoint = endpoint
        self.token = secrets.token_bytes(messages.TOKEN_BYTES)
        self.session_path = session_path(endpoint, self.token)
        self.process: subprocess.Popen[str] | None = self._hold_lock() if locked else None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self.control = self.connect(control_address(endpoint), self.token + b"control")
        self.pager = self.connect(pager_address(endpoint), self.token)

    def connect(self, address: str, identity: bytes | None) -> "zmq.Socket[bytes]":
        """One more socket, closed with the others. identity: None leaves it to the coordinator's ZeroMQ."""
        socket = self._context.socket(zmq.DEALER)
        self._sockets.append(socket)
        if identity is not None:
            socket.setsockopt(zmq.ROUTING_ID, identity)
        socket.rcvtimeo = ANSWER_TIMEOUT_MS
        socket.connect(address)
        return socket

    def _hold_lock(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", "-c", _HOLD_LOCK, self.session_path]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        return process

    def lock_here(self) -> int:
        """Hold the session's file locked by this process. Returns the descriptor."""
        fd = os.open(self.session_path, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd

    def send(self, request: messages.ControlRequest) -> None:
        self.control.send(messages.encode(request))

    def answer(self) -> Any:
        """The next message on the control socket."""
        return messages.decode(self.control.recv())

    def request(self, request: messages.ControlRequest) -> Any:
        """The value of the Reply, or the Error."""
        self.send(request)
        answer = self.answer()
        assert answer.request_id == request.request_id, f"{answer} to {request}"
        return answer.value if isinstance(answer, messages.Reply) else answer

    def hello(self) -> Any:
        return self.request(messages.Hello(1, messages.PROTOCOL_VERSION))

    def open_pager(self) -> None:
        """Say PagerHello; the session serves from now on. Precondition: `hello`."""
        self.order(messages.PagerHello(messages.PROTOCOL_VERSION))
        assert self.next_order() == messages.PagerReady(messages.PROTOCOL_VERSION)

    def order(self, message: messages.PagerRequest) -> None:
        self.pager.send(messages.encode(message))

    def next_order(self) -> Any:
        """The next message on the pager socket."""
        return messages.decode(self.pager.recv())

    def map_page(self, name: str, size_bytes: int) -> int:
        """Create or open the file, give it that size, map it all and fault its first page in. Returns the handle."""
        handle: int = self.request(messages.Open(1, name, messages.OpenFlag.CREATE))[0]
        self.request(messages.Truncate(1, handle, size_bytes))
        access = messages.Access.READ | messages.Access.WRITE
        vma_id = self.request(messages.Mmap(1, handle, 0, 1, access, 0))
        self.order(messages.Fault(1, vma_id, 0, 1))
        assert isinstance(self.next_order(), messages.Map)
        return handle

    def kill(self) -> None:
        """The session's process dies."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self._context.destroy(linger=0)
        if self.process is not None:
            with self.process:
                self.process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
