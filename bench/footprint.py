"""The coordinator's resident memory, idle and after work; and how many faults it takes to read a file that is there."""

import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy

import dax_mp
from rows import Bound, Row, measured, seconds

MIB = 1 << 20
GIB = 1 << 30
CHUNK_BYTES = 1 << 20
COORDINATORS = 3
PROCESSES = 4
VMAS_PER_PROCESS = 5000

FAULTS_BOUND = Bound("<=", 1024)
RESIDENT_BOUND = Bound("<=", 64)
VMA_BOUND = Bound("<=", 1024)
GROWTH_BOUND = Bound("<=", 4)
"""Above what two processes that have done the same differ in; below one word a page."""


def run(large_bytes: int) -> Iterator[Row]:
    """large_bytes: of the file that is all there, 1 GiB."""
    size_text = f"{large_bytes / GIB:g} GiB"
    idle: list[float] = []
    small: list[Served] = []
    large: list[Served] = []
    for _ in range(COORDINATORS):
        for length_bytes, served in ((large_bytes // 16, small), (large_bytes, large)):
            with dax_mp.launch(size=large_bytes) as daemon, dax_mp.connect(daemon.endpoint) as session:
                idle.append(_resident_bytes(daemon) / MIB)
                served.append(_serve_file(daemon, session, length_bytes, large_bytes))
    assert all(one.extents == 1 for one in small + large), "a file is not in one extent"
    growth = [
        (after.resident_bytes - before.resident_bytes) / (large_bytes - large_bytes // 16) * session.page_size
        for before, after in zip(small, large, strict=True)
    ]
    faults_bound = Bound("<=", FAULTS_BOUND.limit * large_bytes / GIB)
    yield measured(f"faults to read a file of {size_text}", "faults", [one.faults for one in large], faults_bound)
    yield measured(f"  of {large_bytes // 16 // MIB} MiB", "faults", [one.faults for one in small])
    yield measured(f"time to read a file of {size_text}", "s", [one.elapsed_s for one in large])
    yield measured("coordinator resident, idle", "MiB", idle, RESIDENT_BOUND)
    resident = [one.resident_bytes / MIB for one in large]
    yield measured(f"  with a file of {size_text} mapped", "MiB", resident, RESIDENT_BOUND)
    yield measured("  growth with a file's size", "B/page", growth, GROWTH_BOUND)
    yield from _vmas()


class Served(NamedTuple):
    """What it took to read a file through a new mapping."""

    faults: int
    extents: int
    elapsed_s: float
    resident_bytes: int
    """Of the coordinator, at the end."""


def _serve_file(daemon: dax_mp.Daemon, session: dax_mp.Session, length_bytes: int, written_bytes: int) -> Served:
    """Write a file, over and over until `written_bytes` are written, and read all of it through a mapping.

    So the coordinator has served the same messages, however long the file is.
    """
    with session.open("data.bin", "w+") as file:
        chunk = bytes(CHUNK_BYTES)
        for offset in range(0, written_bytes, CHUNK_BYTES):
            file.seek(offset % length_bytes)
            file.write(chunk)
        with file.mmap(access=dax_mp.ACCESS_READ) as mapping:
            before = session.statfs().counters["faults"]
            elapsed_s = seconds(lambda: numpy.frombuffer(memoryview(mapping), numpy.uint64).sum())
            faults = session.statfs().counters["faults"] - before
            return Served(faults, len(file.extents()), elapsed_s, _resident_bytes(daemon))


def _resident_bytes(daemon: dax_mp.Daemon) -> int:
    for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS in /proc/PID/status")


def _vmas() -> Iterator[Row]:
    """The coordinator's growth with the VMAs that a few processes have."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        daemon = stack.enter_context(dax_mp.launch(size="16MiB"))
        session = stack.enter_context(dax_mp.connect(daemon.endpoint))
        with session.open("data.bin", "w+") as file:
            file.write(bytes(session.page_size))
        connections = []
        for _ in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=_map_many, args=(daemon.endpoint, theirs), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            connections.append(ours)
        # Each step is done by all before the next one: a first VMA each (whatever a session takes), all VMAs, a page
        # mapped in each VMA.
        resident = []
        for _ in range(3):
            for connection in connections:
                connection.send(True)
            for connection in connections:
                connection.recv()
            resident.append(_resident_bytes(daemon))
        vmas = session.statfs().vmas
        count = PROCESSES * VMAS_PER_PROCESS
        assert vmas == count + PROCESSES, f"{vmas} VMAs"
        yield measured("coordinator's growth by a VMA", "bytes", [(resident[1] - resident[0]) / count], VMA_BOUND)
        yield measured("  by one that has a page mapped", "bytes", [(resident[2] - resident[0]) / count], VMA_BOUND)


def _map_many(endpoint: str, commands: "Connection[Any, Any]") -> None:
    with dax_mp.connect(endpoint) as session, session.open("data.bin", "r") as file:
        commands.recv()
        mappings = [file.mmap(access=dax_mp.ACCESS_READ)]
        commands.send(True)
        commands.recv()
        mappings += [file.mmap(access=dax_mp.ACCESS_READ) for _ in range(VMAS_PER_PROCESS)]
        commands.send(True)
        commands.recv()
        for mapping in mappings:
            mapping[0]
        commands.send(True)
        commands.recv()
