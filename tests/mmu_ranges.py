"""Scenarios of what is done to ranges of a window: populate, drop, move, resize; direct I/O; SIGBUS."""

import ctypes
import errno
import os
import threading
from typing import Any, cast

import pytest

from dax_mp import mmu
from mmu_rig import PAGE, VMA, BusError, Rig, address_space, array_of, failure_of, scenario


@scenario
def populate_maps_without_a_change(rig: Rig) -> None:
    window = rig.window(8)
    window[3 * PAGE + 7] = 9
    faults = rig.pager.counters()["faults"]
    window.populate(10, 4 * PAGE, False)
    assert rig.pager.counters()["faults"] == faults + 4
    window.populate(0, 8 * PAGE, True)
    assert window[3 * PAGE + 7] == 9
    faults = rig.pager.counters()["faults"]
    with memoryview(cast(Any, window)) as view:
        assert os.preadv(os.open("/dev/zero", os.O_RDONLY), [view], 0) == 8 * PAGE  # a system call finds all pages
    assert rig.pager.counters()["faults"] == faults
    with pytest.raises(ValueError, match="not in the mapping"):
        window.populate(0, 8 * PAGE + 1, False)
    with pytest.raises(TypeError):
        rig.window(1, vma_id=VMA + 1, writable=False).populate(0, 1, True)


@scenario
def populate_past_the_end_is_a_bus_error(rig: Rig) -> None:
    rig.coordinator.set(size_pages=2)
    window = rig.window(4)
    assert failure_of(lambda: window.populate(0, 4 * PAGE, False)).errno == errno.EFAULT


@scenario
def dropped_pages_are_faulted_in_again(rig: Rig) -> None:
    window = rig.window(4)
    window.populate(0, 4 * PAGE, True)
    window[PAGE] = 7
    faults = rig.pager.counters()["faults"]
    window.drop(1, 3 * PAGE - 1)  # the whole pages in it: the second and the third
    assert [window[page * PAGE] for page in range(4)] == [0, 7, 0, 0]
    assert rig.pager.counters()["faults"] == faults + 2


@scenario
def move_as_memmove(rig: Rig) -> None:
    window = rig.window(2)
    window[PAGE - 3 : PAGE + 3] = b"abcdef"
    window.move(PAGE - 2, PAGE - 3, 5)
    assert window[PAGE - 3 : PAGE + 3] == b"aabcde"
    for arguments in ((-1, 0, 1), (0, 0, 2 * PAGE + 1), (2 * PAGE, 0, 1), (0, 2 * PAGE, 1), (0, 0, -1)):
        with pytest.raises(ValueError, match="out of range"):
            window.move(*arguments)


@scenario
def a_window_grows_under_its_views(rig: Rig) -> None:
    rig.coordinator.set(span_pages=1)
    window = rig.window(1)
    view = memoryview(cast(Any, window))
    view[0] = 5
    window.resize(3 * PAGE + 1)
    assert len(window) == 3 * PAGE + 1
    window[3 * PAGE] = 6
    view[1] = 7
    assert window[:2] == bytes([5, 7])
    assert len(view) == PAGE
    with memoryview(cast(Any, window)) as grown:
        assert (grown[0], grown[3 * PAGE]) == (5, 6)
    window.resize(PAGE)
    with pytest.raises(IndexError):
        window[PAGE]
    view.release()


@scenario
def views_reach_past_the_end_of_a_window_that_shrank(rig: Rig) -> None:
    window = rig.window(8)
    array = array_of(window)
    array[5 * PAGE] = 7
    window.resize(PAGE)
    for access in (lambda: array[5 * PAGE], lambda: array.__setitem__(7 * PAGE, 1)):
        error = failure_of(access)
        assert (error.errno, error.window) == (errno.EFAULT, window)
    window.resize(8 * PAGE)
    assert (array[5 * PAGE], array[7 * PAGE]) == (7, 0), "the file's pages again"


@scenario
def a_window_shrinks_under_a_copy_without_the_gil(rig: Rig) -> None:
    length_pages = 2048
    rig.coordinator.set(hold=True, report=True)
    window = rig.window(length_pages)
    failures: list[BusError] = []
    copier = threading.Thread(target=lambda: failures.append(failure_of(lambda: window[:])))
    copier.start()
    rig.coordinator.event()
    window.resize(PAGE)
    rig.coordinator.set(hold=False, report=False, size_pages=1)
    rig.coordinator.tell("answer")
    copier.join()
    assert failures[0].errno == errno.EFAULT


@scenario
def a_window_that_cannot_grow_in_place_moves_without_views(rig: Rig) -> None:
    window = rig.window(1)
    window[0] = 5
    length_bytes = 1 << 40
    # What is behind its address space belongs to somebody else.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
    libc.mmap(window.address + (1 << 30), PAGE, 0, 0x22, -1 & (1 << 64) - 1, 0)
    view = memoryview(cast(Any, window))
    before = window.address
    with pytest.raises(BufferError):
        window.resize(length_bytes)
    assert (window.address, len(window)) == (before, PAGE)
    view.release()
    window.resize(length_bytes)
    assert window.address != before
    assert window[0] == 5


@scenario
@address_space
def a_kept_window_is_not_given_up(rig: Rig) -> None:
    """Mappings are given up in other windows when there are too many."""
    rig.coordinator.set(stride_pages=2)
    os.ftruncate(rig.region_fd, PAGE + 64 * 2 * 1000 * PAGE)
    kept = rig.window(64 * 2 * 200, vma_id=VMA + 1)
    kept.keep(0, len(kept), True)
    for start in range(0, 64 * 2 * 200, 64 * 2):
        assert kept[start * PAGE] == 0
    other = rig.window(64 * 2 * 1000)
    for start in range(0, 64 * 2 * 1000, 64 * 2):
        assert other[start * PAGE] == 0
    assert rig.pager.counters()["drops"] > 0
    faults = rig.pager.counters()["faults"]
    for start in range(0, 64 * 2 * 200, 64 * 2):
        assert kept[start * PAGE] == 0
    assert rig.pager.counters()["faults"] == faults


@scenario
@address_space
def a_kept_range_stays_while_the_rest_of_its_window_is_given_up(rig: Rig) -> None:
    pages = 64 * 2 * 1000
    rig.coordinator.set(stride_pages=2)
    os.ftruncate(rig.region_fd, PAGE + pages * PAGE)
    window = rig.window(pages)
    window.keep(64 * PAGE, PAGE, True)
    window.keep(64 * PAGE, PAGE, True)
    window.keep(500 * 128 * PAGE, 128 * PAGE, True)
    for start in range(0, pages, 128):
        window[start * PAGE] = 1 + start // 128 % 255
    assert rig.pager.counters()["drops"] > 0
    faults = rig.pager.counters()["faults"]
    assert (window[64 * PAGE], window[500 * 128 * PAGE]) == (0, 1 + 500 % 255)
    assert rig.pager.counters()["faults"] == faults
    for start in range(0, pages, 128):
        assert window[start * PAGE] == 1 + start // 128 % 255
    window.keep(64 * PAGE, PAGE, False)
    window.keep(64 * PAGE, PAGE, False)
    for offset, length in ((64 * PAGE, PAGE), (0, PAGE)):
        with pytest.raises(FileNotFoundError):
            window.keep(offset, length, False)
    rig.coordinator.tell("evict", errno.ESTALE)
    assert rig.coordinator.event() == ["dropped"]
    assert failure_of(lambda: window[500 * 128 * PAGE]).errno == errno.ESTALE, "an eviction drops kept ranges too"


@scenario
def store_and_load_lent_frames(rig: Rig) -> None:
    assert rig.pager.store(b"x" * 3 * PAGE, 2 * PAGE + 5) == 3 * PAGE
    assert rig.region[PAGE + 4 : PAGE + 6] == b"\0x"
    buffer = bytearray(3 * PAGE)
    assert rig.pager.load(buffer, 2 * PAGE + 5) == 3 * PAGE
    assert buffer == b"x" * 3 * PAGE
    window = rig.window(4)
    window[PAGE] = 1
    with memoryview(cast(Any, window)) as view:
        assert rig.pager.store(view, 0) == 0  # the first page is not mapped
        assert rig.pager.store(view[PAGE:], 0) == PAGE  # the third is not
    rig.pager.close()
    with pytest.raises(OSError) as caught:
        rig.pager.store(b"x", 0)
    assert caught.value.errno == errno.ESTALE


@scenario
def a_rebound_window_faults_to_the_other_pager(rig: Rig) -> None:
    window = rig.window(2)
    window[0] = 5
    second = rig.new_pager()  # the coordinator of a few lines answers to whom it heard of last
    rig.coordinator.set(report=True)
    window.rebind(second, VMA + 7)
    assert window[PAGE] == 0
    assert rig.coordinator.event()[2] == VMA + 7
    assert window.vma_id == VMA + 7
    assert second.counters()["faults"] == 1
    window.close()
    second.close()


def past_the_end(rig: Rig) -> mmu.Window:
    rig.coordinator.set(size_pages=1)
    return mmu.Window(rig.new_pager(sigbus=True), VMA, 0, 2 * PAGE, True)


@scenario
def sigbus_ends_the_process(rig: Rig) -> None:
    window = past_the_end(rig)
    print("now", flush=True)
    window[PAGE] = 1


@scenario
def raising_is_the_default(rig: Rig) -> None:
    rig.coordinator.set(size_pages=1)
    window = rig.window(2)
    with pytest.raises(BusError):
        window[PAGE] = 1
