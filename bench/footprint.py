"""The coordinator's resident memory, idle and after work; and how many faults it takes to read a file that is there."""

import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
from rows import Bound, Row, measured, seconds

import dax_mp

MIB = 1 << 20
GIB = 1 << 30
CHUNK_BYTES = 1 << 20
PROCESSES = 4
VMAS_PER_PROCESS = 5000

FAULTS_BOUND = Bound("<=", 1024)
RESIDENT_BOUND = Bound("<=", 64)
VMA_BOUND = Bound("<=", 1024)
GROWTH_BOUND = Bound("<=", 1)


def run(large_bytes: int) -> Iterator[Row]:
    """large_bytes: of the file that is all there, 1 GiB."""
    small_bytes = large_bytes // 16
    with dax_mp.launch(size=large_bytes) as daemon, dax_mp.connect(daemon.endpoint) as session:
        yield measured("coordinator resident, idle", "MiB", _resident_bytes(daemon) / MIB, RESIDENT_BOUND)
        _serve_file(session, small_bytes)  # whatever it takes once, it has taken now
        small = _serve_file(session, small_bytes)
        resident_small_bytes = _resident_bytes(daemon)
        large = _serve_file(session, large_bytes)
        resident_large_bytes = _resident_bytes(daemon)
        size_text = f"{large_bytes / GIB:g} GiB"
        bound = Bound("<=", FAULTS_BOUND.limit * large_bytes / GIB)
        yield measured(f"faults to read {size_text} that is there", "faults", large.faults, bound)
        yield measured(f"  the same, {small_bytes // MIB} MiB", "faults", small.faults)
        yield measured(f"  time for {size_text}", "s", large.seconds)
        assert large.extents == small.extents == 1, "the files are not in one extent"
        yield measured(f"coordinator resident, {size_text} served", "MiB", resident_large_bytes / MIB, RESIDENT_BOUND)
        pages = (large_bytes - small_bytes) / session.page_size
        growth = (resident_large_bytes - resident_small_bytes) / pages
        yield measured("  growth with a one-extent file's size", "bytes/page", growth, GROWTH_BOUND)
    yield from _vmas()


class Served:
    """What it took to read a file through a new mapping."""

    def __init__(self, faults: int, extents: int, elapsed_s: float) -> None:
        self.faults = faults
        self.extents = extents
        self.seconds = elapsed_s


def _serve_file(session: dax_mp.Session, size_bytes: int) -> Served:
    """Write a file, read all of it through a mapping, and remove it."""
    with session.open("data.bin", "w+") as file:
        chunk = bytes(CHUNK_BYTES)
        for _ in range(size_bytes // CHUNK_BYTES):
            file.write(chunk)
        with file.mmap(access=dax_mp.ACCESS_READ) as mapping:
            before = session.statfs().counters["faults"]
            elapsed_s = seconds(lambda: numpy.frombuffer(mapping, numpy.uint64).sum())
            faults = session.statfs().counters["faults"] - before
        extents = len(file.extents())
    session.unlink("data.bin")
    return Served(faults, extents, elapsed_s)


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
        yield measured(f"a VMA, of {count}", "bytes", (resident[1] - resident[0]) / count, VMA_BOUND)
        yield measured("a VMA that has a page mapped", "bytes", (resident[2] - resident[0]) / count, VMA_BOUND)


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
