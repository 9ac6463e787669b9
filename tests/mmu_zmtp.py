"""Scenarios of the native part: the other side of its socket, byte by byte.

The other side is a thread here: a pager that connects, and an access by memset, leave the GIL to it.
"""

import ctypes
import errno
import os
import random
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import pytest

from dax_mp import messages, mmu
from dax_mp.messages import Access, Target
from mmu_rig import PAGE, VMA, Rig, failure_of, scenario

MORE: Final = 1
COMMAND: Final = 4
GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(48)
READY: Final = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER"

Serve = Callable[[socket.socket], None]


def frame(body: bytes, flags: int = 0) -> bytes:
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return struct.pack(">BQ", flags | 2, len(body)) + body


def pager_ready(version: int = messages.PROTOCOL_VERSION) -> bytes:
    return frame(messages.encode(messages.PagerReady(version)))


def opening(ready: bytes = READY) -> bytes:
    return GREETING + frame(ready, COMMAND) + pager_ready()


@contextmanager
def peer(serve: Serve) -> Iterator[str]:
    """The path of a socket at which one connection is served, in a thread."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(directory, "s")
        listener.bind(path)
        listener.listen()

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        yield path
        thread.join()


def until_closed(connection: socket.socket) -> None:
    with suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass


def receive(connection: socket.socket, count: int) -> bytes:
    data = connection.recv(count, socket.MSG_WAITALL)
    assert len(data) == count, data
    return data


def receive_frame(connection: socket.socket) -> tuple[int, bytes]:
    flags, length = receive(connection, 2)
    return flags, receive(connection, length)


@scenario
def what_the_pager_sends(rig: Rig) -> None:
    """To the letter of ZMTP 3.0, whatever it has received."""
    token = b"0123456789abcdef"
    received: list[object] = []

    def serve(connection: socket.socket) -> None:
        received.append(receive(connection, 64))
        connection.sendall(GREETING)
        received.append(receive_frame(connection))
        connection.sendall(frame(READY, COMMAND))
        received.append(receive_frame(connection))
        connection.sendall(pager_ready())
        until_closed(connection)

    with peer(serve) as path:
        rig.new_pager(path=path, token=token).close()
    assert received == [
        b"\xff" + bytes(7) + b"\x01\x7f\x03\x00NULL" + bytes(48),
        (COMMAND, b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x10" + token),
        (0, messages.encode(messages.PagerHello(messages.PROTOCOL_VERSION))),
    ]


@scenario
def peers_that_are_not_zeromq(rig: Rig) -> None:
    for opens, error in (
        (b"", errno.ECONNRESET),
        (GREETING[:63], errno.ECONNRESET),
        (GREETING, errno.ECONNRESET),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100), errno.EPROTO),
        (GREETING.replace(b"NULL", b"NULK"), errno.EPROTO),
        (GREETING.replace(b"\x7f\x03", b"\x7f\x02"), errno.EPROTO),
        (opening(b"\x05ERROR\x07private"), errno.EPROTO),
        (opening(b"\x05REA"), errno.EPROTO),
        (GREETING + frame(READY), errno.EPROTO),
        (GREETING + frame(READY, COMMAND) + pager_ready(messages.PROTOCOL_VERSION + 1), errno.EPROTO),
        (GREETING + frame(READY, COMMAND) + frame(b"garbage"), errno.EPROTO),
        (GREETING + frame(READY, COMMAND) + frame(messages.encode(messages.Evict(errno.EBUSY))), errno.EBUSY),
        (GREETING + b"\x06" + b"\xff" * 8, errno.EPROTO),
    ):

        def serve(connection: socket.socket, opens: bytes = opens) -> None:
            connection.sendall(opens)
            connection.shutdown(socket.SHUT_WR)
            until_closed(connection)

        with peer(serve) as path, pytest.raises(OSError) as raised:
            rig.new_pager(path=path)
        assert raised.value.errno == error, (opens, raised.value)


@scenario
def peers_that_say_nothing_more(rig: Rig) -> None:
    whole = opening()
    for length in (0, 63, 64, 70, len(whole) - 1):

        def serve(connection: socket.socket, length: int = length) -> None:
            with suppress(BrokenPipeError):  # it has waited long enough already
                connection.sendall(whole[:length])
            until_closed(connection)

        with peer(serve) as path, pytest.raises(TimeoutError):
            rig.new_pager(path=path, timeout_ms=20)


def faulting(rig: Rig, path: str, access: Callable[[mmu.Window], object]) -> mmu.Pager:
    """A pager at that path, after the access to a window of it."""
    pager = rig.new_pager(path=path)
    window = mmu.Window(pager, VMA, 0, 4 * PAGE, True)
    access(window)
    return pager


def store(window: mmu.Window) -> None:
    ctypes.CDLL(None).memset(ctypes.c_void_p(window.address), 7, 1)


@scenario
def frames_in_pieces_and_in_heaps(rig: Rig) -> None:
    """Where one recv() ends has nothing to do with where a frame does; and a long frame is a frame."""
    map_page = messages.Map(1, VMA, [0, 1, Target.PMEM, 4, Access.READ | Access.WRITE])
    long_map = messages.Map(999, VMA, [3, 1, Target.PMEM, 4, Access.READ] * 64)
    answers = frame(messages.encode(long_map)) * 200 + frame(messages.encode(map_page))
    for piece in (1, 7, 4096, len(answers)):
        rig.region[3 * PAGE] = 0

        def serve(connection: socket.socket, piece: int = piece) -> None:
            connection.sendall(opening())
            receive(connection, 64)
            for _ in range(3):
                receive_frame(connection)
            for at in range(0, len(answers), piece):
                connection.sendall(answers[at : at + piece])
            until_closed(connection)

        with peer(serve) as path:
            pager = faulting(rig, path, store)
            assert rig.region[3 * PAGE] == 7
            assert pager.errno == 0
            pager.close()


@scenario
def frames_that_may_not_come(rig: Rig) -> None:
    answer = messages.encode(messages.Map(1, VMA, [0, 1, Target.PMEM, 4, Access.READ | Access.WRITE]))
    noise = random.Random(7)
    for frames in (
        frame(b"\x04PING\0\0", COMMAND),
        frame(answer, MORE),
        struct.pack(">BQ", 2, 1 << 63),
        struct.pack(">BQ", 2, 32769),
        frame(bytes(32768)),
        frame(b""),
        *(frame(noise.randbytes(noise.randrange(1, 40))) for _ in range(100)),
    ):

        def serve(connection: socket.socket, frames: bytes = frames) -> None:
            connection.sendall(opening())
            receive(connection, 64)
            for _ in range(3):
                receive_frame(connection)
            connection.sendall(frames)
            until_closed(connection)

        with peer(serve) as path:
            pager = faulting(rig, path, lambda window: failure_of(lambda: store(window)))
            assert pager.errno == errno.EPROTO, frames
            pager.close()


@scenario
def noise(rig: Rig) -> None:
    """Whatever comes, the fault ends: in a page or in an error."""
    source = random.Random(11)
    for _ in range(200):

        def serve(connection: socket.socket) -> None:
            connection.sendall(opening())
            receive(connection, 64)
            for _ in range(3):
                receive_frame(connection)
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(source.randbytes(source.randrange(1, 70_000)))
                connection.shutdown(socket.SHUT_WR)
            until_closed(connection)

        with peer(serve) as path:
            pager = faulting(rig, path, lambda window: failure_of(lambda: store(window)))
            assert pager.errno in (errno.EPROTO, errno.EIO)
            pager.close()


@scenario
def a_peer_that_does_not_read(rig: Rig) -> None:
    """The socket's buffer is full of faults: threads wait, and close() ends that."""
    full, done = threading.Event(), threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.sendall(opening())
        acks = frame(messages.encode(messages.Unmap(1, 0, [VMA, 0, 1])))
        connection.settimeout(0.5)
        try:
            while True:
                connection.sendall(acks * 100)
        except TimeoutError:  # the pager cannot send its acknowledgements, and reads no more
            full.set()
        done.wait()

    with peer(serve) as path:
        pager = rig.new_pager(path=path)
        window = mmu.Window(pager, VMA, 0, PAGE, True)
        full.wait()
        results: list[OSError] = []
        thread = threading.Thread(target=lambda: results.append(failure_of(lambda: store(window))))
        thread.start()
        pager.close()
        thread.join()
        assert results[0].errno == errno.ESTALE
        done.set()
