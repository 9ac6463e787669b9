"""Scenarios of the native part: other signals and handlers, forks, and a coordinator that does not keep to the rules.

Those that end by a signal print "now" just before it: what comes earlier is a failure.
"""

import ctypes
import errno
import faulthandler
import os
import select
import signal
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from dax_mp import messages, mmu
from mmu_rig import PAGE, VMA, BusError, Rig, array_of, failure_of, forks, scenario


def load(address: int) -> int:
    return ctypes.c_ubyte.from_address(address).value


def around(call: Callable[[], object]) -> None:
    """As the client library does with faulthandler's functions."""
    mmu.release_signals()
    call()
    mmu.claim_signals()


def works(rig: Rig, pgoff: int = 0) -> None:
    window = rig.window(1, pgoff=pgoff, vma_id=1000 + pgoff)
    window[0] = 3
    assert rig.region[pgoff * PAGE] == 3


def say_now() -> None:
    print("now", flush=True)


# --- handlers -------------------------------------------------------------------------------------------------------


@scenario
def faulthandler_in_every_order(rig: Rig) -> None:
    for pgoff, call in enumerate((faulthandler.enable, faulthandler.disable) * 2):
        around(call)
        works(rig, pgoff)
    faulthandler.enable()
    mmu.claim_signals()
    works(rig, 10)
    faulthandler.disable()
    rig.window(1)  # a new window claims too
    works(rig, 11)


@scenario
def crash(rig: Rig) -> None:
    works(rig)
    say_now()
    load(16)


@scenario
def crash_with_faulthandler_before(rig: Rig) -> None:
    around(faulthandler.enable)
    works(rig)
    say_now()
    load(16)


@scenario
def crash_with_faulthandler_behind_us_and_before_us(rig: Rig) -> None:
    """faulthandler was put in front, and we in front of that: each has the other as the previous handler."""
    works(rig)
    faulthandler.enable()
    mmu.claim_signals()
    works(rig, 1)
    say_now()
    load(16)


@scenario
def crash_in_a_thread(rig: Rig) -> None:
    around(faulthandler.enable)
    works(rig)
    say_now()
    thread = threading.Thread(target=load, args=(16,))
    thread.start()
    thread.join()


@scenario
def store_to_a_read_only_window(rig: Rig) -> None:
    """The kernel's answer to a store to a read-only mapping, not a bus error."""
    window = rig.window(1, writable=False)
    assert window[0] == 0
    say_now()
    ctypes.memset(window.address, 1, 1)


@scenario
def a_sent_signal_ends_the_process(rig: Rig) -> None:
    works(rig)
    say_now()
    os.kill(os.getpid(), signal.SIGSEGV)


@scenario
def a_sent_bus_signal_ends_the_process(rig: Rig) -> None:
    works(rig)
    say_now()
    os.kill(os.getpid(), signal.SIGBUS)


@scenario
def a_sent_signal_is_ignored(rig: Rig) -> None:
    mmu.release_signals()
    signal.signal(signal.SIGSEGV, signal.SIG_IGN)
    mmu.claim_signals()
    os.kill(os.getpid(), signal.SIGSEGV)
    works(rig)


@scenario
def an_ignored_crash_is_a_crash(rig: Rig) -> None:
    mmu.release_signals()
    signal.signal(signal.SIGSEGV, signal.SIG_IGN)
    mmu.claim_signals()
    works(rig)
    say_now()
    load(16)


@scenario
def a_sent_signal_reaches_pythons_handler(rig: Rig) -> None:
    mmu.release_signals()
    received: list[int] = []
    signal.signal(signal.SIGSEGV, lambda number, frame: received.append(number))
    mmu.claim_signals()
    os.kill(os.getpid(), signal.SIGSEGV)
    works(rig)
    assert received == [signal.SIGSEGV]


@scenario
def a_waiting_thread_is_interrupted(rig: Rig) -> None:
    """A handler runs while the fault waits, and the fault goes on waiting."""
    rig.coordinator.set(hold=True, report=True)
    window = rig.window(1)
    received: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    main = threading.get_ident()

    def interrupt() -> None:
        assert rig.coordinator.event()[0] == "fault"
        signal.pthread_kill(main, signal.SIGUSR1)
        rig.coordinator.tell("answer")

    thread = threading.Thread(target=interrupt)
    thread.start()
    ctypes.CDLL(None).memset(ctypes.c_void_p(window.address), 1, 1)
    thread.join()
    assert received == [signal.SIGUSR1]
    assert rig.region[0] == 1


@scenario
def a_waiting_process_is_terminated(rig: Rig) -> None:
    rig.coordinator.set(hold=True, report=True)
    window = rig.window(1)
    killer = os.posix_spawn(
        "/bin/sh", ["sh", "-c", f"read line && kill -TERM {os.getpid()}"], os.environ, file_actions=[
            (os.POSIX_SPAWN_DUP2, cast(Any, rig.coordinator.process.stdout).fileno(), 0)
        ]
    )  # fmt: skip
    assert killer
    say_now()
    window[0]


# --- fork -----------------------------------------------------------------------------------------------------------


def in_fork(function: Callable[[], None]) -> None:
    """Run it in a child that was forked, and fail if it fails there."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            function()
        except BaseException:
            faulthandler.dump_traceback()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, os.waitstatus_to_exitcode(status)


@scenario
@forks
def fork(rig: Rig) -> None:
    """In the child every access is a BusError, and the parent's session knows nothing of it."""
    window = rig.window(4)
    window[0] = 1
    array = array_of(window)
    faults = rig.pager.counters()["faults"]

    def child() -> None:
        assert failure_of(lambda: window[0]).errno == errno.ESTALE
        assert failure_of(lambda: array[PAGE]).errno == errno.ESTALE
        assert failure_of(array.sum).errno == errno.ESTALE
        memset = ctypes.CDLL(None).memset
        assert failure_of(lambda: memset(ctypes.c_void_p(window.address), 1, 1)).errno == errno.ESTALE
        assert rig.pager.errno == errno.ESTALE
        rig.pager.close()

    in_fork(child)
    assert window[0] == 1
    window[PAGE] = 2
    assert rig.pager.counters()["faults"] == faults + 1


@scenario
@forks
def fork_while_others_fault(rig: Rig) -> None:
    window = rig.window(256)
    ended = threading.Event()

    def fault() -> None:
        while not ended.is_set():
            for page in range(256):
                window[page * PAGE] = 1
            rig.coordinator.tell("unmap", 1, [VMA, 0, 256])
            rig.coordinator.event()

    thread = threading.Thread(target=fault)
    thread.start()
    for _ in range(20):
        in_fork(lambda: None if failure_of(lambda: window[0]).errno == errno.ESTALE else os._exit(2))
    ended.set()
    thread.join()


@scenario
@forks
def fork_without_pythons_knowledge(rig: Rig) -> None:
    """No translation goes into a child, not even one that no handler of fork() has run in."""
    window = rig.window(4)
    window[0] = 1
    pid = ctypes.CDLL(None).syscall(57) if os.uname().machine == "x86_64" else os.fork()
    if pid == 0:
        with open("/proc/self/maps", "rb", buffering=0) as maps:
            text = b""
            while chunk := maps.read(1 << 16):
                text += chunk
        os._exit(b"%x-" % window.address in text)
    _, status = os.waitpid(pid, 0)
    assert status == 0 or os.uname().machine != "x86_64"


# --- a coordinator that does not keep to the rules ------------------------------------------------------------------


def ends_with(rig: Rig, *frames: bytes) -> None:
    """After these frames the session is over: what was mapped is gone, and faults are EIO."""
    rig.pager = rig.new_pager()
    window = rig.window(2)
    window[0] = 1
    rig.coordinator.tell("send", *(frame.hex() for frame in frames))
    poll = select.poll()
    while rig.pager.errno == 0:
        poll.poll(1)
    rig.pager.close()
    assert rig.pager.errno == errno.EPROTO, frames
    assert failure_of(lambda: window[0]).errno == errno.EIO
    assert failure_of(lambda: array_of(window)[PAGE]).errno == errno.EIO


@scenario
def garbage(rig: Rig) -> None:
    rig.pager.close()
    for frame in (
        b"",
        b"\xc1",
        b"garbage",
        bytes(100_000),
        messages.encode(messages.PagerReady(messages.PROTOCOL_VERSION)),
        messages.encode(messages.Fault(1, 2, 3, 0)),
        messages.encode(messages.Map(1, VMA, [0, 1, 3, 0, 1])),
        messages.encode(messages.Map(1, VMA, [0, 1, 1, 0, 1])),
        messages.encode(messages.Map(1, VMA, [0, 1, 0, 1, 0])),
        messages.encode(messages.Map(1, VMA, [0, 1, 0, 0, 1])),  # frame 0 is the superblock
        messages.encode(messages.Map(1, VMA, [0, 1, 0, 1 << 62, 1])),
        messages.encode(messages.Map(1, VMA, [0, 1, 0, 0])),
        messages.encode(messages.Map(1, VMA, [0, 1, 0, 1, 1] * 65)),
        messages.encode(messages.FaultError(1, VMA, 0, 1, 0)),
        messages.encode(messages.Evict(0)),
        messages.encode(messages.Unmap(1, 0, [VMA, 0, 1])) + b"\0",
    ):
        ends_with(rig, frame)
    ends_with(rig, messages.encode(messages.Unmap(1, 0, [VMA, 0, 1])), b"second part")


@scenario
def what_is_not_known_is_no_error(rig: Rig) -> None:
    """Faults that are answered, and windows that are closed, in the meantime."""
    window = rig.window(1)
    for message in (
        messages.Map(999, 12345, [0, 1, 0, 1, 3]),
        messages.Map(999, VMA, []),
        messages.Map(999, VMA, [0, 0, 0, 1, 3]),
        messages.Map(999, VMA, [1000, 1 << 40, 2, 0, 1]),
        messages.FaultError(999, VMA, 0, 1, errno.EFAULT),
    ):
        rig.coordinator.tell("send", messages.encode(message).hex())
    rig.coordinator.set(hello=True)  # it has sent all that
    window[0] = 1
    assert rig.region[0] == 1
    assert rig.pager.errno == 0


def refusal(rig: Rig, **arguments: Any) -> OSError:
    with pytest.raises(OSError) as raised:
        rig.new_pager(**arguments)
    return raised.value


@scenario
def no_handshake(rig: Rig) -> None:
    rig.coordinator.set(hello=False)
    assert isinstance(refusal(rig, timeout_ms=50), TimeoutError)
    assert isinstance(refusal(rig, path="/nowhere/at/all"), FileNotFoundError)
    assert refusal(rig, path="/" + 108 * "n").errno == errno.ENAMETOOLONG
    assert refusal(rig, pmem_fd=9999).errno == errno.EBADF
    killer = threading.Timer(0.05, rig.coordinator.kill)
    killer.start()
    assert isinstance(refusal(rig), ConnectionResetError)
    killer.join()


@scenario
def the_interpreter_ends_first(rig: Rig) -> None:
    """Without any close: threads, windows and arrays are alive."""
    window = rig.window(4)
    window[0] = 1
    array = array_of(window)
    threading.Thread(target=lambda: [array[0] for _ in iter(int, 1)], daemon=True).start()
    cast(Any, signal).keep = (rig, window, array, BusError)
    rig.coordinator.close()
    raise SystemExit(0)
