"""Scenarios of the native part: accesses that have nothing to map, and the end of a session."""

import ctypes
import errno
import os
import select
import threading
import time
from typing import Any, Final, cast

import numpy as np
import pytest

from dax_mp import mmu
from mmu_rig import PAGE, VMA, BusError, Rig, array_of, failure_of, in_thread, scenario, settle

MIB: Final = 1 << 20


def wait_for_exception() -> None:
    """For one that comes when another thread gets to it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        settle()


@scenario
def bus_error_in_slices(rig: Rig) -> None:
    rig.coordinator.set(size_pages=2)
    window = rig.window(4)
    window[2 * PAGE - 1] = 7
    for access in (
        lambda: window[2 * PAGE],
        lambda: window[:],
        lambda: window[::-3],
        lambda: window.__setitem__(2 * PAGE + 5, 1),
        lambda: window.__setitem__(slice(None), b"y" * 4 * PAGE),
        lambda: list(cast(Any, window)),
    ):
        error = failure_of(access)
        assert error.errno == errno.EFAULT
        assert error.window is window
        assert 2 * PAGE <= error.offset_bytes < 4 * PAGE
        assert mmu.take_bus_error() is None
    rig.coordinator.set(size_pages=4)
    assert window[2 * PAGE] == 0, "no page was left in the place of those that failed"


@scenario
def bus_error_in_a_long_copy(rig: Rig) -> None:
    """A copy this long lets the GIL go."""
    pages = 4 * MIB // PAGE
    rig.coordinator.set(size_pages=pages - 1, span_pages=512)
    window = rig.window(pages)
    assert failure_of(lambda: window[:]).offset_bytes // PAGE == pages - 1
    assert window.exports == 0
    assert len(window[: (pages - 1) * PAGE]) == (pages - 1) * PAGE


@scenario
def bus_error_in_numpy(rig: Rig) -> None:
    rig.coordinator.set(size_pages=2)
    window = rig.window(4)
    array = array_of(window)

    def store() -> None:
        array[3 * PAGE] = 1

    for access in (lambda: array[2 * PAGE], store, lambda: array[2 * PAGE]):
        error = failure_of(access)
        assert (error.errno, error.window) == (errno.EFAULT, window)
    rig.coordinator.set(size_pages=4)
    assert array[3 * PAGE] == 0, "the scratch page is gone"


@scenario
def bus_error_in_a_thread(rig: Rig) -> None:
    """In the thread that made the access, while the main thread is in a join."""
    rig.coordinator.set(size_pages=0)
    array = array_of(rig.window(4))
    error = in_thread(lambda: failure_of(lambda: array[PAGE]))
    assert isinstance(error, BusError)
    assert error.offset_bytes == PAGE
    settle()


@scenario
def bus_error_without_the_gil(rig: Rig) -> None:
    """numpy lets the GIL go for a long reduction; one fault in 2 MiB is enough for the rest of it."""
    size = 16 * MIB
    rig.coordinator.set(size_pages=0)
    array = np.frombuffer(cast(Any, mmu.Window(rig.pager, VMA, 0, size, True)), dtype=np.float64)
    for run in (lambda call: call(), in_thread):
        before = rig.pager.counters()["faults"]
        error = run(lambda: failure_of(array.sum))
        assert isinstance(error, BusError)
        assert (error.errno, error.offset_bytes) == (errno.EFAULT, 0)
        assert rig.pager.counters()["faults"] - before == size // (2 * MIB)


@scenario
def bus_error_while_another_holds_the_gil(rig: Rig) -> None:
    """The exception cannot be delivered in time: the access ends all the same, and it comes late."""
    rig.coordinator.set(size_pages=0)
    window = rig.window(4)
    address = window.address
    memset = ctypes.CDLL(None).memset
    inside, result = threading.Event(), []

    def access() -> None:
        inside.set()
        memset(ctypes.c_void_p(address), 1, 1)
        wait_for_exception()

    thread = threading.Thread(target=lambda: result.append(failure_of(access)))
    thread.start()
    inside.wait()
    ctypes.PyDLL(None).usleep(1_500_000)
    thread.join()
    assert result[0].errno == errno.EFAULT


@scenario
def a_method_does_not_end_on_the_page_of_anothers_failed_access(rig: Rig) -> None:
    """A thread has failed in a C function, and waits in there: its exception is not raised yet."""
    rig.coordinator.set(size_pages=1)
    window = rig.window(2)
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = libc.fgets.restype = ctypes.c_void_p
    reader, writer = os.pipe()
    stream = ctypes.c_void_p(libc.fdopen(reader, b"r"))
    os.write(writer, b"abc")

    def get_line() -> None:
        libc.fgets(ctypes.c_void_p(window.address + PAGE), 100, stream)  # stores abc, and waits for more

    failures: list[BusError] = []
    waiting = threading.Thread(target=lambda: failures.append(failure_of(get_line)))
    waiting.start()
    for number, access in enumerate(
        (
            lambda: window.__setitem__(PAGE, 1),
            lambda: window[PAGE],
            lambda: window.__setitem__(slice(PAGE - 1, PAGE + 1), b"xy"),
            lambda: window.populate(PAGE, 1, True),
            lambda: window.move(PAGE, 0, 9),
        )
    ):
        while rig.pager.counters()["bus_errors"] < 2 * number + 1:
            select.select([], [], [], 0.001)
        assert failure_of(access).errno == errno.EFAULT
        os.write(writer, b"d")  # it stores that too, on a page of its own again
    os.write(writer, b"\n")
    waiting.join()
    assert failures[0].errno == errno.EFAULT
    rig.coordinator.set(size_pages=2)
    assert window[PAGE : PAGE + 9] == bytes(9)
    libc.fclose(stream)
    os.close(writer)


@scenario
def bus_error_in_a_thread_that_is_not_pythons(rig: Rig) -> None:
    rig.coordinator.set(size_pages=0)
    window = rig.window(1)
    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()

    def access() -> None:
        strlen = ctypes.cast(libc.strlen, ctypes.c_void_p)
        assert not libc.pthread_create(ctypes.byref(thread), None, strlen, ctypes.c_void_p(window.address))
        libc.pthread_join(thread, None)
        wait_for_exception()

    error = failure_of(access)
    assert (error.errno, error.window) == (errno.EFAULT, window)


@scenario
def bus_error_without_a_class(rig: Rig) -> None:
    mmu.set_bus_error(OSError)
    rig.coordinator.set(size_pages=0)
    window = rig.window(1)
    with pytest.raises(OSError):
        window[0]
    assert mmu.take_bus_error() == (errno.EFAULT, window, 0)


@scenario
def bus_error_of_a_closed_window(rig: Rig) -> None:
    mmu.set_bus_error(OSError)
    rig.coordinator.set(size_pages=0)
    window = rig.window(1)
    with pytest.raises(OSError):
        window[0]
    window.close()
    assert mmu.take_bus_error() == (errno.EFAULT, None, 0)
    assert mmu.take_bus_error() is None


@scenario
def evicted(rig: Rig) -> None:
    rig.coordinator.set(hold=True, report=True)
    window = rig.window(4)
    memset = ctypes.CDLL(None).memset
    results: list[BusError] = []

    def wait() -> None:
        results.append(failure_of(lambda: memset(ctypes.c_void_p(window.address), 1, 1)))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert rig.coordinator.event()[0] == "fault"
    rig.coordinator.tell("evict", errno.ESTALE)
    assert rig.coordinator.event() == ["dropped"]
    for thread in threads:
        thread.join()
    assert [error.errno for error in results] == [errno.ESTALE] * 3
    assert failure_of(lambda: window[0]).errno == errno.ESTALE
    assert failure_of(array_of(window).sum).errno == errno.ESTALE
    assert rig.pager.errno == errno.ESTALE
    rig.coordinator.tell("unmap", 3, [VMA, 0, 4])
    assert rig.coordinator.event()[:2] == ["ack", 3], "it goes on to acknowledge"


@scenario
def coordinator_is_killed(rig: Rig) -> None:
    """What is mapped stays; what is not is EIO, also for who waits."""
    rig.coordinator.set(report=True)
    window = rig.window(4)
    window[0] = 1
    assert rig.coordinator.event()[0] == "fault"
    rig.coordinator.set(hold=True)

    def kill() -> None:
        assert rig.coordinator.event()[0] == "fault"
        rig.coordinator.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    memset = ctypes.CDLL(None).memset
    assert failure_of(lambda: memset(ctypes.c_void_p(window.address + PAGE), 1, 1)).errno == errno.EIO
    killer.join()
    assert failure_of(lambda: window[2 * PAGE]).errno == errno.EIO
    assert window[0] == 1
    window[1] = 2
    assert rig.pager.errno == errno.EIO
    with pytest.raises(ConnectionError):
        rig.new_pager()


@scenario
def pager_closes(rig: Rig) -> None:
    rig.coordinator.set(hold=True, report=True)
    window = rig.window(4)
    memset = ctypes.CDLL(None).memset
    results: list[BusError] = []
    thread = threading.Thread(
        target=lambda: results.append(failure_of(lambda: memset(ctypes.c_void_p(window.address), 1, 1)))
    )
    thread.start()
    assert rig.coordinator.event()[0] == "fault"
    closers = [threading.Thread(target=rig.pager.close, args=(errno.ENOTCONN,)) for _ in range(3)]
    for closer in closers:
        closer.start()
    for closer in (*closers, thread):
        closer.join()
    assert results[0].errno == rig.pager.errno == errno.ENOTCONN
    assert failure_of(lambda: window[0]).errno == errno.ENOTCONN
    rig.pager.close()
    assert failure_of(lambda: rig.window(1, vma_id=VMA + 1)[0]).errno == errno.ENOTCONN
