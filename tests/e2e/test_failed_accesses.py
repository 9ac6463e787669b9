"""An access that has nothing to map: which error, in which thread, through which kind of access; and SIGBUS instead."""

import errno
import json
import os
import signal
from collections.abc import Iterator
from typing import Any, Final

import pytest

import dax_mp
from coordinator_process import wait_until
from script_process import Script, ScriptProcess

PAGE: Final = os.sysconf("SC_PAGESIZE")

PREAMBLE: Final = """
import ctypes, errno, faulthandler, json, os, signal, sys, threading
import numpy as np
import dax_mp

endpoint, PAGE = sys.argv[1], int(sys.argv[2])
memset = ctypes.CDLL(None).memset

def settle():
    pass

class Access:
    # Every way to reach page `page` of a mapping. Each is (is it a store, a function).
    def __init__(self, mapping, page):
        self.offset = offset = page * PAGE
        self.view = view = memoryview(mapping)
        self.array = array = np.frombuffer(mapping, dtype=np.uint8)
        address = array.ctypes.data
        read_only = not mapping.writable
        self.ways = {
            "slice": (False, lambda: mapping[offset : offset + 5]),
            "index": (False, lambda: mapping[offset]),
            "long slice": (False, lambda: mapping[:]),
            "find": (False, lambda: mapping.find(b"nowhere")),
            "populate": (False, lambda: mapping.populate(offset, PAGE)),
            "memoryview": (False, lambda: view[offset]),
            "copy of a memoryview": (False, lambda: bytes(view[offset : offset + PAGE])),
            "array": (False, lambda: array[offset]),
            "array without the GIL": (False, lambda: array[offset:].astype(np.float64).sum()),
            "store to a slice": (True, lambda: mapping.__setitem__(slice(offset, offset + 3), b"xyz")),
            "store to an index": (True, lambda: mapping.__setitem__(offset, 1)),
            "move": (True, lambda: mapping.move(offset, 0, 10)),
            "populate for stores": (True, lambda: mapping.populate(offset, PAGE, True)),
            "store through a memoryview": (True, lambda: view.__setitem__(offset, 1)),
            "store to an array": (True, lambda: array.__setitem__(offset, 1)),
            "array in place": (True, lambda: np.add(array[offset:], 1, out=array[offset:])),
            "memset without the GIL": (True, lambda: memset(ctypes.c_void_p(address + offset), 1, 8)),
        }

def error_of(access):
    # A raw access raises when the interpreter looks for an exception: when a function begins, at the latest.
    try:
        access()
        settle()
    except dax_mp.BusError as error:
        return error.errno
    return None

def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0] if results else "it raised"
"""

ERRORS: Final = (
    PREAMBLE
    + """
stores_alone = sys.argv[3] == "stores"
with dax_mp.connect(endpoint) as session, session.open("file", "r+") as file:
    mapping = file.mmap(8 * PAGE, past_eof=True)
    access = Access(mapping, 4)
    mapping[0] = ord("m")
    print("ready", flush=True)
    input()
    results = {}
    if sys.argv[3] == "evicted":
        while error_of(lambda: mapping[4 * PAGE]) is None:  # until the pager has read that
            pass
    for name, (is_store, way) in access.ways.items():
        if is_store or not stores_alone:
            results[name] = [error_of(way), in_thread(lambda: error_of(way)), error_of(way)]
    print(json.dumps(results), flush=True)
    input()
    print(json.dumps(np.frombuffer(mapping[:], np.uint8)[:: PAGE].tolist()), flush=True)
"""
)


def start(script: Script, daemon: dax_mp.Daemon, *arguments: str, text: str = ERRORS) -> ScriptProcess:
    process = script(text, daemon.endpoint, str(PAGE), *arguments)
    assert process.line() == "ready", process.end()
    return process


def check(process: ScriptProcess, code: int) -> None:
    """Every access of the script has failed with this errno: in the main thread, in another, and again."""
    process.go_on()
    line = process.line()
    assert line, process.end()
    results: dict[str, list[Any]] = json.loads(line)
    assert len(results) >= 8
    assert {name: errors for name, errors in results.items() if errors != [code] * 3} == {}


def test_past_the_end(script: Script) -> None:
    with (
        dax_mp.launch("4MiB", debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("file", "x+") as file,
    ):
        file.truncate(4 * PAGE)
        process = start(script, daemon, "all")
        check(process, errno.EFAULT)
        file.truncate(8 * PAGE)
        process.go_on()
        assert json.loads(process.line()) == [ord("m")] + [0] * 7, "none of the stores has come in by the back door"
        assert process.end()[::2] == (0, "")
        assert file.pread(4 * PAGE, 4 * PAGE) == bytes(4 * PAGE)


def test_no_space(script: Script) -> None:
    with (
        dax_mp.launch(16 * PAGE, debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("file", "x+") as file,
        session.open("rest", "x+") as rest,
    ):
        file.truncate(8 * PAGE)
        process = start(script, daemon, "stores")
        for page in range(session.statfs().pages_free):
            rest.pwrite(b"x", page * PAGE)
        check(process, errno.ENOSPC)
        rest.truncate(0)
        process.go_on()
        assert json.loads(process.line()) == [ord("m")] + [0] * 7
        assert process.end()[::2] == (0, "")
        assert file.pread(8 * PAGE, PAGE) == bytes(7 * PAGE)


def test_evicted(script: Script) -> None:
    with (
        dax_mp.launch("4MiB", ack_timeout=0.2) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("file", "x+") as file,
    ):
        file.truncate(8 * PAGE)
        process = start(script, daemon, "evicted")
        process.stop()
        file.truncate(0)
        assert session.statfs().counters["evictions"] == 1
        file.truncate(8 * PAGE)
        process.resume()
        check(process, errno.ESTALE)
        assert file.pread(8 * PAGE, 0) == bytes(8 * PAGE)


def test_the_coordinator_is_gone(script: Script) -> None:
    with dax_mp.launch("4MiB") as daemon:
        with dax_mp.connect(daemon.endpoint) as session, session.open("file", "x+") as file:
            file.truncate(8 * PAGE)
        process = start(script, daemon, "all")
        os.kill(daemon.pid, signal.SIGKILL)
        check(process, errno.EIO)


PRIVATE: Final = (
    PREAMBLE
    + """
with dax_mp.connect(endpoint) as session, session.open("file", "r+") as file:
    mapping = file.mmap(8 * PAGE, access=dax_mp.clients.mapping.ACCESS_COPY, past_eof=True)
    mapping[PAGE] = ord("c")
    access = Access(mapping, 4)
    print("ready", flush=True)
    input()
    print(json.dumps({name: [error_of(way), in_thread(lambda: error_of(way)), error_of(way)]
                      for name, (_, way) in access.ways.items()}), flush=True)
    input()
    print(json.dumps(np.frombuffer(mapping[:], np.uint8)[:: PAGE].tolist()), flush=True)
"""
)


def test_past_the_end_of_a_private_mapping(script: Script) -> None:
    with (
        dax_mp.launch("4MiB", debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("file", "x+") as file,
    ):
        file.truncate(4 * PAGE)
        process = start(script, daemon, text=PRIVATE)
        check(process, errno.EFAULT)
        file.truncate(8 * PAGE)
        process.go_on()
        assert json.loads(process.line()) == [0, ord("c")] + [0] * 6
        assert process.end()[::2] == (0, "")


# --- SIGBUS -----------------------------------------------------------------------------------------------------------

SIGNAL: Final = (
    PREAMBLE
    + """
with dax_mp.connect(endpoint, bus_error="signal") as session, session.open("file", "r+") as file:
    mapping = file.mmap(4 << 20, past_eof=True)
    access = Access(mapping, 4)
    print("ready", flush=True)
    input()
    CASE
"""
)

WAYS: Final = (
    "index",
    "long slice",
    "find",
    "populate",
    "memoryview",
    "array without the GIL",
    "store to a slice",
    "move",
    "store to an array",
    "memset without the GIL",
)


def start_signal(script: Script, daemon: dax_mp.Daemon, case: str, *arguments: str) -> ScriptProcess:
    process = start(script, daemon, *arguments, text=SIGNAL.replace("CASE", case.replace("\n", "\n    ")))
    process.go_on()
    return process


@pytest.fixture
def file(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    with session.open("file", "x+") as file:
        file.truncate(PAGE)
        yield file
    session.unlink("file")


@pytest.mark.parametrize("way", WAYS)
def test_the_signal_ends_the_process(daemon: dax_mp.Daemon, file: dax_mp.DaxFile, script: Script, way: str) -> None:
    process = start_signal(
        script, daemon, "faulthandler.disable()\naccess.ways[sys.argv[3]][1]()\nprint('still here')", way
    )
    assert process.end() == (-signal.SIGBUS, "", "")
    wait_until(lambda: file.stat().mappers == [])


@pytest.mark.parametrize(
    "prepare",
    [
        "signal.signal(signal.SIGBUS, signal.SIG_IGN)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])",
        "signal.signal(signal.SIGBUS, signal.SIG_DFL)",
    ],
)
def test_the_signal_is_not_ignored_nor_blocked(
    daemon: dax_mp.Daemon, file: dax_mp.DaxFile, script: Script, prepare: str
) -> None:
    process = start_signal(script, daemon, f"faulthandler.disable()\n{prepare}\nmapping[4 * PAGE]\nprint('still here')")
    assert process.end() == (-signal.SIGBUS, "", "")


def test_faulthandler_reports_the_signal(daemon: dax_mp.Daemon, file: dax_mp.DaxFile, script: Script) -> None:
    process = start_signal(script, daemon, "faulthandler.enable()\nmapping[4 * PAGE]\nprint('still here')")
    code, output, errors = process.end()
    assert (code, output) == (-signal.SIGBUS, "")
    assert errors.startswith("Fatal Python error: Bus error\n")
    assert errors.count("Fatal Python error") == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_of_pythons(daemon: dax_mp.Daemon, file: dax_mp.DaxFile, script: Script, when: str) -> None:
    """As in Linux, the access is made again when the handler is done; and succeeds, if that has seen to it."""
    prepare = """
reader, writer = os.pipe()
os.set_blocking(writer, False)
got = []
signal.signal(signal.SIGBUS, lambda number, frame: got.append(number))
signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
"""
    text = SIGNAL.replace(
        "CASE",
        """
    if sys.argv[3] == "after":
        exec(PREPARE)
    results = []
    thread = threading.Thread(target=lambda: results.append(mapping[:]))
    thread.start()
    assert os.read(reader, 1) == bytes([signal.SIGBUS])
    file.truncate(4 << 20)
    thread.join()
    signal.set_wakeup_fd(-1)
    print(len(results[0]), set(got) == {signal.SIGBUS}, flush=True)
""",
    )
    setup = f"PREPARE = {prepare!r}\nif sys.argv[3] == 'before':\n    exec(PREPARE)\n"
    text = text.replace("with dax_mp.connect", setup + "with dax_mp.connect", 1)
    process = start(script, daemon, when, text=text)
    process.go_on()
    assert process.line() == f"{4 << 20} True", process.end()
    assert process.end() == (0, "", "")


def test_a_handler_sees_the_address(daemon: dax_mp.Daemon, file: dax_mp.DaxFile, script: Script) -> None:
    """Number, code and address as the kernel's: si_signo, si_code (BUS_ADRERR), si_addr."""
    process = start_signal(
        script,
        daemon,
        """
class SigInfo(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int), ("errno", ctypes.c_int), ("code", ctypes.c_int), ("addr", ctypes.c_void_p)]
class SigAction(ctypes.Structure):
    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int),
                ("restorer", ctypes.c_void_p)]
@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(SigInfo), ctypes.c_void_p)
def handler(number, info, context):
    print(number, info[0].number, info[0].code, info[0].addr - access.array.ctypes.data, flush=True)
    file.truncate(4 << 20)
action = SigAction(handler=ctypes.cast(handler, ctypes.c_void_p).value, flags=4)
libc = ctypes.CDLL(None)
assert libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), None) == 0
access.view[4 * PAGE + 17] = 9
print(mapping[4 * PAGE + 17], flush=True)
""",
    )
    assert process.line() == f"{int(signal.SIGBUS)} {int(signal.SIGBUS)} 2 {4 * PAGE + 17}"
    assert process.line() == "9"
    assert process.end() == (0, "", "")


def test_what_is_there_is_no_signal(daemon: dax_mp.Daemon, file: dax_mp.DaxFile, script: Script) -> None:
    process = start_signal(
        script,
        daemon,
        """
mapping[:3] = b"abc"
access.array[5] = 7
file.truncate(8 * PAGE)
print(mapping[:6], mapping[7 * PAGE], mapping.find(b"c", 0, PAGE), file.pread(3, 0), flush=True)
""",
    )
    assert process.line() == "b'abc\\x00\\x00\\x07' 0 2 b'abc'"
    assert process.end() == (0, "", "")
