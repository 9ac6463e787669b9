"""A whole allocating write fault, beside one message to another process and back.

The fault: a store to a page of a hole, from the instruction to the next one: signal handler, pager, coordinator, block
allocated and zeroed, mapped, instruction run again. The pages are single ones in random order, so that nothing is
mapped or allocated ahead. The message: `ping_pong.py`.
"""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median

import dax_mp
from ping_pong import ping_pong
from rows import Bound, Row, compared, in_turn

FILE_BYTES = 1 << 30
DEVICE_BYTES = 64 << 20
BLOCKS = 31
PER_BLOCK = 150
RATIO_BOUND = Bound("<=", 1.5)


def run() -> Iterator[Row]:
    with ExitStack() as stack:
        reference = stack.enter_context(ping_pong())
        daemon = stack.enter_context(dax_mp.launch(size=DEVICE_BYTES))
        session = stack.enter_context(dax_mp.connect(daemon.endpoint))
        file = stack.enter_context(session.open("sparse.bin", "w+"))
        file.truncate(FILE_BYTES)
        mapping = stack.enter_context(file.mmap())
        pages = _lone_pages(BLOCKS * PER_BLOCK + 1, session.page_size)
        _fault_us(mapping, next(pages))
        faults_before = session.counters()["faults"]
        samples = in_turn(
            lambda: median(_fault_us(mapping, next(pages)) for _ in range(PER_BLOCK)),
            lambda: median(reference.round_trip_us() for _ in range(PER_BLOCK)),
            BLOCKS,
        )
        faults = session.counters()["faults"] - faults_before
        assert faults == BLOCKS * PER_BLOCK, f"{faults} faults for {BLOCKS * PER_BLOCK} stores"
    yield compared(f"write to a hole (medians of {PER_BLOCK})", "us", *samples, RATIO_BOUND)


def _lone_pages(count: int, page_size: int) -> Iterator[int]:
    """Offsets of pages in random order, no two of them neighbours."""
    every_other = range(0, FILE_BYTES // page_size, 2)
    for page in random.Random(1).sample(every_other, count):
        yield page * page_size


def _fault_us(mapping: dax_mp.Mapping, offset_bytes: int) -> float:
    started_ns = time.perf_counter_ns()
    mapping[offset_bytes] = 1
    return (time.perf_counter_ns() - started_ns) / 1000
