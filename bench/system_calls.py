"""System calls whose buffer lies in no mapping: in a process whose session interposes the libc's functions, and in one
with connect(system_calls=False), in turn. And one from a mapping beside one from ordinary memory, all mapped.

Each process has two mappings, and the buffers lie between them, where a comparison does not tell that they are in none.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import dax_mp
from rows import Bound, Row, compared, in_turn

PAIRS = 41
RATIO_BOUND = Bound("<=", 1.05)
CALLS = 20_000
KIB = 1024
WORKER = """
import mmap, os, sys, time
import dax_mp

session = dax_mp.connect(sys.argv[1], system_calls=sys.argv[2] == "True")
file = session.open("file-" + sys.argv[2], "w+")
file.truncate(1 << 20)
mappings = [file.mmap()]
memory = mmap.mmap(-1, 1 << 20)
mappings.append(file.mmap(populate=True))
for mapping in mappings:
    mapping[:] = bytes(1 << 20)
memory[:] = bytes(1 << 20)
null, zero, pipe = os.open("/dev/null", os.O_WRONLY), os.open("/dev/zero", os.O_RDONLY), os.memfd_create("bench")
for line in sys.stdin:
    what, length, place, calls = line.split()
    buffer = memoryview({"mapping": mappings[0], "memory": memory}[place])[: int(length)]
    call = {
        "write": lambda: os.write(null, buffer),
        "pwrite": lambda: os.pwrite(pipe, buffer, 0),
        "readv": lambda: os.preadv(pipe, [buffer], 0),
    }[what]
    batch, times_ns = range(int(calls) // 50), []
    for _ in range(50):
        started_ns = time.perf_counter_ns()
        for _ in batch:
            call()
        times_ns.append((time.perf_counter_ns() - started_ns) / len(batch))
    print(min(times_ns), flush=True)  # the machine's other work is not what is measured
"""


class Worker:
    """A process that makes system calls."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def ns(self, what: str, length: int, place: str, calls: int = CALLS) -> float:
        """What one call takes, in the best of 50 batches."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, length, place, calls, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


@contextmanager
def _worker(endpoint: str, system_calls: bool) -> Iterator[Worker]:
    command = [sys.executable, "-P", "-c", WORKER, endpoint, str(system_calls)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Worker(process)


def run() -> Iterator[Row]:
    with (
        dax_mp.launch(size="16MiB") as daemon,
        _worker(daemon.endpoint, True) as here,
        _worker(daemon.endpoint, False) as beside,
    ):
        for what, length in (("write", 1), ("pwrite", 1), ("readv", 4 * KIB)):
            samples = in_turn(
                lambda what=what, length=length: here.ns(what, length, "memory"),  # type: ignore[misc]
                lambda what=what, length=length: beside.ns(what, length, "memory"),  # type: ignore[misc]
                PAIRS,
            )
            yield compared(f"{what} of {length} B, no mapping's", "ns", *samples, RATIO_BOUND)
        for what, length in (("pwrite", 4 * KIB), ("pwrite", 1024 * KIB), ("readv", 4 * KIB), ("readv", 1024 * KIB)):
            calls = min(CALLS, CALLS * 100 * KIB // length)
            samples = in_turn(
                lambda what=what, length=length, calls=calls: here.ns(what, length, "mapping", calls),  # type: ignore[misc]
                lambda what=what, length=length, calls=calls: here.ns(what, length, "memory", calls),  # type: ignore[misc]
                PAIRS,
            )
            yield compared(f"{what} of {length // KIB} KiB, a mapping's", "ns", *samples)
