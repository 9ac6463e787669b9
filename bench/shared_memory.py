"""`SharedMemory` beside the standard library's: made in one process, attached and filled in another, and given up.

The other process is there before, with all that it needs imported. What is timed is what a program waits for: from the
call that makes the memory to the message that it is full; then, not timed, both sides close it and it is unlinked. Both
give memory that reads as zero, so both have all of it zeroed in that time.
"""

import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory as StandardSharedMemory
from typing import Any, Protocol

import numpy

import dax_mp
from rows import Bound, Row, compared, in_turn, seconds

PAIRS = 5
RATIO_BOUND = Bound(">=", 1)


class Shared(Protocol):
    """What both are."""

    @property
    def name(self) -> str: ...
    @property
    def buf(self) -> Any: ...
    def close(self) -> None: ...
    def unlink(self) -> None: ...


def run(size_bytes: int) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        daemon = stack.enter_context(dax_mp.launch(size=size_bytes + (64 << 20)))
        session = stack.enter_context(dax_mp.connect(daemon.endpoint))
        ours, theirs = context.Pipe()
        process = context.Process(target=_fill, args=(theirs, daemon.endpoint), daemon=True)
        process.start()
        stack.callback(process.join)
        stack.callback(ours.close)
        theirs.close()
        assert ours.recv() == "ready"

        def rate(which: str) -> float:
            memory: Shared | None = None

            def work() -> None:
                nonlocal memory
                memory = _create(session if which == "here" else None, size_bytes)
                ours.send((which, memory.name))
                assert ours.recv() == "full"

            taken_s = seconds(work)
            assert memory is not None and bytes(memory.buf[-1:]) == b"\7"
            ours.send("close")
            assert ours.recv() == "closed"
            memory.close()
            memory.unlink()
            return size_bytes / taken_s / 1e9

        rates = in_turn(lambda: rate("here"), lambda: rate("standard"), PAIRS)
    yield compared(f"create, attach, fill {size_bytes >> 20} MiB", "GB/s", *rates, RATIO_BOUND)


def _create(session: dax_mp.Session | None, size_bytes: int) -> Shared:
    if session is None:
        return StandardSharedMemory(create=True, size=size_bytes)
    return dax_mp.SharedMemory(create=True, size=size_bytes, session=session)


def _attach(session: dax_mp.Session | None, name: str) -> Shared:
    return StandardSharedMemory(name) if session is None else dax_mp.SharedMemory(name, session=session)


def _fill(connection: Connection, endpoint: str) -> None:
    """The other process: attach to what it is told of and fill it, until there is no more to come."""
    with dax_mp.connect(endpoint) as session, connection:
        connection.send("ready")
        while True:
            try:
                which, name = connection.recv()
            except EOFError:
                return
            memory = _attach(session if which == "here" else None, name)
            numpy.frombuffer(memory.buf, numpy.uint8).fill(7)
            connection.send("full")
            assert connection.recv() == "close"
            memory.close()
            connection.send("closed")
