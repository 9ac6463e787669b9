"""Faults that race: first stores to holes, threads that change a mapping together, long writes that are cut off.

What each test stores says where it belongs, so that a byte that is lost, or in the wrong place, is seen.
"""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest

import dax_mp
from script_process import Script, ScriptProcess

PAGE: Final = os.sysconf("SC_PAGESIZE")
MIB: Final = 1 << 20

# --- first stores to holes --------------------------------------------------------------------------------------------

PAGES: Final = 96
SIZE: Final = PAGES * PAGE
ROUNDS: Final = 3
PROCESSES: Final = 3
THREADS: Final = 3
WORKERS: Final = PROCESSES * THREADS


def zero_filled(file: dax_mp.DaxFile) -> None:
    file.pwrite(bytes(SIZE), 0)


def fallocated(file: dax_mp.DaxFile) -> None:
    file.truncate(0)
    file.fallocate(0, SIZE)


def sparse(file: dax_mp.DaxFile) -> None:
    file.truncate(0)
    file.truncate(SIZE)


def punched(file: dax_mp.DaxFile) -> None:
    file.pwrite(b"\xff" * SIZE, 0)
    file.punch_hole(0, SIZE)


HOLES: Final[dict[str, Callable[[dax_mp.DaxFile], None]]] = {
    "zero-filled": zero_filled,
    "fallocated": fallocated,
    "sparse": sparse,
    "punched": punched,
}

WRITER: Final = """
import ctypes, random, sys, threading
import numpy as np
import dax_mp

endpoint, process, threads, pages, page, workers, rounds = sys.argv[1], *map(int, sys.argv[2:])
memset = ctypes.CDLL(None).memset

def by_slice(offset, value):
    mapping[offset] = value

def by_array(offset, value):
    array[offset] = value

def without_the_gil(offset, value):
    memset(ctypes.c_void_p(address + offset), value, 1)

def store(worker, order, how, barrier):
    barrier.wait()
    for number in order:
        how(number * page + worker, worker + 1)

with dax_mp.connect(endpoint) as session, session.open("holes", "r+") as file, file.mmap() as mapping:
    array = np.frombuffer(mapping, dtype=np.uint8)
    address = array.ctypes.data
    print("ready", flush=True)
    for turn in range(rounds):
        input()
        barrier = threading.Barrier(threads)
        running = []
        for thread, how in enumerate([by_slice, by_array, without_the_gil]):
            worker = process * threads + thread
            order = list(range(pages))
            random.Random(worker * rounds + turn).shuffle(order)
            running.append(threading.Thread(target=store, args=(worker, order, how, barrier)))
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        print("stored", flush=True)
        input()
        expected = np.arange(1, workers + 1, dtype=np.uint8)
        table = array.reshape(pages, page)
        assert (table[:, :workers] == expected).all() and not table[:, workers:].any()
        del table
        print("seen", flush=True)
    del array
"""


class Watcher:
    """Reads the holes while they are filled: what it sees is nothing or what is stored there, and never goes back."""

    def __init__(self, read: Callable[[], npt.NDArray[np.uint8]]) -> None:
        self._read = read
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.mistakes: list[str] = []
        self.sights = 0
        self._thread.start()

    def _watch(self) -> None:
        before = np.zeros((PAGES, WORKERS), np.uint8)
        expected = np.arange(1, WORKERS + 1, dtype=np.uint8)
        while not self.mistakes:
            last = self._ended.is_set()
            table = self._read().reshape(PAGES, PAGE)
            seen = table[:, :WORKERS].copy()
            if ((seen != 0) & (seen != expected)).any() or table[:, WORKERS:].any():
                self.mistakes.append(f"bytes that nobody stored: {seen[(seen != 0) & (seen != expected)][:8]}")
            if (seen < before).any():
                self.mistakes.append(f"stores that were seen are gone: at {np.argwhere(seen < before)[:8].tolist()}")
            before = seen
            self.sights += 1
            if last:
                return

    def end(self) -> None:
        """It has looked once more since all was stored."""
        self._ended.set()
        self._thread.join()
        assert not self.mistakes, self.mistakes
        assert self.sights


@contextmanager
def watched(*reads: Callable[[], npt.NDArray[np.uint8]]) -> Iterator[None]:
    watchers = [Watcher(read) for read in reads]
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.end()


def contents_of(source: dax_mp.DaxFile | dax_mp.Mapping) -> npt.NDArray[np.uint8]:
    """By read(), or by loads."""
    data = source.pread(SIZE, 0) if isinstance(source, dax_mp.DaxFile) else source[:SIZE]
    return np.frombuffer(data, dtype=np.uint8)


def answers(processes: list[ScriptProcess], answer: str) -> None:
    for process in processes:
        assert process.line() == answer, process.end()


@pytest.mark.parametrize("policy", ["zero", "page-cache"])
@pytest.mark.parametrize("hole", HOLES)
def test_first_stores_to_holes(hole: str, policy: str, script: Script) -> None:
    """Threads of several processes fill the same pages, each with a byte of its own, while others read them."""
    with (
        dax_mp.launch("8MiB", hole_policy=policy, debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("holes", "x+") as file,
    ):
        file.truncate(SIZE)
        numbers = (THREADS, PAGES, PAGE, WORKERS, ROUNDS)
        processes = [script(WRITER, daemon.endpoint, *map(str, (process, *numbers))) for process in range(PROCESSES)]
        answers(processes, "ready")
        with file.mmap() as mapping:
            for _ in range(ROUNDS):
                HOLES[hole](file)
                assert mapping[:] == bytes(SIZE)
                with watched(lambda: contents_of(mapping), lambda: contents_of(file)):
                    for process in processes:
                        process.go_on()
                    answers(processes, "stored")
                check_stored(contents_of(mapping))
                check_stored(contents_of(file))
                with file.mmap() as fresh:
                    check_stored(contents_of(fresh))
                for process in processes:
                    process.go_on()
                answers(processes, "seen")
        for process in processes:
            code, _, errors = process.end()
            assert (code, errors) == (0, "")


def check_stored(contents: npt.NDArray[np.uint8]) -> None:
    table = contents.reshape(PAGES, PAGE)
    assert (table[:, :WORKERS] == np.arange(1, WORKERS + 1, dtype=np.uint8)).all(), "a store is lost"
    assert not table[:, WORKERS:].any()


# --- threads that change a mapping under each other -------------------------------------------------------------------

CHANGER: Final = """
import random, sys, threading
import numpy as np
import dax_mp

endpoint, page, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pages, turns = 64, 250
expected = (np.arange(pages * page) // 64 % 251 + 1).astype(np.uint8)  # what a store puts at each offset
failures = []

def settle():
    pass

def store(choose, file, mapping):
    offset = choose.randrange(len(mapping) or 1)
    end = min(offset + choose.choice([1, 100, 3 * page]), pages * page)
    mapping[offset : offset + (end - offset)] = expected[offset:end].tobytes()

def store_raw(choose, file, mapping):
    with memoryview(mapping) as view:
        offset = choose.randrange(len(view))
        view[offset] = int(expected[offset])

def check(data, offset):
    wrong = (data != 0) & (data != expected[offset : offset + len(data)])
    assert not wrong.any(), ("foreign bytes", offset, data[wrong][:8])

def load(choose, file, mapping):
    offset = choose.randrange(len(mapping) or 1)
    check(np.frombuffer(mapping[offset : offset + 2 * page], np.uint8), offset)

def load_array(choose, file, mapping):
    array = np.frombuffer(mapping, np.uint8)
    total = int(array.sum())

def resize(choose, file, mapping):
    mapping.resize(choose.randint(1, pages) * page)

def truncate(choose, file, mapping):
    file.truncate(choose.randrange(pages * page))

def close(choose, file, mapping):
    mapping.close()

def populate(choose, file, mapping):
    mapping.populate(0, len(mapping), choose.random() < 0.5)

def drop(choose, file, mapping):
    mapping.madvise(4, 0, len(mapping))

def punch(choose, file, mapping):
    file.punch_hole(choose.randrange(pages * page), choose.randint(1, 4 * page))

def pin(choose, file, mapping):
    with mapping.pin(0, min(page, len(mapping))) as view:
        check(np.frombuffer(bytes(view), np.uint8), 0)

def read(choose, file, mapping):
    offset = choose.randrange(pages * page)
    check(np.frombuffer(file.pread(5 * page, offset), np.uint8), offset)

actions = [store, store, store_raw, store_raw, load, load, load_array, resize, resize, truncate, close, populate, drop,
           punch, pin, read]

def act(number, file):
    choose = random.Random(seed * 100 + number)
    turn = 0
    while turn < turns and not failures:
        try:
            # An exception of an access without the GIL may come a moment later, so all of the turn is in the `try`.
            for turn in range(turn + 1, turns + 1):
                slot = choose.randrange(len(mappings))
                if mappings[slot].closed:
                    mappings[slot] = file.mmap(choose.randint(1, pages) * page, past_eof=True)
                choose.choice(actions)(choose, file, mappings[slot])
                settle()
        except (dax_mp.BusError, ValueError, BufferError, IndexError):
            continue
        except OSError as error:
            if error.errno not in (14, 16, 22):  # EFAULT, EBUSY (a pin), EINVAL (a range outside)
                failures.append(error)
        except BaseException as error:
            failures.append(error)

sys.setswitchinterval(1e-4)
with dax_mp.connect(endpoint) as session, session.open("changed", "x+") as file:
    file.truncate(pages * page)
    mappings = [file.mmap() for _ in range(3)]
    threads = [threading.Thread(target=act, args=(number, file)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    file.truncate(pages * page)
    contents = np.frombuffer(file.pread(pages * page, 0), np.uint8)
    check(contents, 0)
    with file.mmap() as mapping:
        assert mapping[:] == contents.tobytes()
    for mapping in mappings:
        mapping.close()
    session.unlink("changed")
print("done", flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_threads_fault_resize_close_and_truncate(daemon: dax_mp.Daemon, script: Script, seed: int) -> None:
    process = script(CHANGER, daemon.endpoint, str(PAGE), str(seed))
    line = process.line()
    code, _, errors = process.end()
    assert (code, line, errors) == (0, "done", ""), errors


# --- long writes and reads --------------------------------------------------------------------------------------------

LONG: Final = 3 * MIB

LONG_WRITER: Final = """
import sys
import dax_mp

endpoint, length = sys.argv[1], int(sys.argv[2])
with dax_mp.connect(endpoint) as session, session.open("long", "r+") as file:
    data = b"A" * length
    print("ready", flush=True)
    while True:
        file.pwrite(data, 0)
"""


def only(data: bytes | memoryview, letters: bytes) -> None:
    """Nothing but these bytes and zeroes."""
    foreign = set(np.unique(np.frombuffer(data, dtype=np.uint8)).tolist()) - {0, *letters}
    assert not foreign, foreign


def churn(file: dax_mp.DaxFile, letter: bytes) -> None:
    """Frees frames and takes some; what was in them before belongs to another file."""
    file.truncate(0)
    file.truncate(2 * LONG)
    only(file.pread(2 * LONG, 0), b"")
    file.pwrite(letter * LONG, LONG // 2)


def test_a_long_write_is_killed(script: Script) -> None:
    """The writer is killed anywhere in its write: what it leaves is old or new, and its frames are nobody else's."""
    choose = random.Random(4)
    with (
        dax_mp.launch(5 * LONG, debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("long", "x+") as file,
        session.open("other", "x+") as other,
    ):
        for turn in range(12):
            file.truncate(0)
            if turn % 2:
                file.pwrite(b"o" * LONG, 0)
            writer = script(LONG_WRITER, daemon.endpoint, str(LONG))
            assert writer.line() == "ready"
            for _ in range(choose.randrange(4)):
                churn(other, b"S")
                only(file.pread(LONG, 0), b"Ao")
            os.kill(writer.pid, signal.SIGKILL)
            assert writer.end()[0] == -signal.SIGKILL
            for _ in range(2):
                churn(other, b"S")
                only(other.pread(2 * LONG, 0), b"S")
                only(file.pread(LONG, 0), b"Ao")
            with file.mmap(LONG, past_eof=True) as mapping:
                only(mapping[: file.stat().size_bytes], b"Ao")


def test_long_writes_and_reads_against_truncate(script: Script) -> None:
    """Frames that a truncate frees under a long write or read are nobody else's until that has ended."""
    with (
        dax_mp.launch(6 * LONG, debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("long", "x+") as file,
        session.open("other", "x+") as other,
    ):
        file.truncate(2 * LONG)
        writers = [script(LONG_WRITER, daemon.endpoint, str(LONG)) for _ in range(2)]
        answers(writers, "ready")
        failures: list[BaseException] = []
        ended = threading.Event()

        def repeat(action: Callable[[], None]) -> None:
            try:
                while not ended.is_set() and not failures:
                    action()
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=repeat, args=[lambda: only(file.pread(2 * LONG, 0), b"A")]),
            threading.Thread(target=repeat, args=[lambda: only(other.pread(2 * LONG, 0), b"S")]),
        ]
        for thread in threads:
            thread.start()
        choose = random.Random(5)
        for _ in range(60):
            file.truncate(choose.randrange(2 * LONG))
            churn(other, b"S")
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.end()
        ended.set()
        for thread in threads:
            thread.join()
        assert not failures, failures
        only(file.pread(2 * LONG, 0), b"A")
        with file.mmap(LONG, past_eof=True) as mapping:
            only(mapping[: min(LONG, file.stat().size_bytes)], b"A")
