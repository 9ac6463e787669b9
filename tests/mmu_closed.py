"""Scenarios of windows that are closed while a pointer into them is left: np.ndarray(buffer=window) keeps no export."""

import ctypes
import errno
import gc
import mmap
import os
import resource
import signal
import threading
from typing import Any, Final, cast

import numpy as np

from dax_mp import mmu
from mmu_rig import PAGE, VMA, BusError, Rig, address_space, failure_of, forks, in_thread, scenario, settle

CYCLES: Final = 20_000
GIB: Final = 1 << 30


def array_without_export(window: mmu.Window) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    array = np.ndarray(len(window), np.uint8, buffer=cast(Any, window))
    assert window.exports == 0
    return array


def vmas() -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return len(maps.readlines())


def address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * PAGE


def page_tables_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmPTE"))


def open_and_close(rig: Rig) -> int:
    """With a pointer left; returns its address."""
    window = rig.window(1)
    array_without_export(window)[0] = 7
    address = window.address
    window.close()
    return address


@scenario
def the_range_of_a_closed_window_stays_out_of_use(rig: Rig) -> None:
    window = rig.window(8)
    array = array_without_export(window)
    view = array[3 * PAGE :].reshape(5, PAGE)
    array[5] = 9
    window.close()
    others = [rig.window(8, vma_id=VMA + 1 + index) for index in range(50)]
    foreign = [mmap.mmap(-1, GIB) for _ in range(8)]  # all that the kernel gives out meanwhile
    for access, offset in (
        (lambda: array[5], 5),
        (lambda: array.__setitem__(PAGE, 1), PAGE),
        (view.sum, 3 * PAGE),
        (lambda: array.fill(1), 0),
        (lambda: array[5], 5),
    ):
        error = failure_of(access)
        assert (error.errno, error.window, error.offset_bytes) == (errno.ESTALE, window, offset)
    written = bytes(5) + b"\t" + bytes(8 * PAGE - 6)  # and nothing that was stored later
    assert all(other[:] == written for other in others)
    assert not any(memory[:100].strip(b"\0") for memory in foreign)
    assert cast(BusError, in_thread(lambda: failure_of(lambda: array[5]))).errno == errno.ESTALE


@scenario
def a_raw_pointer_outlives_even_the_closed_windows_object(rig: Rig) -> None:
    pointers = [ctypes.c_uint8.from_address(open_and_close(rig)) for _ in range(100)]
    gc.collect()
    for pointer in pointers:
        error = failure_of(lambda pointer=pointer: pointer.value)  # type: ignore[misc]
        assert (error.errno, error.window) == (errno.ESTALE, None)
        assert failure_of(lambda pointer=pointer: setattr(pointer, "value", 1)).errno == errno.ESTALE  # type: ignore[misc]


@scenario
def a_window_is_garbage_with_a_pointer_left(rig: Rig) -> None:
    window = rig.window(1)
    pointer = ctypes.c_uint8.from_address(window.address)
    window[0] = 5
    assert pointer.value == 5
    del window
    assert failure_of(lambda: pointer.value).errno == errno.ESTALE


@scenario
def windows_that_open_and_close_for_ever_take_no_address_space(rig: Rig) -> None:
    for _ in range(100):
        open_and_close(rig)
    before, before_bytes = vmas(), address_space_bytes()
    for _ in range(CYCLES):
        open_and_close(rig)
    assert vmas() <= before + 4
    assert address_space_bytes() <= before_bytes + 4 * GIB


@scenario
def every_window_can_grow_to_a_gibibyte_under_its_views(rig: Rig) -> None:
    """Also one that gets the rest of what was reserved for others."""
    for _ in range(20):
        for _ in range(150):
            open_and_close(rig)
        window = rig.window(256)
        view = memoryview(cast(Any, window))
        window.resize(GIB)
        view.release()
        window.close()


@scenario
def windows_that_open_and_close_for_ever_take_no_page_tables(rig: Rig) -> None:
    before_bytes = page_tables_bytes()
    for index in range(2000):  # each has half of what a page table maps
        window = rig.window(256)
        array_without_export(window)[index * 100] = 1
        window.close()
    assert page_tables_bytes() <= before_bytes + (1 << 20)


@scenario
def a_window_whose_address_nobody_got_leaves_nothing(rig: Rig) -> None:
    places = set()
    for _ in range(100):
        window = rig.window(1)
        window[0] = 1
        window.close()
        window = rig.window(1)
        places.add(window.address)
        window.close()
    assert len(places) <= 100


@scenario
@address_space
def closed_windows_are_given_back_where_address_space_is_limited(rig: Rig) -> None:
    limit_bytes = address_space_bytes() + 256 * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    kept = rig.window(16)
    array = array_without_export(kept)
    array[0] = 3
    kept.close()
    for index in range(500):  # of a MiB each, twice as much as there is
        window = rig.window(256, vma_id=VMA + index)
        array_without_export(window)[0] = 1
        window.close()
        del window
    assert failure_of(lambda: array[0]).window is kept
    held = [rig.window(16, vma_id=VMA + index) for index in range(300)]
    assert len({window.address for window in held}) == 300


@scenario
@address_space
def a_windows_address_space_is_limited_with_that_of_the_process(rig: Rig) -> None:
    limit_bytes = address_space_bytes() + GIB
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    windows = [rig.window(64, vma_id=VMA + index) for index in range(400)]
    for window in windows:
        window[5] = 1
    view = memoryview(cast(Any, windows[0]))
    windows[0].resize(128 * PAGE)  # it grows in its place, a little
    view.release()
    large = rig.window(300 * 256, vma_id=VMA + 1000)
    large[0] = 1
    assert len(bytearray(50 << 20)) == 50 << 20


@scenario
def windows_are_closed_while_threads_use_them(rig: Rig) -> None:
    """A thread sees bytes of its own window, or a BusError, and never those of the next."""
    pages = 64
    wrong: list[object] = []
    arrays: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    done = threading.Event()
    started = threading.Barrier(4)

    def use() -> None:
        started.wait()
        while not done.is_set():
            array = arrays[-1]
            try:
                seen = int(array[:: PAGE // 2].max())
                settle()
                if seen > 1:
                    wrong.append(seen)
                array[::PAGE] = 1
                settle()
            except BusError as error:
                if error.errno != errno.ESTALE:
                    wrong.append(error)

    window = rig.window(pages)
    arrays.append(array_without_export(window))
    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait()
    for index in range(300):
        following = rig.window(pages, vma_id=VMA + 1 + index)
        arrays.append(array_without_export(following))
        window.close()
        window = following
        with mmap.mmap(-1, pages * PAGE) as foreign:
            foreign[:] = b"\x55" * (pages * PAGE)
            assert foreign[:] == b"\x55" * (pages * PAGE)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(rig.region[:]) <= {0, 1}


@scenario
@forks
def a_forks_child_finds_closed_windows_closed(rig: Rig) -> None:
    window = rig.window(8)
    array = array_without_export(window)
    pointer = ctypes.c_uint8.from_address(open_and_close(rig))
    window.close()
    pid = os.fork()
    if not pid:
        mmu.set_bus_error(BusError)
        foreign = [mmap.mmap(-1, GIB) for _ in range(8)]
        errors = [failure_of(lambda: array[PAGE]), failure_of(lambda: array.fill(1)), failure_of(lambda: pointer.value)]
        assert not any(memory[:100].strip(b"\0") for memory in foreign)
        os._exit(0 if [error.errno for error in errors] == [errno.ESTALE] * 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert failure_of(lambda: array[PAGE]).errno == errno.ESTALE


@scenario
def a_closed_private_window(rig: Rig) -> None:
    window = mmu.Window(rig.pager, VMA, 0, 8 * PAGE, True, True)
    array = array_without_export(window)
    array[3 * PAGE] = 5
    window.close()
    error = failure_of(lambda: array[3 * PAGE])
    assert (error.errno, error.window) == (errno.ESTALE, window)


@scenario
def what_a_window_left_when_it_moved_is_closed(rig: Rig) -> None:
    window = rig.window(1)
    array = array_without_export(window)
    array[0] = 5
    before = window.address
    foreign = mmap.mmap(-1, PAGE)
    window.resize(1 << 45)
    if window.address == before:  # it was free behind it
        return
    assert window[0] == 5
    error = failure_of(lambda: array[0])
    assert (error.errno, error.window) == (errno.ESTALE, window)
    foreign.close()
    window.close()
    assert failure_of(lambda: array[0]).errno == errno.ESTALE


@scenario
def views_reach_past_the_end_of_a_window_that_shrank_without_exports(rig: Rig) -> None:
    window = rig.window(8)
    array = array_without_export(window)
    window.resize(PAGE)
    assert failure_of(lambda: array[5 * PAGE]).errno == errno.EFAULT
    window.close()
    assert failure_of(lambda: array[5 * PAGE]).errno == errno.ESTALE


@scenario
@forks
def a_closed_window_of_a_pager_that_signals(rig: Rig) -> None:
    window = mmu.Window(rig.new_pager(sigbus=True), VMA, 0, PAGE, True)
    array = array_without_export(window)
    window.close()
    pid = os.fork()
    if not pid:
        array[0] = 1
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS


@scenario
def a_slice_assigned_from_a_closed_window(rig: Rig) -> None:
    window = rig.window(1)
    array = array_without_export(window)
    window.close()
    target = rig.window(1, vma_id=VMA + 1)
    assert failure_of(lambda: target.__setitem__(slice(0, 4), cast(Any, array[:4]))).errno == errno.ESTALE
