"""truncate to nothing of a file that other processes have mapped in full, beside ftruncate of one in /dev/shm.

Here the coordinator tells each process that maps it, and each drops its translations by one system call; in the kernel
the caller's ftruncate goes through the page tables of all. What the coordinator does for it grows with mappers and
extents, not with pages: its processor time is shown. The rest is the kernel's, which takes each page out of the page
tables of each process, here as there.
"""

import functools
import mmap
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import dax_mp
from rows import Row, compared, in_turn, measured, seconds

MAPPERS = 4
PAIRS = 9


def run(sizes_bytes: list[int]) -> Iterator[Row]:
    with ExitStack() as stack:
        daemon = stack.enter_context(dax_mp.launch(size=max(sizes_bytes) + (64 << 20)))
        session = stack.enter_context(dax_mp.connect(daemon.endpoint))
        mappers = [stack.enter_context(_mapper(daemon.endpoint)) for _ in range(MAPPERS)]
        for size_bytes in sizes_bytes:
            here = Here(session, daemon.pid, mappers, size_bytes)
            kernel = functools.partial(_kernel_ms, mappers, size_bytes)
            yield compared(
                f"{size_bytes >> 20} MiB, {MAPPERS} mappers", "ms", *in_turn(here.truncate_ms, kernel, PAIRS)
            )
            yield measured("  of it the coordinator's", "ms", here.coordinator_ms)


class Here:
    """The same, again and again. coordinator_ms: its processor time for each."""

    def __init__(self, session: dax_mp.Session, pid: int, mappers: list[Connection], size_bytes: int) -> None:
        self._session = session
        self._pid = pid
        self._mappers = mappers
        self._size_bytes = size_bytes
        self.coordinator_ms: list[float] = []

    def truncate_ms(self) -> float:
        with self._session.open("mapped.bin", "w+") as file:
            file.fallocate(0, self._size_bytes)
            _tell(self._mappers, ("here", "mapped.bin", self._size_bytes))
            before_ms = self._processor_time_ms()
            taken_s = seconds(lambda: file.truncate(0))
            self.coordinator_ms.append(self._processor_time_ms() - before_ms)
            _tell(self._mappers, None)
        return taken_s * 1000

    def _processor_time_ms(self) -> float:
        threads = Path(f"/proc/{self._pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e6


def _kernel_ms(mappers: list[Connection], size_bytes: int) -> float:
    path = f"/dev/shm/dax-mp-bench-{os.getpid()}"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        _tell(mappers, ("kernel", path, size_bytes))
        taken_s = seconds(lambda: os.ftruncate(fd, 0))
        _tell(mappers, None)
    finally:
        os.unlink(path)
        os.close(fd)
    return taken_s * 1000


def _tell(mappers: list[Connection], command: object) -> None:
    """All of them, at once; until all have done it."""
    for mapper in mappers:
        mapper.send(command)
    for mapper in mappers:
        assert mapper.recv() == "done"


@contextmanager
def _mapper(endpoint: str) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_map, args=(theirs, endpoint), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _map(connection: Connection, endpoint: str) -> None:
    """A process that maps what it is told and touches every page of it, and then closes it again."""
    with dax_mp.connect(endpoint) as session, connection:
        while True:
            try:
                which, name, size_bytes = connection.recv()
            except EOFError:
                return
            with _mapping(session, which, name, size_bytes) as mapping:
                for offset_bytes in range(0, size_bytes, mmap.PAGESIZE):
                    mapping[offset_bytes] = 1
                connection.send("done")
                assert connection.recv() is None
            connection.send("done")


def _mapping(session: dax_mp.Session, which: str, name: str, size_bytes: int) -> dax_mp.Mapping | mmap.mmap:
    if which == "here":
        with session.open(name, "r+") as file:
            return file.mmap()
    fd = os.open(name, os.O_RDWR)
    try:
        return mmap.mmap(fd, size_bytes)
    finally:
        os.close(fd)
