"""read and write of files: long ones beside those of a file in /dev/shm, short ones beside a pyzmq ping-pong.

All write over what is there, and read what is there, again and again: the memory is warm on both sides.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median

import dax_mp
from ping_pong import ping_pong
from rows import Bound, Row, compared, in_turn, seconds

LONG_BYTES = 16 << 20
SHORT_BYTES = 4096
PAIRS = 41
BLOCKS = 31
PER_BLOCK = 150
LONG_BOUND = Bound(">=", 0.8)
SHORT_BOUND = Bound("<=", 1.5)


def run() -> Iterator[Row]:
    with ExitStack() as stack:
        daemon = stack.enter_context(dax_mp.launch(size=4 * LONG_BYTES))
        session = stack.enter_context(dax_mp.connect(daemon.endpoint))
        file = stack.enter_context(session.open("data.bin", "w+"))
        fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
        stack.callback(os.close, fd)
        yield from _long(file, fd)
        yield from _short(file)


def _long(file: dax_mp.DaxFile, fd: int) -> Iterator[Row]:
    data, buffer = os.urandom(LONG_BYTES), bytearray(LONG_BYTES)

    def write() -> None:
        file.seek(0)
        assert file.write(data) == LONG_BYTES

    def readinto() -> None:
        file.seek(0)
        assert file.readinto(buffer) == LONG_BYTES

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "write": (write, partial(os.pwrite, fd, data, 0)),
        "readinto": (readinto, partial(os.preadv, fd, [buffer], 0)),
    }
    for name, (here, reference) in pairs.items():
        here()
        reference()
        rates = in_turn(partial(_gigabytes_per_s, here), partial(_gigabytes_per_s, reference), PAIRS)
        yield compared(f"{name} of {LONG_BYTES >> 20} MiB", "GB/s", *rates, LONG_BOUND)


def _short(file: dax_mp.DaxFile) -> Iterator[Row]:
    data = os.urandom(SHORT_BYTES)

    def pwrite_us() -> float:
        started_ns = time.perf_counter_ns()
        file.pwrite(data, 0)
        return (time.perf_counter_ns() - started_ns) / 1000

    with ping_pong() as reference:
        pwrite_us()
        samples = in_turn(
            lambda: median(pwrite_us() for _ in range(PER_BLOCK)),
            lambda: median(reference.round_trip_us() for _ in range(PER_BLOCK)),
            BLOCKS,
        )
    yield compared(f"pwrite of 4 KiB (medians of {PER_BLOCK})", "us", *samples, SHORT_BOUND)


def _gigabytes_per_s(work: Callable[[], object]) -> float:
    return LONG_BYTES / seconds(work) / 1e9
