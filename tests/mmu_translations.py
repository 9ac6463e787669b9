"""Scenarios of the native part: what is mapped, where, and for how long; and the windows themselves."""

import ctypes
import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

from dax_mp import mmu
from mmu_rig import PAGE, VMA, BusError, Rig, address_space, array_of, failure_of, scenario


@scenario
def read_and_write(rig: Rig) -> None:
    """A hole reads as zero without a frame, a store gets the frame, and a load after it sees the frame."""
    window = rig.window(4)
    assert window[0] == 0
    assert window[PAGE : PAGE + 3] == bytes(3)
    window[PAGE : PAGE + 3] = b"abc"
    assert rig.region[PAGE : PAGE + 3] == b"abc"
    rig.region[PAGE + 1] = ord("B")
    assert window[PAGE : PAGE + 3] == b"aBc"
    counters = rig.pager.counters()
    assert (counters["faults"], counters["maps"], counters["bus_errors"]) == (3, 3, 0), counters


@scenario
def segments_are_clipped_to_the_window(rig: Rig) -> None:
    rig.coordinator.set(span_pages=64)
    window = rig.window(3, pgoff=2)
    neighbour = rig.window(3, pgoff=2, vma_id=VMA + 1)
    window[0] = 1
    assert rig.region[2 * PAGE] == 1
    window[3 * PAGE - 1] = 9
    assert rig.region[5 * PAGE - 1] == 9
    assert rig.pager.counters()["faults"] == 1
    assert neighbour[0] == 1
    assert rig.pager.counters()["faults"] == 2


@scenario
def length_in_bytes(rig: Rig) -> None:
    """A window may end within a page; what is behind that is not part of it."""
    window = mmu.Window(rig.pager, VMA, 0, PAGE + 3, True)
    window[:] = b"x" * (PAGE + 3)
    assert len(window) == PAGE + 3
    assert rig.region[PAGE : PAGE + 4] == b"xxx\0"


@scenario
def read_only_window(rig: Rig) -> None:
    rig.coordinator.set(report=True)
    window = rig.window(1, writable=False)
    assert window[0] == 0
    assert rig.coordinator.event()[4] == 0
    assert memoryview(cast(Any, window)).readonly


@scenario
def unmap_is_acknowledged(rig: Rig) -> None:
    rig.coordinator.set(report=True, span_pages=8)
    window = rig.window(8)
    window[0] = 0
    assert rig.coordinator.event()[0] == "fault"
    window[:] = b"x" * 8 * PAGE
    rig.coordinator.set(span_pages=1)
    rig.coordinator.tell("unmap", 5, [VMA, 2, 1, VMA, 4, 1 << 50, VMA + 1, 0, 1])
    assert rig.coordinator.event()[:2] == ["ack", 5]
    assert window[0] == window[3 * PAGE] == ord("x")
    assert window[2 * PAGE] == window[7 * PAGE] == ord("x")
    assert [rig.coordinator.event()[3] for _ in range(2)] == [2, 7]
    assert rig.pager.counters()["unmaps"] == 1


@scenario
def unmap_does_not_wait_for_the_gil(rig: Rig) -> None:
    window = rig.window(1)
    window[0] = 1
    usleep = ctypes.PyDLL(None).usleep  # PyDLL: with the GIL
    rig.coordinator.tell("unmap", 1, [VMA, 0, 1])
    usleep(500_000)
    free_ns = time.monotonic_ns()
    _, _, acknowledged_ns = rig.coordinator.event()
    assert acknowledged_ns < free_ns - 100_000_000, "the acknowledgement came when the GIL was free"


@scenario
def threads_fault_at_once(rig: Rig) -> None:
    """More than one fault waits, none holds up the other, and each gets its own page."""
    rig.coordinator.set(hold=True, report=True)
    array = array_of(rig.window(8))
    copy = ctypes.CDLL(None).memset  # CDLL: without the GIL
    address = array.ctypes.data
    threads = [threading.Thread(target=copy, args=(ctypes.c_void_p(address + n * PAGE), n + 1, 1)) for n in range(8)]
    for thread in threads:
        thread.start()
    faults = [rig.coordinator.event() for _ in threads]
    assert sorted(fault[3] for fault in faults) == list(range(8))
    assert len({fault[1] for fault in faults}) == 8
    rig.coordinator.tell("answer")
    for thread in threads:
        thread.join()
    assert [rig.region[n * PAGE] for n in range(8)] == list(range(1, 9))


@scenario
def no_store_is_lost(rig: Rig) -> None:
    """Threads count up bytes of the same pages, with and without the GIL, while the pages are unmapped under them."""
    rounds, pages = 60, 16
    window = rig.window(pages)
    memset = ctypes.CDLL(None).memset
    array = array_of(window)
    rig.coordinator.set(report_acks=False)

    def count(column: int, store: Callable[[int, int], object]) -> None:
        for value in range(1, rounds + 1):
            for page in range(pages):
                assert array[page * PAGE + column] == value - 1
                store(page * PAGE + column, value)

    def store_without_gil(offset: int, value: int) -> None:
        memset(ctypes.c_void_p(window.address + offset), value, 1)

    stores = (window.__setitem__, array.__setitem__, store_without_gil)
    failures: list[threading.ExceptHookArgs] = []
    threading.excepthook = failures.append
    threads = [threading.Thread(target=count, args=args) for args in enumerate(stores)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        rig.coordinator.tell("unmap", 1, [VMA, 0, pages])
        rig.coordinator.set(hello=True)  # it has got to that
    assert not failures, failures
    for page in range(pages):
        assert list(rig.region[page * PAGE : page * PAGE + len(stores)]) == [rounds] * len(stores)


@scenario
def a_frame_that_is_gone(rig: Rig) -> None:
    """The region is truncated under a mapping: the kernel's SIGBUS, here EIO."""
    window = rig.window(4)
    window[PAGE] = 1
    os.ftruncate(rig.region_fd, PAGE + PAGE)
    assert failure_of(lambda: window[PAGE]).errno == errno.EIO
    array = array_of(window)
    assert failure_of(array.sum).errno == errno.EIO


@scenario
def many_windows(rig: Rig) -> None:
    windows = [rig.window(1, pgoff=n % 256, vma_id=n) for n in range(3000)]
    for n in (0, 255, 256, 1500, 2999):
        windows[n][0] = n % 251
        assert rig.region[n % 256 * PAGE] == n % 251
    for window in windows[::2]:
        window.close()
    again = [rig.window(1, pgoff=3, vma_id=5000 + n) for n in range(1600)]
    assert windows[1501][0] == 0
    again[-1][7] = 77
    assert rig.region[3 * PAGE + 7] == 77


@scenario
@address_space
def more_mappings_than_the_kernel_allows(rig: Rig) -> None:
    rig.coordinator.set(stride_pages=2)
    with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
        pages = int(file.read()) + 2 * 64
    os.ftruncate(rig.region_fd, PAGE + pages * PAGE)
    window = rig.window(pages)
    for first in range(0, pages, 128):
        window[first * PAGE] = 1 + first // 128 % 255
    assert rig.pager.counters()["drops"] > 0
    for first in range(0, pages, 128):
        assert window[first * PAGE] == 1 + first // 128 % 255


def take_all_mappings() -> Callable[[], object]:
    """Makes VMAs until the kernel gives no more, and returns what gives them back."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = 1 << 30
    base = libc.mmap(None, ctypes.c_size_t(size), 0, 0x4022, -1, ctypes.c_long(0))
    for offset in range(0, size, 2 * PAGE):
        if libc.mprotect(ctypes.c_void_p(base + offset), ctypes.c_size_t(PAGE), 1):
            assert ctypes.get_errno() == errno.ENOMEM
            return lambda: libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(size))
    raise AssertionError("vm.max_map_count is too high for this test")


@scenario
@address_space
def no_mapping_is_left(rig: Rig) -> None:
    """mmap says ENOMEM: translations are given up for it, and with none left it is a BusError."""
    first, second = rig.window(64), rig.window(64, vma_id=VMA + 1)
    for page in range(0, 64, 2):
        first[page * PAGE] = 5
    give_back = take_all_mappings()
    second[PAGE] = 6
    dropped = rig.pager.counters()["drops"]
    failures = 0
    rig.pager.close()
    give_back()
    assert dropped >= 32, dropped
    rig.pager = rig.new_pager()
    third = rig.window(64)
    give_back = take_all_mappings()
    try:
        third[PAGE]
    except BusError as error:
        failures = error.errno or 0
    give_back()
    assert failures == errno.ENOMEM, failures
    assert third[PAGE] == 6


def take_one_more_mapping() -> None:
    """The kernel lets mmap go one over the limit; with that, no mmap works, not even over what is mapped."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    for protection in (1, 0, 1):
        libc.mmap(None, ctypes.c_size_t(PAGE), protection, 0x22, -1, ctypes.c_long(0))


@scenario
@address_space
def an_unmap_needs_no_mapping(rig: Rig) -> None:
    """A translation that is to go goes, also when mmap says ENOMEM to everything."""
    rig.coordinator.set(span_pages=8)
    window = rig.window(8)
    untouched = rig.window(8, vma_id=VMA + 1)
    window[:] = b"x" * 8 * PAGE
    give_back = take_all_mappings()
    take_one_more_mapping()
    rig.coordinator.tell("unmap", 3, [VMA, 2, 1, VMA + 1, 0, 8])
    acknowledged = rig.coordinator.event()[:2]
    rig.region[2 * PAGE] = ord("y")
    give_back()
    assert acknowledged == ["ack", 3]
    faults = rig.pager.counters()["faults"]
    assert window[2 * PAGE] == ord("y")
    assert rig.pager.counters()["faults"] == faults + 1
    assert window[3 * PAGE] == untouched[0] == ord("x")


@scenario
@address_space
def the_end_needs_no_mapping(rig: Rig) -> None:
    """A pager closes, and a window, when mmap says ENOMEM to everything."""
    windows = [rig.window(8, vma_id=VMA + number) for number in range(4)]
    windows[1][PAGE] = 1
    give_back = take_all_mappings()
    take_one_more_mapping()
    rig.pager.close()
    windows[2].close()
    windows[1].close()
    give_back()
    assert failure_of(lambda: windows[3][0]).errno == errno.ESTALE


@scenario
@address_space
def a_map_for_which_almost_no_mapping_is_left(rig: Rig) -> None:
    """The page that a fault waits for is mapped, whatever becomes of its neighbours in the same Map."""
    rig.coordinator.set(stride_pages=2)
    first, second = rig.window(32), rig.window(256, vma_id=VMA + 1)
    first[0] = 5
    give_back = take_all_mappings()
    second[0] = 6
    loaded = [second[page * PAGE] for page in (0, 2, 4)]
    give_back()
    assert loaded == [6, 0, 0]
    assert rig.pager.counters()["drops"] > 0


@scenario
def exports_hold_a_window_open(rig: Rig) -> None:
    window = rig.window(1)
    view = memoryview(cast(Any, window))
    array = array_of(window)
    assert window.exports == 2
    with pytest.raises(BufferError, match="cannot close exported pointers exist"):
        window.close()
    view.release()
    del array
    address = window.address
    window.close()
    window.close()
    assert (window.closed, window.address, window.exports) == (True, 0, 0)
    with open("/proc/self/maps", encoding="ascii") as maps:
        for line in maps:
            start, _, end = line.split()[0].partition("-")
            assert not int(start, 16) <= address < int(end, 16) or line.split()[4] == "0", "no file's"


@scenario
def a_window_is_garbage(rig: Rig) -> None:
    class Mapping(mmu.Window):
        pass

    window = Mapping(rig.pager, VMA, 0, PAGE, True)
    window.itself = window  # type: ignore[attr-defined]
    window[0] = 1
    plain = weakref.ref(rig.window(1, vma_id=VMA + 1))
    assert plain() is None
    reference = weakref.ref(window)
    del window
    gc.collect()
    assert reference() is None
    assert rig.window(1)[0] == 1


@scenario
def no_access_slips_through_while_pages_are_unmapped(rig: Rig) -> None:
    """Each load reads what is in the frame, and each store gets there, at whatever moment a page is taken out."""
    pages, half = 32, 16 * PAGE
    window = rig.window(pages)
    window[:] = b"\7" * pages * PAGE
    array = array_of(window)
    ended = threading.Event()
    wrong: list[int] = []

    def load() -> None:
        while not ended.is_set():
            least = int(array[:half].min())
            if least != 7:
                wrong.append(least)

    def store() -> None:
        value = 0
        while not ended.is_set():
            value = value % 255 + 1
            array[half:] = value
            if rig.region[half : pages * PAGE] != bytes([value]) * half:
                wrong.append(value)

    threads = [threading.Thread(target=function) for function in (load, store)]
    for thread in threads:
        thread.start()
    for number in range(300):
        rig.coordinator.tell("unmap", number + 1, [VMA, 0, pages])
        assert rig.coordinator.event()[:2] == ["ack", number + 1]
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong
