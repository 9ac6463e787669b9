"""Scenarios of protections: mprotect(2) for ranges of a window."""

import ctypes
import errno
import mmap
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import pytest

from dax_mp import mmu
from mmu_rig import FAULTS, PAGE, VMA, Rig, array_of, forks, scenario

NONE: Final = 0
READ: Final = mmap.PROT_READ
BOTH: Final = mmap.PROT_READ | mmap.PROT_WRITE
Handler: Final = ctypes.CFUNCTYPE(None, ctypes.c_int)


@contextmanager
def program_handler(rig: Rig, on_signal: Callable[[], None]) -> Iterator[list[int]]:
    """A SIGSEGV handler of the program, in C; what it yields counts its calls."""
    calls: list[int] = []

    def handle(number: int) -> None:
        calls.append(number)
        on_signal()

    handler = Handler(handle)
    libc = ctypes.PyDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    mmu.release_signals()
    libc.signal(signal.SIGSEGV, ctypes.cast(handler, ctypes.c_void_p))
    mmu.claim_signals()
    yield calls
    mmu.release_signals()
    libc.signal(signal.SIGSEGV, None)
    mmu.claim_signals()


def signal_of(access: Callable[[], object]) -> int:
    """The signal that ends a child which makes the access; 0: none does."""
    pid = os.fork()
    if not pid:
        access()
        os._exit(0)
    return -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def permissions(window: mmu.Window) -> list[str]:
    """Of each page, as the kernel says."""
    pages = len(window) // PAGE
    found = ["---"] * pages
    with open("/proc/self/maps", encoding="ascii") as maps:
        for line in maps:
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            for page in range(pages):
                if start <= window.address + page * PAGE < end:
                    found[page] = line.split()[1][:3]
    return found


@scenario
def a_forbidden_store_goes_to_the_programs_handler(rig: Rig) -> None:
    """A write barrier: the handler of the program allows the page, and the store is done."""
    window = rig.window(8)
    array = array_of(window)
    array[:] = 1
    window.protect(2 * PAGE, 4 * PAGE, READ)
    with program_handler(rig, lambda: window.protect(3 * PAGE, PAGE, BOTH)) as calls:
        assert int(array.sum()) == 8 * PAGE, "loads are allowed, also of pages that are mapped again for it"
        array[0] = array[7 * PAGE] = 2
        assert calls == []
        array[3 * PAGE + 5] = 9
        assert calls == [signal.SIGSEGV]
        array[3 * PAGE + 6] = 9
        assert calls == [signal.SIGSEGV]
    assert permissions(window)[2:6:2] == ["r--", "r--"]
    assert rig.region[3 * PAGE + 4 : 3 * PAGE + 7] == b"\1\t\t"


@scenario
@forks
def a_forbidden_access_ends_the_process(rig: Rig) -> None:
    window = rig.window(8)
    array = array_of(window)
    array[:] = 1
    window.protect(0, PAGE, NONE)
    window.protect(PAGE, PAGE, READ)
    for access in (
        lambda: array[0],
        lambda: array.__setitem__(0, 1),
        lambda: array.__setitem__(PAGE, 1),
        lambda: window[0],
        lambda: window.__setitem__(PAGE, 1),
    ):
        assert signal_of(access) == signal.SIGSEGV
    assert signal_of(lambda: array[2 * PAGE]) == 0
    window.protect(0, 2 * PAGE, BOTH)
    array[0] = array[PAGE] = 3
    assert int(array[: 2 * PAGE].sum()) == 2 * PAGE + 4


@scenario
def a_fault_maps_no_more_than_is_allowed(rig: Rig) -> None:
    """The protection is there before anything is mapped; what lies around a fault comes with it."""
    rig.coordinator.set(span_pages=8)
    window = rig.window(8)
    window.protect(PAGE, PAGE, READ)
    window.protect(2 * PAGE, PAGE, NONE)
    window.protect(4 * PAGE, PAGE, mmap.PROT_WRITE)
    window[0] = window[4 * PAGE] = window[7 * PAGE] = 1
    assert window[PAGE] == 0
    assert permissions(window) == ["rw-", "r--", "---", "rw-", "rw-", "rw-", "rw-", "rw-"]
    window.protect(0, 8 * PAGE, READ)
    assert permissions(window) == ["r--" if FAULTS == "userfaultfd" else "---"] * 8, "nothing is mapped"
    assert window[:] == b"\1" + bytes(4 * PAGE - 1) + b"\1" + bytes(3 * PAGE - 1) + b"\1" + bytes(PAGE - 1)
    assert permissions(window) == ["r--"] * 8


@scenario
def private_copies_are_protected_and_kept(rig: Rig) -> None:
    window = mmu.Window(rig.pager, VMA, 0, 8 * PAGE, True, True)
    array = array_of(window)
    array[::PAGE] = 0
    array[PAGE] = array[3 * PAGE] = 7
    window.protect(0, 4 * PAGE, READ)
    assert (array[0], array[PAGE], array[3 * PAGE]) == (0, 7, 7)
    with program_handler(rig, lambda: window.protect(PAGE, PAGE, BOTH)) as calls:
        array[PAGE] = 8
        assert calls == [signal.SIGSEGV]
    window.protect(0, 8 * PAGE, NONE)
    assert permissions(window) == ["---"] * 8
    with program_handler(rig, lambda: window.protect(3 * PAGE, PAGE, READ)) as calls:
        assert array[3 * PAGE] == 7
        assert calls == [signal.SIGSEGV]
    window.protect(0, 8 * PAGE, BOTH)
    assert (array[PAGE], array[3 * PAGE], array[5 * PAGE]) == (8, 7, 0)
    array[3 * PAGE] = 9
    assert rig.region[: 8 * PAGE] == bytes(8 * PAGE)


@scenario
@forks
def an_unmap_leaves_private_copies_protected(rig: Rig) -> None:
    window = mmu.Window(rig.pager, VMA, 0, 8 * PAGE, True, True)
    array = array_of(window)
    array[PAGE] = array[2 * PAGE] = 7
    window.protect(PAGE, PAGE, READ)
    window.protect(2 * PAGE, PAGE, NONE)
    rig.coordinator.tell("unmap", 1, [VMA, 0, 8], 0)
    assert rig.coordinator.event()[:2] == ["ack", 1]
    assert array[PAGE] == 7
    assert permissions(window)[1:3] == ["r--", "---"]
    assert signal_of(lambda: array.__setitem__(PAGE, 1)) == signal.SIGSEGV


@scenario
def pinned_pages_are_mapped_again(rig: Rig) -> None:
    window = rig.window(200)
    view = memoryview(cast(Any, window))
    window.keep(10 * PAGE, 150 * PAGE, True)
    window.populate(10 * PAGE, 150 * PAGE, True)
    window.protect(20 * PAGE, 100 * PAGE, READ)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    for page in (10, 20, 119, 120, 159):
        assert os.write(writer, view[page * PAGE : page * PAGE + 1]) == 1
    with pytest.raises(OSError) as raised:
        os.readv(reader, [view[20 * PAGE : 20 * PAGE + 1]])
    assert raised.value.errno == errno.EFAULT
    assert os.readv(reader, [view[120 * PAGE : 120 * PAGE + 1]]) == 1
    window.protect(20 * PAGE, 100 * PAGE, BOTH)
    assert os.readv(reader, [view[20 * PAGE : 20 * PAGE + 1]]) == 1
    view.release()


@scenario
def what_cannot_be_protected(rig: Rig) -> None:
    window = rig.window(8)
    reader = rig.window(8, vma_id=VMA + 1, writable=False)
    reader.protect(0, 8 * PAGE, NONE)
    reader.protect(0, 8 * PAGE, READ)
    for arguments, code in (
        ((1, PAGE, READ), errno.EINVAL),
        ((0, PAGE, 8), errno.EINVAL),
        ((0, PAGE, 4), errno.EACCES),
    ):
        with pytest.raises(OSError) as raised:
            window.protect(*arguments)
        assert raised.value.errno == code
    with pytest.raises(OSError) as raised:
        reader.protect(0, PAGE, BOTH)
    assert raised.value.errno == errno.EACCES
    for start, length in ((0, 8 * PAGE + 1), (-PAGE, PAGE), (9 * PAGE, 0), (0, -1)):
        with pytest.raises(ValueError, match="not in the mapping"):
            window.protect(start, length, READ)
    window.protect(PAGE, 0, NONE)
    assert window[:] == bytes(8 * PAGE)
    assert reader[:] == bytes(8 * PAGE)


@scenario
@forks
def a_window_that_shrinks_forgets_what_was_protected_there(rig: Rig) -> None:
    window = rig.window(8)
    window.protect(2 * PAGE, 6 * PAGE, NONE)
    window.resize(4 * PAGE)
    window.resize(8 * PAGE)
    window[4 * PAGE] = 1
    assert permissions(window)[4] == "rw-"
    assert signal_of(lambda: window[3 * PAGE]) == signal.SIGSEGV


@scenario
def random_protections_are_what_the_kernel_says(rig: Rig) -> None:
    pages, generator = 40, random.Random(7)
    names = {NONE: "---", READ: "r--", BOTH: "rw-"}
    window = rig.window(pages)
    private = mmu.Window(rig.pager, VMA + 1, 0, pages * PAGE, True, True)
    allowed = [[BOTH] * pages, [BOTH] * pages]
    for _ in range(300):
        first = generator.randrange(pages)
        end = generator.randint(first, pages)
        protection = generator.choice([NONE, READ, BOTH])
        which = generator.randrange(2)
        each = (window, private)[which]
        each.protect(first * PAGE, (end - first) * PAGE, protection)
        allowed[which][first:end] = [protection] * (end - first)
        for page in range(pages):
            if allowed[which][page] == BOTH:
                each[page * PAGE] = 5
            elif allowed[which][page] == READ:
                each[page * PAGE]
        assert permissions(each) == [names[page] for page in allowed[which]]
