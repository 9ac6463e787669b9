"""Who has a session, and what ends it: the kernel's word, a missing acknowledgement, a pager that is not there."""

import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator_process import CoordinatorProcess, Serve, wait_until
from dax_mp import messages
from dax_mp.clients import attach
from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.daemons.loop import Clock
from dax_mp.endpoint import session_path
from raw_peer import RawPeer
from script_process import Script

ACK_TIMEOUT_S = 0.5


@pytest.fixture
def coordinator(serve: Serve) -> CoordinatorProcess:
    return serve("--ack-timeout", str(ACK_TIMEOUT_S))


@pytest.fixture
def holder(coordinator: CoordinatorProcess) -> Iterator[RawPeer]:
    """A session that has the first page of "file" mapped."""
    with RawPeer(coordinator.endpoint) as peer:
        peer.hello()
        peer.open_pager()
        peer.map_page("file", 1)
        yield peer


@pytest.fixture
def other(coordinator: CoordinatorProcess) -> Iterator[RawPeer]:
    with RawPeer(coordinator.endpoint) as peer:
        peer.hello()
        yield peer


def truncate(peer: RawPeer) -> None:
    """Send a Truncate of "file" to nothing; its answer waits for who has it mapped."""
    handle = peer.request(messages.Open(1, "file", 0))[0]
    peer.send(messages.Truncate(7, handle, 0))


def status_of(peer: RawPeer) -> Any:
    return peer.request(messages.Statfs(1))


def assert_refused(answer: messages.Error, word: str) -> None:
    assert (type(answer), answer.errno) == (messages.Error, errno.EACCES), answer
    assert word in answer.text


# --- who gets a session -----------------------------------------------------------------------------------------------


def test_a_session_without_a_file_is_refused(coordinator: CoordinatorProcess) -> None:
    with RawPeer(coordinator.endpoint, locked=False) as peer:
        assert_refused(peer.hello(), "No such file")


def test_a_session_whose_file_is_not_locked_is_refused(coordinator: CoordinatorProcess) -> None:
    with RawPeer(coordinator.endpoint, locked=False) as peer:
        Path(peer.session_path).touch()
        assert_refused(peer.hello(), "locked")
        fd = peer.lock_here()
        assert isinstance(peer.hello(), dict)
        assert peer.request(messages.Bye(1)) is None
        os.close(fd)


def test_a_session_whose_file_is_a_link_or_a_pipe_is_refused(coordinator: CoordinatorProcess) -> None:
    with RawPeer(coordinator.endpoint, locked=False) as peer:
        os.symlink(f"{coordinator.endpoint}/coordinator.lock", peer.session_path)
        assert_refused(peer.hello(), "symbolic links")
        os.unlink(peer.session_path)
        os.mkfifo(peer.session_path)
        assert_refused(peer.hello(), "plain file")


def test_a_session_whose_process_has_died_is_refused(coordinator: CoordinatorProcess) -> None:
    with RawPeer(coordinator.endpoint) as peer:
        peer.kill()
        assert_refused(peer.hello(), "locked")


def test_the_session_file_of_a_process_that_is_killed_before_hello_does_not_stay(
    coordinator: CoordinatorProcess,
) -> None:
    with (
        RawPeer(coordinator.endpoint) as dead,
        RawPeer(coordinator.endpoint) as living,
        RawPeer(coordinator.endpoint) as new,
    ):
        dead.kill()
        for peer in (dead, living):
            os.utime(peer.session_path, (0, 0))  # as if they were there for long
        assert isinstance(new.hello(), dict)
        assert not os.path.exists(dead.session_path)
        assert os.path.exists(living.session_path), "its process lives, and has not said Hello yet"
        assert isinstance(living.hello(), dict)


def test_a_session_file_that_is_not_locked_yet_stays_for_a_while(coordinator: CoordinatorProcess) -> None:
    with RawPeer(coordinator.endpoint, locked=False) as slow, RawPeer(coordinator.endpoint) as new:
        Path(slow.session_path).touch()
        assert isinstance(new.hello(), dict)
        fd = slow.lock_here()
        assert isinstance(slow.hello(), dict)
        os.close(fd)


def test_who_was_taken_for_dead_makes_another_session_file(
    coordinator: CoordinatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was held up between making the file and locking it."""
    token = b"t" * messages.TOKEN_BYTES
    path = session_path(coordinator.endpoint, token)
    lockf = fcntl.lockf
    locked: list[int] = []

    def late(fd: int, operation: int) -> None:
        if not locked:
            os.unlink(path)
        locked.append(fd)
        lockf(fd, operation)

    monkeypatch.setattr("fcntl.lockf", late)
    fd = attach.lock_session(coordinator.endpoint, token)
    assert len(locked) == 2
    assert os.path.samestat(os.fstat(fd), os.stat(path))
    attach.unlock_session(coordinator.endpoint, token, [fd])


# --- what ends one ----------------------------------------------------------------------------------------------------


def test_bye_ends_a_session_and_its_file(coordinator: CoordinatorProcess, other: RawPeer) -> None:
    with RawPeer(coordinator.endpoint) as peer:
        peer.hello()
        assert status_of(other)["sessions"] == 2
        assert peer.request(messages.Bye(1)) is None
        assert status_of(other)["sessions"] == 1
        assert not os.path.exists(peer.session_path)
        assert peer.request(messages.Statfs(1)).errno == errno.EPROTO
        assert_refused(peer.hello(), "No such file")


def test_a_killed_process_lets_the_others_go_on(holder: RawPeer, other: RawPeer) -> None:
    truncate(other)
    assert isinstance(holder.next_order(), messages.Unmap)
    holder.kill()
    assert other.answer() == messages.Reply(7, None)
    status = status_of(other)
    assert (status["sessions"], status["vmas"], status["counters"]["evictions"]) == (1, 0, 0)
    assert status["pages_free"] == status["pages"]
    assert not os.path.exists(holder.session_path)


def test_who_does_not_acknowledge_is_evicted(holder: RawPeer, other: RawPeer) -> None:
    truncate(other)
    assert isinstance(holder.next_order(), messages.Unmap)
    assert other.answer() == messages.Reply(7, None)
    assert holder.next_order() == messages.Evict(errno.ESTALE)
    assert holder.request(messages.Open(1, "file", 0)).errno == errno.ESTALE
    status = status_of(other)
    assert (status["pages_quarantined"], status["counters"]["evictions"]) == (1, 1)
    holder.kill()
    wait_until(lambda: status_of(other)["sessions"] == 1)
    assert status_of(other)["pages_quarantined"] == 0


def test_only_dropped_ends_the_quarantine_of_an_evicted_session(holder: RawPeer, other: RawPeer) -> None:
    truncate(other)
    assert isinstance(holder.next_order(), messages.Unmap)
    assert holder.next_order() == messages.Evict(errno.ESTALE)
    assert other.answer() == messages.Reply(7, None)
    holder.pager.send(messages.encode(messages.Statfs(1)))
    wait_until(lambda: status_of(other)["counters"]["protocol_errors"] == 1)
    assert status_of(other)["pages_quarantined"] == 1
    holder.order(messages.Dropped())
    wait_until(lambda: status_of(other)["pages_quarantined"] == 0)


def test_quarantine_does_not_grow_beside_a_stopped_process(holder: RawPeer, other: RawPeer) -> None:
    """It has one page mapped, which another punches and writes in a loop: a device of 16 MiB lasts."""
    handle = other.request(messages.Open(1, "file", 0))[0]
    page = os.sysconf("SC_PAGESIZE")
    other.send(messages.Fallocate(7, handle, PUNCH_HOLE, 0, page))
    assert isinstance(holder.next_order(), messages.Unmap)
    assert other.answer() == messages.Reply(7, None)
    for _ in range(100):
        assert other.request(messages.Write(1, handle, 0, 0, bytes(page))) == page
        assert other.request(messages.Fallocate(1, handle, PUNCH_HOLE, 0, page)) is None
    status = status_of(other)
    assert (status["pages_quarantined"], status["pages_free"]) == (1, status["pages"] - 1)


def test_who_has_no_pager_any_more_is_evicted_at_once(serve: Serve) -> None:
    coordinator = serve("--ack-timeout", "3600")
    with RawPeer(coordinator.endpoint) as holder, RawPeer(coordinator.endpoint) as other:
        holder.hello()
        holder.open_pager()
        holder.map_page("file", 1)
        other.hello()
        descriptors = open_descriptors(coordinator)
        holder.pager.close()
        wait_until(lambda: open_descriptors(coordinator) < descriptors)
        truncate(other)
        assert other.answer() == messages.Reply(7, None)
        assert status_of(other)["counters"]["evictions"] == 1
        assert holder.request(messages.Open(1, "file", 0)).errno == errno.EPROTO


def open_descriptors(coordinator: CoordinatorProcess) -> int:
    return len(os.listdir(f"/proc/{coordinator.pid}/fd"))


def test_a_coordinator_that_was_stopped_holds_it_against_nobody(
    coordinator: CoordinatorProcess, holder: RawPeer, other: RawPeer
) -> None:
    truncate(other)
    unmap = holder.next_order()
    coordinator.process.send_signal(signal.SIGSTOP)
    time.sleep(2 * ACK_TIMEOUT_S)
    holder.order(messages.UnmapAck(unmap.request_id))
    coordinator.process.send_signal(signal.SIGCONT)
    assert other.answer() == messages.Reply(7, None)
    assert status_of(other)["counters"]["evictions"] == 0


def test_the_clock_counts_no_more_than_a_step_a_turn() -> None:
    clock = Clock(step_s=0.001)
    time.sleep(0.01)
    assert clock.advance() == 0.001
    assert 0.001 <= clock.advance() <= 0.002


# --- a session without its program ------------------------------------------------------------------------------------


EXEC = """
import os, sys, dax_mp
session = dax_mp.connect(sys.argv[1])
mapping = session.open("file", "r+").mmap()
mapping[0] = 1
print("mapped", flush=True)
input()
os.execv("/bin/cat", ["cat"])  # waits for its stdin, until the test ends it
"""


def test_a_process_that_becomes_another_program_has_left(
    coordinator: CoordinatorProcess, other: RawPeer, script: Script
) -> None:
    """Its pid lives, but its mappings are gone: what it had is free at once."""
    handle = other.request(messages.Open(1, "file", int(messages.OpenFlag.CREATE)))[0]
    other.request(messages.Truncate(1, handle, 1 << 16))
    process = script(EXEC, coordinator.endpoint)
    assert process.line() == "mapped"
    process.go_on()
    wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "cat\n")
    assert other.request(messages.Truncate(1, handle, 0)) is None
    wait_until(lambda: status_of(other)["sessions"] == 1)
    status = status_of(other)
    assert status["pages_free"] == status["pages"]
