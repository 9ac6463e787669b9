"""Loads and stores over a mapped file, and over a plain mmap of a file in /dev/shm, by numpy.

Warm: all is mapped and has been touched; the two are the same kind of memory, and should be as fast. Cold: a new
mapping each time, all faults included; there is no bound on it.
"""

import functools
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy
from numpy.typing import NDArray

import dax_mp
from rows import Bound, Row, compared, in_turn, seconds

PAIRS_WARM = 21
PAIRS_COLD = 7
RATIO_BOUND = Bound(">=", 0.98)

Words = NDArray[numpy.uint64]


def run(size_bytes: int) -> Iterator[Row]:
    with ExitStack() as stack:
        daemon = stack.enter_context(dax_mp.launch(size=size_bytes))
        session = stack.enter_context(dax_mp.connect(daemon.endpoint))
        file = stack.enter_context(session.open("data.bin", "w+"))
        file.truncate(size_bytes)
        fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
        stack.callback(os.close, fd)
        os.ftruncate(fd, size_bytes)
        yield from _warm(file, fd, size_bytes)
        yield from _cold(file, fd, size_bytes)


def _warm(file: dax_mp.DaxFile, fd: int, size_bytes: int) -> Iterator[Row]:
    here = numpy.frombuffer(memoryview(file.mmap()), numpy.uint64)
    reference = numpy.frombuffer(mmap.mmap(fd, size_bytes), numpy.uint64)
    private = numpy.ones(len(here), numpy.uint64)
    for words in (here, reference):
        words[:] = private
    works: dict[str, Callable[[Words], object]] = {
        "store: fill": lambda words: words.fill(7),
        "store: copy in": lambda words: numpy.copyto(words, private),
        "load: sum": lambda words: words.sum(),
        "load: copy out": lambda words: numpy.copyto(private, words),
    }
    for name, work in works.items():
        rates = in_turn(
            functools.partial(_gigabytes_per_s, size_bytes, functools.partial(work, here)),
            functools.partial(_gigabytes_per_s, size_bytes, functools.partial(work, reference)),
            PAIRS_WARM,
        )
        yield compared(f"{name}, all mapped", "GB/s", *rates, RATIO_BOUND)


def _cold(file: dax_mp.DaxFile, fd: int, size_bytes: int) -> Iterator[Row]:
    def here() -> float:
        with file.mmap() as mapping:
            return _gigabytes_per_s(size_bytes, lambda: numpy.frombuffer(memoryview(mapping), numpy.uint64).sum())

    def reference() -> float:
        with mmap.mmap(fd, size_bytes) as mapping:
            return _gigabytes_per_s(size_bytes, lambda: numpy.frombuffer(mapping, numpy.uint64).sum())

    yield compared("load: sum, newly mapped", "GB/s", *in_turn(here, reference, PAIRS_COLD))


def _gigabytes_per_s(size_bytes: int, work: Callable[[], object]) -> float:
    return size_bytes / seconds(work) / 1e9
