"""Scenarios of the native part: methods that wait for the coordinator. They give the GIL up, and can be interrupted."""

import ctypes
import errno
import functools
import os
import random
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, cast

import pytest

from dax_mp import mmu
from mmu_rig import FAULTS, PAGE, VMA, BusError, Rig, array_of, failure_of, forks, in_thread, scenario

PAGES: Final = 64
ANSWER_TIMEOUT_MS: Final = 300


class Interrupt(Exception):
    """Raised by a signal handler."""


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupt


def methods(window: mmu.Window) -> dict[str, Callable[[], object]]:
    """Every way of a window's own to reach page 40, which alone is not mapped; a long one lets the GIL go anyway."""
    here = 40 * PAGE
    return {
        "index": lambda: window[here],
        "slice": lambda: window[here - 5 : here + 5],
        "slice with a step": lambda: window[here - 5 :: PAGE // 2],
        "slice backwards": lambda: window[here + PAGE : here - 9 : -3],
        "iteration": lambda: next(byte for index, byte in enumerate(cast(Any, window)) if index == here),
        "set index": lambda: window.__setitem__(here, 0),
        "set slice": lambda: window.__setitem__(slice(here - 5, here + 5), bytes(10)),
        "set slice with a step": lambda: window.__setitem__(slice(here, None, PAGE), bytes(24)),
        "move from": lambda: window.move(0, here, 10),
        "move to": lambda: window.move(here, 0, 10),
        "move up": lambda: window.move(here - 100, here - 200, 3 * PAGE),
        "move down": lambda: window.move(here - 200, here - 100, 3 * PAGE),
        "populate": lambda: window.populate(here, 10, False),
        "populate for stores": lambda: window.populate(here, PAGE, True),
    }


def prepared(rig: Rig, report: bool = True) -> mmu.Window:
    """All of it is mapped, and no fault is answered from now on."""
    window = rig.window(PAGES)
    window.populate(0, PAGES * PAGE, True)
    rig.coordinator.set(hold=True, report=report)
    return window


@scenario
def other_threads_run_while_a_method_waits(rig: Rig) -> None:
    """For each method: this thread goes on until it has seen the fault, and then some more."""
    window = prepared(rig)
    for name, method in methods(window).items():
        window.drop(40 * PAGE, PAGE)
        thread = threading.Thread(target=method)
        thread.start()
        assert rig.coordinator.event()[:1] == ["fault"], name
        assert thread.is_alive(), name
        rig.coordinator.set(hold=False, report=False)  # it may need the page once more, to store to it
        rig.coordinator.tell("answer")
        thread.join()
        assert window[40 * PAGE] == 0
        rig.coordinator.set(hold=True, report=True)
    assert window.exports == 0


@scenario
def a_signal_handler_that_raises_ends_the_wait_of_a_method(rig: Rig) -> None:
    """For each method. What the coordinator was asked for comes late, and is used."""
    window = prepared(rig)
    main = threading.get_ident()
    signal.signal(signal.SIGUSR1, raise_interrupt)

    def interrupt() -> None:
        rig.coordinator.event()
        signal.pthread_kill(main, signal.SIGUSR1)

    for name, method in methods(window).items():
        window.drop(40 * PAGE, PAGE)
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(Interrupt):
            print(name, method())
        thread.join()
        faults = rig.pager.counters()["faults"]
        rig.coordinator.tell("answer")
        rig.coordinator.set(report=True)  # it has sent the Map
        while rig.pager.counters()["maps"] < faults:
            select.select([], [], [], 0.001)
        assert window[40 * PAGE] == 0
        assert rig.pager.counters()["faults"] == faults, name
    window.close()


@scenario
def ctrl_c_in_another_thread_s_call_ends_the_wait(rig: Rig) -> None:
    """The signal arrives in a thread that is not the main one: that has it looked for from time to time."""
    window = prepared(rig)
    window.drop(0, PAGE)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        rig.coordinator.event()
        signal.raise_signal(signal.SIGINT)  # in this thread

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        window[5]
    thread.join()


@scenario
def a_handler_that_returns_does_not_end_the_wait(rig: Rig) -> None:
    window = prepared(rig)
    window.drop(0, PAGE)
    main = threading.get_ident()
    handled: list[bytes] = []

    def handle(number: int, frame: FrameType | None) -> None:
        handled.append(window[PAGE : PAGE + 3])
        rig.coordinator.tell("answer")

    signal.signal(signal.SIGUSR1, handle)
    window[PAGE : PAGE + 3] = b"abc"

    def interrupt() -> None:
        rig.coordinator.event()
        signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert window[0] == 0
    thread.join()
    assert handled == [b"abc"]


@scenario
def handlers_that_wait_themselves(rig: Rig) -> None:
    """Each accesses the next page, up to a depth, and the innermost raises; the outer ones go on waiting."""
    window = prepared(rig)
    window.drop(0, PAGES * PAGE)
    main = threading.get_ident()
    depth = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal depth
        depth += 1
        if depth == 5:
            raise Interrupt
        innermost = depth == 4
        try:
            window[depth * PAGE]
        except Interrupt:
            assert innermost
        else:
            assert not innermost

    signal.signal(signal.SIGUSR1, handle)

    def interrupt() -> None:
        for _ in range(5):
            rig.coordinator.event()
            signal.pthread_kill(main, signal.SIGUSR1)
        while depth < 5:
            select.select([], [], [], 0.001)
        rig.coordinator.set(hold=False)
        rig.coordinator.tell("answer")

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert window[0] == 0
    thread.join()
    assert depth == 5


@scenario
def closed_while_a_method_waits(rig: Rig) -> None:
    """The window stays open as with a buffer out, and the end of the pager ends the wait."""
    window = prepared(rig)
    window.drop(0, PAGE)
    failures: list[BusError] = []
    thread = threading.Thread(target=lambda: failures.append(failure_of(lambda: window[5])))
    thread.start()
    rig.coordinator.event()
    with pytest.raises(BufferError):
        window.close()
    rig.pager.close()
    thread.join()
    assert (failures[0].errno, failures[0].offset_bytes) == (errno.ESTALE, 5)
    window.close()


@scenario
def resized_while_a_method_waits(rig: Rig) -> None:
    window = prepared(rig)
    window.drop(0, PAGES * PAGE)
    failures: list[BusError] = []
    thread = threading.Thread(target=lambda: failures.append(failure_of(lambda: window[40 * PAGE])))
    thread.start()
    rig.coordinator.event()
    window.resize(PAGE)
    rig.coordinator.tell("answer")
    thread.join()
    assert failures[0].errno == errno.EFAULT


@scenario
@forks
def fork_while_methods_wait(rig: Rig) -> None:
    """In the child nobody waits, and the window can be closed."""
    window = prepared(rig)
    window.drop(0, PAGE)
    threads = [threading.Thread(target=lambda: window[5]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        rig.coordinator.event()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        window.rebind(rig.pager, VMA)
        assert failure_of(lambda: window[5]).errno == errno.ESTALE
        window.close()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    rig.coordinator.tell("answer")
    for thread in threads:
        thread.join()
    window.close()


@scenario
@forks
def fork_in_a_handler_that_interrupts_a_method(rig: Rig) -> None:
    """The child goes on in the middle of the access, for which nobody there has asked."""
    window = prepared(rig)
    window.drop(0, PAGE)
    main, children = threading.get_ident(), []

    def handle(number: int, frame: FrameType | None) -> None:
        children.append(os.fork())
        if not children[-1]:
            signal.alarm(30)
            window.rebind(rig.pager, VMA)

    signal.signal(signal.SIGUSR1, handle)

    def interrupt() -> None:
        rig.coordinator.event()
        signal.pthread_kill(main, signal.SIGUSR1)
        while not children:
            select.select([], [], [], 0.001)
        rig.coordinator.tell("answer")

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        value = window[5]
    except BusError as error:
        os._exit(error.errno or 1 if children == [0] else 1)
    assert value == 0
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == errno.ESTALE


@scenario
def an_access_that_is_never_answered_fails_in_the_end(rig: Rig) -> None:
    """By a coordinator that is alive but silent: a method, a raw access with and without the GIL, a thread of C."""
    rig.pager.close()
    rig.pager = rig.new_pager(answer_timeout_ms=ANSWER_TIMEOUT_MS)
    window = prepared(rig, report=False)
    window.drop(0, PAGES * PAGE)
    array = array_of(window)
    memset = ctypes.CDLL(None).memset
    accesses: list[Callable[[], object]] = [
        lambda: window[0],
        lambda: window[: PAGES * PAGE],
        lambda: window.populate(0, 1, True),
    ]
    if FAULTS != "userfaultfd":  # where a raw access sleeps in the kernel
        accesses += [
            lambda: array[PAGE],
            lambda: array.__setitem__(2 * PAGE, 1),
            lambda: memset(ctypes.c_void_p(window.address + 3 * PAGE), 1, 1),
        ]
    for access in accesses:
        for error in (failure_of(access), in_thread(functools.partial(failure_of, access))):
            assert isinstance(error, BusError)
            assert error.errno == errno.ETIMEDOUT
    rig.coordinator.tell("answer")
    rig.coordinator.set(hold=False)
    window.drop(0, PAGES * PAGE)
    window[0:3] = b"abc"
    assert window[0:5] == b"abc\0\0"
    assert array[2 * PAGE] == 0


def load_with_alarm(window: mmu.Window, index: int) -> int:
    signal.setitimer(signal.ITIMER_REAL, 0.0005)
    return window[index]


@scenario
def more_faults_than_the_connection_takes(rig: Rig) -> None:
    """A coordinator that is stopped reads nothing: who cannot even ask gives up as well, and can be interrupted."""
    rig.pager.close()
    rig.pager = rig.new_pager(answer_timeout_ms=ANSWER_TIMEOUT_MS)
    window = prepared(rig, report=False)
    window.drop(0, PAGES * PAGE)
    os.kill(rig.coordinator.process.pid, signal.SIGSTOP)
    try:
        signal.signal(signal.SIGALRM, raise_interrupt)
        for page in range(1000):
            with pytest.raises(Interrupt):  # each has asked, and is not answered
                load_with_alarm(window, page % PAGES * PAGE)
        assert failure_of(lambda: window[0]).errno == errno.ETIMEDOUT
    finally:
        os.kill(rig.coordinator.process.pid, signal.SIGCONT)


@scenario
def overlapping_moves_interrupted_at_random_moments(rig: Rig) -> None:
    """Every page comes by a fault of its own, and other pages are taken away: the bytes are those of memmove."""
    window = rig.window(PAGES)
    generator = random.Random(7)
    model = bytearray(generator.randbytes(PAGES * PAGE))
    window[:] = bytes(model)
    for _ in range(60):
        count = generator.randint(1, 20 * PAGE)
        src = generator.randint(0, PAGES * PAGE - count)
        dest = min(max(0, src + generator.randint(-count, count)), PAGES * PAGE - count)
        window.drop(0, PAGES * PAGE)
        window.move(dest, src, count)
        model[dest : dest + count] = model[src : src + count]
        assert window[:] == model
        step = generator.choice((-3, 2, 5000))
        start, stop = sorted(generator.sample(range(PAGES * PAGE), 2))
        if step < 0:
            start, stop = stop, start
        window.drop(0, PAGES * PAGE)
        assert window[start:stop:step] == model[start:stop:step]
        values = generator.randbytes(len(model[start:stop:step]))
        window.drop(0, PAGES * PAGE)
        window[start:stop:step] = values
        model[start:stop:step] = values
    assert window[:] == model


@scenario
def an_overlapping_slice_with_a_step_as_mmap_has_it(rig: Rig) -> None:
    window = rig.window(2)
    window[0:10] = bytes(range(10))
    with memoryview(cast(Any, window)) as view:
        window[2:12:2] = view[0:5]
    assert list(window[0:12]) == [0, 1, 0, 3, 1, 5, 0, 7, 3, 9, 1, 0]


@scenario
def an_interrupted_store_has_done_nothing_twice(rig: Rig) -> None:
    """Raised at random moments in the middle of long stores and moves: a later one is right."""
    pages = 2048
    os.ftruncate(rig.region_fd, PAGE + pages * PAGE)
    window = rig.window(pages)
    generator = random.Random(3)
    signal.signal(signal.SIGALRM, raise_interrupt)
    interrupted = 0
    data = bytes(range(1, 256)) * (pages * PAGE // 255)
    while interrupted < 30:
        window.drop(0, pages * PAGE)
        try:
            signal.setitimer(signal.ITIMER_REAL, generator.uniform(0.0001, 0.1))
            while True:
                window[: len(data)] = data
                window.move(0, 1, len(data) - 1)
        except Interrupt:
            interrupted += 1
    window[: len(data)] = data
    assert window[: len(data)] == data
    assert window.exports == 0
    window.close()
