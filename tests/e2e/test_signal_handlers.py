"""A program's own handlers of SIGSEGV and SIGBUS, and the page faults of its mappings."""

import signal

import pytest

import dax_mp
from script_process import Script

HEAD = """
import ctypes, faulthandler, os, signal, sys
from signal import signal as imported_by_name
import dax_mp

faulthandler.disable()
received = []

def handler(number, frame):
    received.append(number)

def load(address):
    return ctypes.c_ubyte.from_address(address).value

session = dax_mp.connect(sys.argv[1])
file = session.open("handlers", "w+")
file.truncate(1 << 24)
mapping = file.mmap()
page = iter(range(0, 1 << 24, 1 << 21))  # so far apart that each takes a fault

def works():
    offset = next(page)
    mapping[offset] = 3
    view = memoryview(mapping)
    view[offset + 4096] = 4
    assert file.pread(1, offset) + file.pread(1, offset + 4096) == bytes([3, 4])
"""


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS], ids=lambda number: number.name)
@pytest.mark.parametrize("function", ["signal.signal", "imported_by_name"])
def test_faults_are_served_whatever_handler_the_program_sets_with_signal_signal(
    daemon: dax_mp.Daemon, script: Script, number: signal.Signals, function: str
) -> None:
    """It is told what it has set before, and its handler gets the signals that are no page faults."""
    process = script(
        HEAD
        + f"""
number = signal.{number.name}
old = signal.getsignal(number)  # None where faulthandler was there first
for new in handler, signal.SIG_IGN, handler, signal.SIG_DFL:
    assert {function}(number, new) is old
    assert signal.getsignal(number) is new
    old = new
    works()
    if new is not signal.SIG_DFL:
        os.kill(os.getpid(), number)
        signal.pthread_kill(__import__("threading").get_ident(), number)
        works()
print(received == 4 * [number])
session.close()
""",
        daemon.endpoint,
    )
    assert process.end() == (0, "True\n", "")


def test_a_handler_that_was_set_before_the_session_stays_set(daemon: dax_mp.Daemon, script: Script) -> None:
    process = script(
        HEAD.replace("session =", "signal.signal(signal.SIGSEGV, handler)\nsession =")
        + """
works()
assert signal.getsignal(signal.SIGSEGV) is handler
os.kill(os.getpid(), signal.SIGSEGV)
works()
print(received)
session.close()
""",
        daemon.endpoint,
    )
    assert process.end() == (0, "[11]\n", "")


@pytest.mark.parametrize("restore", ["", "signal.signal(signal.SIGSEGV, signal.SIG_DFL)"])
def test_a_crash_is_a_crash_with_sig_dfl(daemon: dax_mp.Daemon, script: Script, restore: str) -> None:
    process = script(HEAD + f"{restore}\nworks()\nprint('now', flush=True)\nload(16)\n", daemon.endpoint)
    assert process.end() == (-signal.SIGSEGV, "now\n", "")


def test_wrong_arguments_of_signal_signal_are_refused_as_without_us(daemon: dax_mp.Daemon, script: Script) -> None:
    process = script(
        HEAD
        + """
import threading

def refused(*arguments):
    try:
        signal.signal(*arguments)
    except (TypeError, ValueError, OSError) as error:
        return type(error).__name__

print(refused(), refused(signal.SIGSEGV), refused(signal.SIGSEGV, 7), refused(1000, handler), refused([], handler))
thread = threading.Thread(target=lambda: print(refused(signal.SIGSEGV, handler)))
thread.start()
thread.join()
works()
session.close()
""",
        daemon.endpoint,
    )
    assert process.end() == (0, "TypeError TypeError TypeError ValueError TypeError\nValueError\n", "")


def test_a_handler_that_c_code_installs_is_behind_ours_from_the_next_mapping_on(
    daemon: dax_mp.Daemon, script: Script
) -> None:
    process = script(
        HEAD
        + """
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def in_c(number):
    received.append(number)

libc = ctypes.CDLL(None)
libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
libc.signal.restype = ctypes.c_void_p
libc.signal(signal.SIGSEGV, ctypes.cast(in_c, ctypes.c_void_p))
mapping.close()
mapping = file.mmap()
works()
os.kill(os.getpid(), signal.SIGSEGV)
works()
print(received)
session.close()
""",
        daemon.endpoint,
    )
    assert process.end() == (0, "[11]\n", "")
