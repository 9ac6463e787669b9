"""A coordinator that is alive but does not answer: what waits for it can be interrupted, and fails in time."""

import errno
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from coordinator_process import Serve

PAGE: Final = os.sysconf("SC_PAGESIZE")
PAGES: Final = 4096
TIMEOUT_S: Final = 1.0


class Stopped:
    """A coordinator that can be stopped, and a mapping at it."""

    def __init__(self, pid: int, session: dax_mp.Session, file: dax_mp.DaxFile, mapping: dax_mp.Mapping) -> None:
        self.pid, self.session, self.file, self.mapping = pid, session, file, mapping

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@contextmanager
def stoppable(serve: Serve, timeout_s: float | None) -> Iterator[Stopped]:
    coordinator = serve(size="32MiB")
    with (
        dax_mp.connect(coordinator.endpoint, timeout=timeout_s) as session,
        session.open("file", "x+") as file,
    ):
        file.truncate(PAGES * PAGE)
        with file.mmap() as mapping:
            stopped = Stopped(coordinator.pid, session, file, mapping)
            yield stopped
            stopped.resume()


@pytest.fixture
def stopped(serve: Serve) -> Iterator[Stopped]:
    with stoppable(serve, TIMEOUT_S) as stopped:
        yield stopped


@pytest.fixture
def patient(serve: Serve) -> Iterator[Stopped]:
    """With the default timeout."""
    with stoppable(serve, None) as stopped:
        yield stopped


class Interrupt(Exception):
    """Raised by a signal handler."""


@pytest.fixture
def alarm() -> Iterator[Callable[[Callable[[], object]], None]]:
    """A function that calls another one, and has Interrupt raised in the middle of it."""

    def raise_interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupt

    def call_with_alarm(call: Callable[[], object]) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        call()

    before = signal.signal(signal.SIGALRM, raise_interrupt)
    yield call_with_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


ACCESSES: Final[dict[str, Callable[[dax_mp.Mapping], Any]]] = {
    "index": lambda mapping: mapping[7],
    "slice": lambda mapping: mapping[7:9],
    "long slice": lambda mapping: mapping[:],
    "find": lambda mapping: mapping.find(b"x", 0),
    "rfind": lambda mapping: mapping.rfind(b"x", 0),
    "readline": lambda mapping: mapping.readline(),
    "read": lambda mapping: mapping.read(5),
    "write": lambda mapping: mapping.write(b"12345"),
    "write_byte": lambda mapping: mapping.write_byte(5),
    "move": lambda mapping: mapping.move(5, 0, 9),
    "populate": lambda mapping: mapping.populate(write=True),
    "iteration": lambda mapping: next(iter(mapping)),
    "in": lambda mapping: b"x" in mapping,
}


@pytest.mark.parametrize("name", ACCESSES)
def test_a_method_is_interrupted_beside_a_stopped_coordinator(
    patient: Stopped, alarm: Callable[[Callable[[], object]], None], name: str
) -> None:
    """No freeze: the handler's exception comes out, the mapping is as it was, and works when the coordinator does."""
    patient.stop()
    with pytest.raises(Interrupt):
        alarm(lambda: ACCESSES[name](patient.mapping))
    assert patient.mapping.exports == 0
    assert patient.mapping.tell() == 0
    patient.resume()
    assert patient.mapping[:] == bytes(PAGES * PAGE) == patient.file.pread(PAGES * PAGE, 0)


def test_other_threads_run_while_a_method_waits_for_a_stopped_coordinator(patient: Stopped) -> None:
    patient.stop()
    threads = [threading.Thread(target=access, args=[patient.mapping]) for access in ACCESSES.values()]
    for thread in threads:
        thread.start()  # each gets the GIL, though those before it wait
    with pytest.raises(BufferError):
        patient.mapping.close()
    patient.resume()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("name", ACCESSES)
def test_a_method_that_is_never_answered_fails(stopped: Stopped, name: str) -> None:
    stopped.stop()
    with pytest.raises(dax_mp.BusError, match="is alive but does not answer") as raised:
        ACCESSES[name](stopped.mapping)
    assert raised.value.errno == errno.EIO
    stopped.resume()
    assert stopped.mapping[:9] == bytes(9)


def test_a_raw_access_that_is_never_answered_fails(stopped: Stopped) -> None:
    """numpy, with the GIL and without; and what comes late is the file's, and no scratch page."""
    mapping: Any = stopped.mapping
    stopped.stop()
    for access in (load_raw, store_raw):
        with pytest.raises(dax_mp.BusError, match="is alive but does not answer") as raised:
            access(mapping)
        assert raised.value.errno == errno.EIO
    stopped.resume()
    mapping[6:8] = b"ab"
    with memoryview(mapping) as view:
        assert bytes(view[5:9]) == stopped.file.pread(4, 5) == b"\0ab\0"


def load_raw(mapping: Any) -> int:
    with memoryview(mapping) as view:
        return view[5]


def store_raw(mapping: Any) -> None:
    with memoryview(mapping) as view:
        np.frombuffer(view[5 * PAGE : 6 * PAGE], np.uint8).fill(1)


def test_requests_that_are_never_answered_fail(stopped: Stopped) -> None:
    session, file = stopped.session, stopped.file
    requests: dict[str, Callable[[], Any]] = {
        "stat": file.stat,
        "listdir": session.listdir,
        "pwrite": lambda: file.pwrite(b"x", 0),
        "long pwrite": lambda: file.pwrite(bytes(2 << 20), 0),
        "long pread": lambda: file.pread(2 << 20, 0),
        "truncate": lambda: file.truncate(PAGE),
        "mmap": file.mmap,
    }
    stopped.stop()
    for name, request in requests.items():
        with pytest.raises(TimeoutError, match="is alive but does not answer"):
            print(name, request())
    stopped.resume()
    file.truncate(PAGES * PAGE)
    assert file.size == PAGES * PAGE
    assert session.listdir() == ["file"]


def test_what_may_take_long_is_not_cut_off(serve: Serve) -> None:
    """A truncate that waits for pins does so for the ack timeout, and the session waits longer than that."""
    coordinator = serve("--ack-timeout", "20")
    with dax_mp.connect(coordinator.endpoint) as session:
        assert session.timeout == 80
    with dax_mp.connect(coordinator.endpoint, timeout=math.inf) as session:
        assert session.timeout == math.inf
        assert session.listdir() == []
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match="timeout"):
            dax_mp.connect(coordinator.endpoint, timeout=wrong)


def test_the_default_timeout(session: dax_mp.Session) -> None:
    assert session.timeout == 60
