"""Scenarios of private windows: a store makes a copy that this process alone sees, and a truncate alone takes away."""

import errno
import os
import threading
from typing import Any, Final, cast

import numpy as np

from dax_mp import mmu
from mmu_rig import PAGE, VMA, Rig, array_of, failure_of, forks, scenario

HAS_GUARDS: Final = tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 15)
"""Without guard regions each copy is a VMA."""


def private_window(rig: Rig, pages: int) -> mmu.Window:
    return mmu.Window(rig.pager, VMA, 0, pages * PAGE, True, True)


def unmap(rig: Rig, pgoff: int, pages: int, even_cows: int = 0) -> None:
    rig.coordinator.tell("unmap", 1, [VMA, pgoff, pages], even_cows)
    assert rig.coordinator.event()[:2] == ["ack", 1]


def shared_frames(rig: Rig, pages: int) -> None:
    """Pages that have frames: `a` in the first one, and so on."""
    rig.coordinator.set(span_pages=pages)
    writer = rig.window(pages, vma_id=VMA + 1)
    for page in range(pages):
        writer[page * PAGE : (page + 1) * PAGE] = bytes([ord("a") + page]) * PAGE
    rig.coordinator.set(span_pages=pages)


@scenario
def a_private_store_is_a_copy(rig: Rig) -> None:
    shared_frames(rig, 4)
    rig.coordinator.set(report=True)
    window = private_window(rig, 4)
    assert window[PAGE] == ord("b")
    assert rig.coordinator.event()[4] == 0
    window[PAGE] = ord("X")
    window[0] = ord("Y")
    assert rig.region[PAGE] == ord("b")
    assert (window[0], window[1], window[PAGE], window[PAGE + 1]) == (ord("Y"), ord("a"), ord("X"), ord("b"))
    rig.region[2 * PAGE] = ord("Z")
    assert window[2 * PAGE] == ord("Z")
    assert rig.pager.counters()["faults"] == 3  # the writer's, and two loads of this


@scenario
def the_first_access_to_a_private_page_may_be_a_store(rig: Rig) -> None:
    shared_frames(rig, 2)
    rig.coordinator.set(report=True)
    window = private_window(rig, 2)
    window[PAGE + 1] = ord("X")
    assert rig.coordinator.event()[4] == 0, "a private store is a read fault"
    assert window[PAGE : PAGE + 3] == b"bXb"


@scenario
def copies_outlive_an_unmap(rig: Rig) -> None:
    shared_frames(rig, 8)
    window = private_window(rig, 8)
    for page in (1, 2, 5):
        window[page * PAGE] = ord("X")
    unmap(rig, 0, 8)
    rig.region[:] = b"n" * len(rig.region)
    faults = rig.pager.counters()["faults"]
    assert [window[page * PAGE] for page in (1, 2, 5)] == [ord("X")] * 3
    assert window[PAGE + 1] == ord("b")
    assert rig.pager.counters()["faults"] == faults, "copies need no fault"
    assert bytes(window[page * PAGE] for page in range(8)) == b"nXXnnXnn"
    window[PAGE + 1] = ord("Y")
    assert window[PAGE : PAGE + 3] == b"XYb"


@scenario
def a_truncate_takes_copies_away(rig: Rig) -> None:
    shared_frames(rig, 4)
    window = private_window(rig, 4)
    window[:] = b"X" * len(window)
    unmap(rig, 2, 2, even_cows=1)
    assert [window[page * PAGE] for page in range(4)] == [ord(letter) for letter in "XXcd"]


@scenario
def private_holes(rig: Rig) -> None:
    """Copies of hole pages are told from hole pages that were only read."""
    pages = 1024
    rig.coordinator.set(span_pages=pages)
    window = private_window(rig, pages)
    assert window[:] == bytes(len(window))
    window[700 * PAGE] = 7
    unmap(rig, 0, pages)
    rig.coordinator.write(pages)
    rig.region[:] = b"n" * len(rig.region)
    assert (window[700 * PAGE], window[700 * PAGE + 1]) == (7, 0)
    assert window[3 * PAGE] == ord("n")


@scenario
def a_load_and_a_store_past_the_end(rig: Rig) -> None:
    """The page that the load ended on is no copy: the store that follows fails as well."""
    rig.coordinator.set(size_pages=1)
    window = private_window(rig, 2)
    array = array_of(window)

    def add() -> None:
        array[PAGE : PAGE + 64] += 1

    assert failure_of(add).errno == errno.EFAULT
    rig.coordinator.set(size_pages=2)
    assert window[PAGE : PAGE + 64] == bytes(64)


@scenario
def many_stores_past_the_end(rig: Rig) -> None:
    """More places than a window remembers: no page stays that these stores ended on."""
    pages = 256
    rig.coordinator.set(size_pages=2)
    window = private_window(rig, pages)
    array = array_of(window)
    array[PAGE] = 5

    def store() -> None:
        array[4 * PAGE :: 4 * PAGE] = 1

    assert failure_of(store).errno == errno.EFAULT
    rig.coordinator.set(size_pages=pages)
    assert not array[4 * PAGE :: 4 * PAGE].any()
    assert array[PAGE] == 5, "a copy stays"


@scenario
def more_copies_than_the_kernel_allows_mappings(rig: Rig) -> None:
    """Every second page is a copy: what lies between them is dropped, and mapped again, all the same."""
    if not HAS_GUARDS:
        return
    with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
        copies = int(file.read()) // 2 + 1000
    pages = 2 * copies
    os.ftruncate(rig.region_fd, PAGE + pages * PAGE)
    rig.coordinator.write(pages)
    rig.coordinator.set(span_pages=512)
    window = private_window(rig, pages)
    array = array_of(window)
    array[:: 2 * PAGE] = 7
    for between in (b"n", b"m"):
        unmap(rig, 0, pages)
        os.pwrite(rig.region_fd, between, PAGE + PAGE)
        os.pwrite(rig.region_fd, between, PAGE + (pages - 1) * PAGE)
        assert (array[:: 2 * PAGE] == 7).all()
        assert array[PAGE] == array[-PAGE] == ord(between)
    assert not array[3 * PAGE : -PAGE : 2 * PAGE].any()


@scenario
@forks
def more_copies_in_pieces_than_the_kernel_allows_mappings(rig: Rig) -> None:
    """Every second page is mapped, and stored to: each is a VMA, until they run out and the copies are gathered."""
    if not HAS_GUARDS:
        return
    with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
        copies = int(file.read()) // 2 + 3000
    os.ftruncate(rig.region_fd, PAGE + 2 * copies * PAGE)
    rig.coordinator.write(2 * copies)
    window = private_window(rig, 2 * copies)
    array = array_of(window)
    expected = np.arange(copies) % 251 + 1
    array[PAGE] = 9
    window.keep(PAGE, PAGE, True)
    array[:: 2 * PAGE] = expected
    assert (array[:: 2 * PAGE] == expected).all()
    unmap(rig, 0, 2 * copies)
    assert (array[:: 2 * PAGE] == expected).all()
    if not (pid := os.fork()):
        array[0] = 77
        os._exit(not (array[0] == 77 and (array[2 * PAGE :: 2 * PAGE] == expected[1:]).all() and array[PAGE] == 9))
    assert os.waitpid(pid, 0)[1] == 0
    assert (array[:: 2 * PAGE] == expected).all() and array[PAGE] == 9
    for page in (3, copies | 1, 2 * copies - 1):
        assert array[page * PAGE] == 0
        os.pwrite(rig.region_fd, b"n", PAGE + page * PAGE)
        assert array[page * PAGE] == ord("n")
    assert rig.pager.counters()["bus_errors"] == 0


@scenario
def an_evicted_process_keeps_its_copies(rig: Rig) -> None:
    shared_frames(rig, 4)
    window = private_window(rig, 4)
    window[PAGE] = ord("X")
    assert window[0] == ord("a")
    rig.coordinator.tell("evict", errno.ESTALE)
    assert rig.coordinator.event() == ["dropped"]
    assert window[PAGE : PAGE + 2] == b"Xb"
    assert failure_of(lambda: window[0]).errno == errno.ESTALE
    window[PAGE] = ord("Y")
    assert window[PAGE] == ord("Y")


@scenario
def no_store_is_lost_while_pages_are_unmapped(rig: Rig) -> None:
    pages = 64
    shared_frames(rig, 26)
    rig.coordinator.write(pages)
    rig.coordinator.set(span_pages=pages)
    window = private_window(rig, pages)
    view = memoryview(cast(Any, window))
    rounds = 300
    done = threading.Event()

    def store() -> None:
        for number in range(rounds):
            for page in range(pages):
                view[page * PAGE + number % PAGE] = number % 255 + 1
        done.set()

    writer = threading.Thread(target=store)
    writer.start()
    while not done.is_set():
        unmap(rig, 0, pages)
    writer.join()
    for page in range(pages):
        assert view[page * PAGE : page * PAGE + rounds] == bytes(number % 255 + 1 for number in range(rounds)), page
    view.release()


@scenario
@forks
def a_child_has_the_copies(rig: Rig) -> None:
    shared_frames(rig, 4)
    window = private_window(rig, 4)
    window[PAGE] = ord("X")
    assert window[0] == ord("a")
    if not (pid := os.fork()):
        try:
            assert window[PAGE : PAGE + 2] == b"Xb"
            window[PAGE] = ord("C")
            assert failure_of(lambda: window[0]).errno == errno.ESTALE
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert window[PAGE] == ord("X")
    assert window[0] == ord("a")


@scenario
def a_private_window_grows_in_place_alone(rig: Rig) -> None:
    window = private_window(rig, 1)
    window[0] = 5
    address = window.address
    window.resize(1 << 29)
    assert window.address == address
    assert window[0] == 5
