"""What peers send that they should not: each gets its answer, and the coordinator and the others go on."""

import errno
import os
import secrets
from collections.abc import Iterator

import pytest
import zmq

from coordinator_process import Serve, wait_until
from dax_mp import messages
from dax_mp.endpoint import control_address, pager_address
from dax_mp.limits import IO_CHUNK_BYTES_MAX, MESSAGE_BYTES_MAX
from raw_peer import RawPeer

GARBAGE = [
    [b""],
    [b"\xc1"],
    [b"\x90"],
    [b"hello, is this a web server?"],
    [b"\x92\x00\x01"],
    [b"\xcd\xff\xff"],
    [b"\x91\xc0"],
    [b"\xdd\xff\xff\xff\xff"],
    [messages.encode(messages.Statfs(1)) + b"\x00"],
    [messages.encode(messages.Reply(1, None))],
    [messages.encode(messages.PagerReady(1))],
    [b"", messages.encode(messages.Statfs(1))],
    [messages.encode(messages.Statfs(1)), messages.encode(messages.Statfs(2))],
    [b"x"] * 1000,
    [b"\x00" * MESSAGE_BYTES_MAX],
]


@pytest.fixture
def witness(serve: Serve) -> Iterator[RawPeer]:
    """A well-behaved client, which must not notice any of it."""
    with RawPeer(serve().endpoint) as peer:
        peer.hello()
        peer.open_pager()
        handle = peer.map_page("witness", 1)
        assert peer.request(messages.Write(1, handle, 0, 0, b"!")) == 1
        yield peer
        assert peer.request(messages.Read(1, handle, 0, 10)) == b"!"
        peer.order(messages.Fault(2, 1, 0, 1))
        assert isinstance(peer.next_order(), messages.Map)


def protocol_errors(peer: RawPeer) -> int:
    count: int = peer.request(messages.Statfs(1))["counters"]["protocol_errors"]
    return count


@pytest.mark.parametrize("frames", GARBAGE)
def test_garbage_on_the_control_socket_is_answered(witness: RawPeer, frames: list[bytes]) -> None:
    with RawPeer(witness.endpoint) as peer:
        peer.hello()
        peer.control.send_multipart(frames)
        answer = peer.answer()
        assert (answer.request_id, answer.errno) == (0, errno.EPROTO), answer
        assert isinstance(peer.request(messages.Open(2, "still here", 1)), list)


@pytest.mark.parametrize("frames", GARBAGE)
def test_garbage_on_the_pager_socket_evicts_the_session(witness: RawPeer, frames: list[bytes]) -> None:
    with RawPeer(witness.endpoint) as peer:
        peer.hello()
        peer.open_pager()
        peer.pager.send_multipart(frames)
        assert peer.next_order() == messages.Evict(errno.EPROTO)
        refused = peer.request(messages.Open(2, "too late", 1))
        assert (type(refused), refused.errno) == (messages.Error, errno.EPROTO)


def test_a_message_of_the_largest_size_is_taken_and_a_larger_one_ends_the_connection(witness: RawPeer) -> None:
    with RawPeer(witness.endpoint) as peer:
        peer.hello()
        handle = peer.request(messages.Open(1, "large", 1))[0]
        data = secrets.token_bytes(IO_CHUNK_BYTES_MAX)
        assert peer.request(messages.Write(1, handle, 0, 0, data)) == len(data)
        assert peer.request(messages.Read(1, handle, 0, len(data))) == data
        for socket in (peer.control, peer.pager):
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            socket.send(bytes(MESSAGE_BYTES_MAX + 1))
            assert monitor.poll(60_000), "the coordinator has not dropped the connection"
            socket.disable_monitor()
            monitor.close()


@pytest.mark.parametrize("version", [0, messages.PROTOCOL_VERSION + 1, (1 << 32) - 1])
def test_another_version_is_told_so(witness: RawPeer, version: int) -> None:
    with RawPeer(witness.endpoint) as peer:
        refused = peer.request(messages.Hello(7, version))
        assert (type(refused), refused.errno) == (messages.Error, errno.EPROTO)
        assert f"version {messages.PROTOCOL_VERSION} " in refused.text
        assert f"version {version}:" in refused.text
        assert isinstance(peer.request(messages.Statfs(1)), messages.Error), "there is no session"
        assert peer.hello()["version"] == messages.PROTOCOL_VERSION


def test_a_pager_of_another_version_is_evicted(witness: RawPeer) -> None:
    with RawPeer(witness.endpoint) as peer:
        peer.hello()
        peer.order(messages.PagerHello(messages.PROTOCOL_VERSION + 1))
        assert peer.next_order() == messages.Evict(errno.EPROTO)


def test_a_request_before_hello_is_refused(witness: RawPeer) -> None:
    with RawPeer(witness.endpoint) as peer:
        refused = peer.request(messages.Open(3, "file", 1))
        assert (type(refused), refused.errno) == (messages.Error, errno.EPROTO)
        assert "Hello" in refused.text


def test_an_identity_without_a_token_is_refused(witness: RawPeer) -> None:
    for identity in (b"short", witness.token, None):
        socket = witness.connect(control_address(witness.endpoint), identity)
        socket.send(messages.encode(messages.Hello(9, messages.PROTOCOL_VERSION)))
        refused = messages.decode(socket.recv())
        assert (type(refused), refused.request_id, refused.errno) == (messages.Error, 9, errno.EPROTO)
        assert "identity" in refused.text


def test_strangers_on_the_pager_socket_are_counted_and_not_answered(witness: RawPeer) -> None:
    before = protocol_errors(witness)
    stranger = witness.connect(pager_address(witness.endpoint), os.urandom(messages.TOKEN_BYTES))
    nameless = witness.connect(pager_address(witness.endpoint), None)
    for socket in (stranger, nameless):
        socket.send(messages.encode(messages.PagerHello(messages.PROTOCOL_VERSION)))
        socket.send(b"garbage")
    wait_until(lambda: protocol_errors(witness) == before + 4)  # the sockets are not in order with each other
    for socket in (stranger, nameless):
        assert not socket.poll(0)
