"""What a coordinator does when open files run out, when many come at once, and when peers never end what they begin."""

import errno
import os
import random
import re
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

import dax_mp
from coordinator_process import Serve, serve_command, wait_until
from dax_mp import messages
from dax_mp.daemons.sockets import HANDSHAKE_TIMEOUT_S
from dax_mp.endpoint import control_address
from dax_mp.limits import MESSAGE_BYTES_MAX
from raw_peer import RawPeer
from script_process import Script

TIMEOUT_S: Final = 120
GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
MORE: Final = 1
COMMAND: Final = 4


@contextmanager
def serving(endpoint: str, limits: str) -> Iterator["subprocess.Popen[str]"]:
    """A coordinator under limits that a shell's ulimit sets; it must live to the end, and end in order."""
    command = ["sh", "-c", f'{limits}; exec "$@"', "sh", *serve_command("--endpoint", endpoint, "--size", "4MiB")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert "serving" in process.stdout.readline()
            yield process
            assert process.poll() is None, process.stderr.read()
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)
        assert process.returncode == 0


def sessions_until_refused(endpoint: str, stack: ExitStack) -> tuple[list[dax_mp.Session], OSError]:
    """As many sessions as it admits, and what the next one is told."""
    sessions: list[dax_mp.Session] = []
    while True:
        try:
            sessions.append(stack.enter_context(dax_mp.connect(endpoint)))
        except OSError as error:
            return sessions, error


# --- limits -----------------------------------------------------------------------------------------------------------


def test_the_coordinator_admits_no_more_sessions_than_its_limit_of_open_files_carries(endpoint: str) -> None:
    """EMFILE, which says so, to who comes after; who was there loses nothing, and who leaves makes room."""
    with serving(endpoint, "ulimit -n 100"), ExitStack() as stack:
        sessions, refusal = sessions_until_refused(endpoint, stack)
        assert len(sessions) >= 10
        assert refusal.errno == errno.EMFILE, refusal
        assert "100 files open" in str(refusal)
        assert len(os.listdir(f"{endpoint}/sessions")) == len(sessions)
        with sessions[0].open("file", "w+") as file, sessions[-1].open("file") as other:
            file.write(b"kept")
            with other.mmap(access=dax_mp.ACCESS_READ) as mapping:
                assert mapping[:] == b"kept"
        for _ in range(3):
            with pytest.raises(OSError) as raised:
                dax_mp.connect(endpoint)
            assert raised.value.errno == errno.EMFILE
        sessions.pop().close()
        wait_until(lambda: sessions[0].statfs().sessions == len(sessions))
        dax_mp.connect(endpoint).close()


def test_a_connection_too_many_is_refused_and_its_session_goes_on(endpoint: str) -> None:
    """A session has one for each thread that makes a request meanwhile."""
    with serving(endpoint, "ulimit -n 70"), RawPeer(endpoint) as peer:
        peer.hello()
        hello = messages.encode(messages.Hello(1, messages.PROTOCOL_VERSION))
        answer: object = None
        for number in range(70):
            lane = peer.connect(control_address(endpoint), peer.token + bytes([number]))
            lane.send(hello)
            answer = messages.decode(lane.recv())
            if isinstance(answer, messages.Error):
                break
        assert isinstance(answer, messages.Error)
        assert answer.errno == errno.EMFILE
        assert isinstance(peer.request(messages.Open(2, "file", int(messages.OpenFlag.CREATE))), list)


@pytest.mark.parametrize("limits", ["ulimit -n 8", "ulimit -n 20", "ulimit -n 35"])
def test_a_limit_too_small_for_a_coordinator_is_one_line(endpoint: str, limits: str) -> None:
    command = ["sh", "-c", f'{limits}; exec "$@"', "sh", *serve_command("--endpoint", endpoint, "--size", "4MiB")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert re.fullmatch(r"dax-mp serve: .*\n", done.stderr), done.stderr
    assert f"{limits.removeprefix('ulimit -n ')} files open" in done.stderr
    assert not os.path.exists(endpoint)


def test_a_coordinator_with_little_address_space_serves_or_says_so(endpoint: str) -> None:
    command = ["sh", "-c", 'ulimit -v 40000; exec "$@"', "sh", *serve_command("--endpoint", endpoint, "--size", "4MiB")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if "serving" in process.stdout.readline():
            with dax_mp.connect(endpoint) as session, session.open("file", "w+") as file:
                file.write(bytes(1 << 20))
            process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(TIMEOUT_S) in (0, 1)
        assert said.count("\n") <= 1, said
        assert "Traceback" not in said


LOW_LIMIT: Final = """
import dax_mp, errno, os, resource, sys
def descriptors():
    return len(os.listdir("/proc/self/fd"))
endpoint = sys.argv[1]
dax_mp.connect(endpoint).close()
before, (_, hard) = descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)
served = 0
for limit in range(before - 1, before + 12):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with dax_mp.connect(endpoint) as session, session.open("file", "w+") as file:
            file.truncate(4096)
            with file.mmap() as mapping:
                mapping[0] = 1
        served += 1
    except OSError as error:
        assert error.errno == errno.EMFILE, repr(error)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert descriptors() == before
    assert os.listdir(endpoint + "/sessions") == []
print(served)
"""


def test_a_client_without_descriptors_gets_emfile_and_leaves_nothing(serve: Serve, script: Script) -> None:
    """Whichever of the descriptors it needs is the one too many."""
    process = script(LOW_LIMIT, serve().endpoint)
    code, output, errors = process.end()
    assert (code, errors) == (0, "")
    assert 0 < int(output) < 12


# --- many at once -----------------------------------------------------------------------------------------------------


AT_ONCE: Final = """
import dax_mp, os, sys
with dax_mp.connect(sys.argv[1]) as session:  # imports all
    session.open("file", "w").close()
gate, opener = os.pipe()
children = []
for _ in range(400):
    child = os.fork()
    if child == 0:
        os.close(opener)
        os.read(gate, 1)
        try:
            with dax_mp.connect(sys.argv[1]) as session:
                os._exit(session.listdir() != ["file"])
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    children.append(child)
os.close(opener)
print(sum(os.waitpid(child, 0)[1] != 0 for child in children), "failed")
"""


def test_connect_waits_when_400_processes_start_at_once(serve: Serve, script: Script) -> None:
    coordinator = serve("--ack-timeout", "60")
    process = script(AT_ONCE, coordinator.endpoint)
    code, output, _ = process.end()
    assert (code, output) == (0, "0 failed\n")


def test_connect_waits_for_a_full_queue_until_its_time_is_over(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """TimeoutError, and not EAGAIN; and connects where there is room again."""
    monkeypatch.setattr("dax_mp.clients.session.CONNECT_TIMEOUT_S", 0.3)
    coordinator = serve()
    coordinator.process.send_signal(signal.SIGSTOP)
    filling = full_queue(f"{coordinator.endpoint}/control.sock")
    try:
        with pytest.raises(TimeoutError, match="does not answer"):
            dax_mp.connect(coordinator.endpoint)
        monkeypatch.setattr("dax_mp.clients.session.CONNECT_TIMEOUT_S", float(TIMEOUT_S))
        timer = threading.Timer(0.1, coordinator.process.send_signal, [signal.SIGCONT])
        timer.start()
        for connection in filling:
            connection.close()
        dax_mp.connect(coordinator.endpoint).close()
        timer.join()
    finally:
        coordinator.process.send_signal(signal.SIGCONT)
        for connection in filling:
            connection.close()


def full_queue(path: str) -> list[socket.socket]:
    """Connections to a listener that does not accept, until there is room for no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 5000:
        pytest.skip("a listener's queue may be longer than this process may have files open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 5000), hard))
    connections: list[socket.socket] = []
    while True:
        connections.append(socket.socket(socket.AF_UNIX))
        connections[-1].setblocking(False)
        try:
            connections[-1].connect(path)
        except BlockingIOError:
            return connections


def test_a_flood_of_connections_ends_nobody(endpoint: str) -> None:
    """To both sockets, of a coordinator that may have fewer files open than come: it takes some, and goes on."""
    with serving(endpoint, "ulimit -n 64") as process, dax_mp.connect(endpoint) as session:
        with ExitStack() as stack:
            for name in ("control.sock", "pager.sock") * 150:
                connection = stack.enter_context(socket.socket(socket.AF_UNIX))
                connection.connect(f"{endpoint}/{name}")
            with session.open("file", "w+") as file:
                file.truncate(8192)
                with file.mmap() as mapping:
                    mapping[4096] = 1
            assert len(os.listdir(f"/proc/{process.pid}/fd")) < 64
        dax_mp.connect(endpoint).close()


def test_strangers_who_say_nothing_are_sent_away(serve: Serve) -> None:
    """They hold every place there is, and a client that comes after them is served all the same, a little later."""
    endpoint = serve().endpoint
    with ExitStack() as stack:
        for _ in range(80):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(f"{endpoint}/control.sock")
        began_s = time.monotonic()
        with dax_mp.connect(endpoint):
            waited_s = time.monotonic() - began_s
        assert waited_s >= HANDSHAKE_TIMEOUT_S / 2


# --- what never ends --------------------------------------------------------------------------------------------------


@pytest.fixture
def witness(serve: Serve) -> Iterator[tuple[int, dax_mp.Session]]:
    """A coordinator's pid and a session at it, which must not notice what others do."""
    coordinator = serve()
    with dax_mp.connect(coordinator.endpoint) as session, session.open("witness", "w+") as file:
        file.write(b"!")
        yield coordinator.pid, session
        with session.open("witness", "r+") as other, other.mmap() as mapping:
            assert mapping[:] == b"!"


def opened(session: dax_mp.Session, name: str) -> socket.socket:
    """A connection of a DEALER's, after its handshake."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    connection.connect(f"{session.endpoint}/{name}")
    identity = os.urandom(20)
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x14" + identity
    connection.sendall(GREETING + bytes((COMMAND, len(ready))) + ready)
    return connection


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.parametrize("name", ["control.sock", "pager.sock"])
@pytest.mark.parametrize("body", [b"", b"x" * 255], ids=["empty", "full"])
def test_a_message_of_endless_frames_is_bounded(witness: tuple[int, dax_mp.Session], name: str, body: bytes) -> None:
    """It is cut off, and takes no memory until then."""
    pid, session = witness
    before_kib = resident_kib(pid)
    frames = (bytes((MORE, len(body))) + body) * 100
    with opened(session, name) as connection, pytest.raises(ConnectionError):
        connection.sendall(frames * (100 * MESSAGE_BYTES_MAX // len(frames)))
    assert resident_kib(pid) < before_kib + (16 << 10)


@pytest.mark.parametrize(
    "opening",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        GREETING[:10] + b"\x02" + GREETING[11:],
        GREETING.replace(b"NULL", b"PLAI"),
        GREETING + b"\x00\x01x",
        GREETING + bytes((COMMAND, 6)) + b"\x05READX",
        GREETING + bytes((COMMAND, 8)) + b"\x05READY\x09x",
        GREETING + bytes((COMMAND, 12)) + b"\x05READY\x01x\xff\xff\xff\xff",
        GREETING + bytes((COMMAND, 6)) + b"\x05READY",
        GREETING + b"\x06" + b"\xff" * 8,
        GREETING + b"\x80\x00",
    ],
    ids=[
        "http",
        "version 2",
        "mechanism",
        "no command",
        "no ready",
        "cut name",
        "cut value",
        "no type",
        "long",
        "flags",
    ],
)
def test_who_does_not_shake_hands_is_closed(witness: tuple[int, dax_mp.Session], opening: bytes) -> None:
    _, session = witness
    for name in ("control.sock", "pager.sock"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(f"{session.endpoint}/{name}")
            connection.sendall(opening)
            while connection.recv(1 << 16):
                pass


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_to_both_sockets(witness: tuple[int, dax_mp.Session], seed: int) -> None:
    """From the first byte on, or after the handshake, or after a frame's head; in pieces."""
    pid, session = witness
    chance = random.Random(seed)
    for _ in range(30):
        with opened(session, chance.choice(["control.sock", "pager.sock"])) as connection, suppress(ConnectionError):
            for _ in range(chance.randrange(1, 6)):
                body = chance.randbytes(chance.randrange(200))
                head = bytes((chance.choice([0, 0, 0, 1, 2, 3, 4, 6, 255]), len(body)))
                connection.sendall(head + body if chance.random() < 0.7 else body)
    assert os.path.exists(f"/proc/{pid}")
    assert session.listdir() == ["witness"]
