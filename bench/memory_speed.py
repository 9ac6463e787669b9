"""Loads and stores over a mapped file, and over a plain mmap of the same frames of the region in /dev/shm, by numpy.

Of the same frames, since other memory may be slower or faster by some percent, wherever the machine has it from. Warm:
all is mapped and has been touched; the two should be as fast. Cold: a new mapping each time, all faults included; there
is no bound on it.
"""

import functools
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

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
        file.fallocate(0, size_bytes)
        with file.mmap() as mapping:
            mapping[:] = bytes(size_bytes)
        fd = os.open(_region(session), os.O_RDWR)
        stack.callback(os.close, fd)
        (extent,) = file.extents()
        plain = functools.partial(mmap.mmap, fd, size_bytes, offset=extent.frame * session.page_size)
        yield from _warm(file, plain, size_bytes)
        yield from _cold(file, plain, size_bytes)


def _region(session: dax_mp.Session) -> Path:
    """The object in /dev/shm that has the PMem region."""
    for path in Path("/dev/shm").iterdir():
        status = path.stat()
        if session.regions.get((status.st_dev, status.st_ino)) == "pmem":
            return path
    raise AssertionError("the region is not in /dev/shm")


def _warm(file: dax_mp.DaxFile, plain: Callable[[], mmap.mmap], size_bytes: int) -> Iterator[Row]:
    here = numpy.frombuffer(memoryview(file.mmap()), numpy.uint64)
    reference = numpy.frombuffer(plain(), numpy.uint64)
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


def _cold(file: dax_mp.DaxFile, plain: Callable[[], mmap.mmap], size_bytes: int) -> Iterator[Row]:
    def here() -> float:
        with file.mmap() as mapping:
            return _gigabytes_per_s(size_bytes, lambda: numpy.frombuffer(memoryview(mapping), numpy.uint64).sum())

    def reference() -> float:
        with plain() as mapping:
            return _gigabytes_per_s(size_bytes, lambda: numpy.frombuffer(mapping, numpy.uint64).sum())

    yield compared("load: sum, newly mapped", "GB/s", *in_turn(here, reference, PAIRS_COLD))


def _gigabytes_per_s(size_bytes: int, work: Callable[[], object]) -> float:
    return size_bytes / seconds(work) / 1e9
