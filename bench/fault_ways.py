"""A fault that arrives through userfaultfd(2), beside one that arrives as a signal, in one process on one file.

The fault: a store to a page of a hole by a raw access, from the instruction to the next one. The pages are single ones
in random order, so that nothing is mapped or allocated ahead.
"""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import dax_mp
from rows import Row, compared, in_turn

FILE_BYTES = 1 << 30
DEVICE_BYTES = 64 << 20
BLOCKS = 21
PER_BLOCK = 100


def run() -> Iterator[Row]:
    with ExitStack() as stack:
        daemon = stack.enter_context(dax_mp.launch(size=DEVICE_BYTES))
        views = [stack.enter_context(_view(daemon, way)) for way in ("userfaultfd", "signals")]
        every_other = range(0, FILE_BYTES, 2 * 4096)
        pages = iter(random.Random(1).sample(every_other, 2 * BLOCKS * PER_BLOCK))
        samples = in_turn(
            lambda: median(_fault_us(views[0], next(pages)) for _ in range(PER_BLOCK)),
            lambda: median(_fault_us(views[1], next(pages)) for _ in range(PER_BLOCK)),
            BLOCKS,
        )
    yield compared(f"store to a hole (of {PER_BLOCK})", "us", *samples)


@contextmanager
def _view(daemon: dax_mp.Daemon, faults: str) -> Iterator[memoryview]:
    with (
        dax_mp.connect(daemon.endpoint, faults=faults) as session,
        session.open("sparse.bin", "a+") as file,
        file.mmap(FILE_BYTES, past_eof=True) as mapping,
        memoryview(mapping) as view,
    ):
        file.truncate(FILE_BYTES)
        yield view


def _fault_us(view: memoryview, offset_bytes: int) -> float:
    started_ns = time.perf_counter_ns()
    view[offset_bytes] = 1
    return (time.perf_counter_ns() - started_ns) / 1000
