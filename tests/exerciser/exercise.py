"""Runs sequences of operations in three processes, and finds the shortest part of one that fails."""

import mmap
import multiprocessing
import os
import random
import re
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Final

import dax_mp
from exerciser import worker
from exerciser.model import PAGES_MAX, Model
from exerciser.operations import OPERATIONS, WEIGHTS, Operation, Step
from exerciser.worker import View

PROCESSES: Final = 3
TIMEOUT_S: Final = 60
FORK_EVERY: Final = 97
"""After this many operations a process forks, and its child is asked as well."""
SHRINK_RUNS_MAX: Final = 400


class Difference(AssertionError):
    """Something is not as the model has it."""


class Exerciser:
    """Three workers at one coordinator."""

    def __init__(self, endpoint: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._session = dax_mp.connect(endpoint)
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=worker.main, args=(theirs, endpoint), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(TIMEOUT_S)
            if process.exitcode is None:
                process.kill()
                process.join()
        self._session.close()

    def _send(self, process: int, *command: Any) -> None:
        try:
            self._connections[process].send(command)
        except BrokenPipeError:
            raise self._ended(process) from None

    def _answer(self, process: int) -> Any:
        if not self._connections[process].poll(TIMEOUT_S):
            raise Difference(f"process {process} does not answer")
        try:
            done, result = self._connections[process].recv()
        except (EOFError, ConnectionResetError):
            raise self._ended(process) from None
        if not done:
            raise Difference(f"process {process}: {result}")
        return result

    def _ended(self, process: int) -> Difference:
        self._processes[process].join(TIMEOUT_S)
        return Difference(f"process {process} ended with {self._processes[process].exitcode}")

    def tell(self, process: int, *command: Any) -> Any:
        self._send(process, *command)
        return self._answer(process)

    @contextmanager
    def _files(self) -> Iterator[None]:
        """New empty files on both sides, open in all workers."""
        name = f"exercise-{secrets.token_hex(6)}"
        path = f"/dev/shm/dax-mp-{name}"
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        try:
            self._session.open(name, "x").close()
            for process in range(PROCESSES):
                self.tell(process, "open", name, path)
        finally:
            os.unlink(path)
        self._session.unlink(name)
        try:
            yield
        finally:
            for process in range(PROCESSES):
                with suppress(Difference):  # one that has ended has closed them too
                    self.tell(process, "close")

    def run(self, operations: list[Operation]) -> None:
        """Raises Difference, with the number of the operation after which it showed."""
        model = Model(mmap.PAGESIZE, PROCESSES)
        with self._files():
            for number, operation in enumerate(operations):
                try:
                    for command in OPERATIONS[operation.name](Step(model, operation)):
                        self.tell(operation.process, *command)
                    self._compare(model, operation.process if number % FORK_EVERY == FORK_EVERY - 1 else None)
                except Difference as difference:
                    raise Difference(f"after operation {number}, {operation}: {difference}") from None

    def _compare(self, model: Model, forks: int | None) -> None:
        for process in range(PROCESSES):
            self._send(process, "look")
        data = bytes(model.data)
        shown = data[: PAGES_MAX * model.page_size]
        shared = zlib.crc32(shown)
        for process in range(PROCESSES):
            private = zlib.crc32(model.private(process))
            expected = View(len(data), zlib.crc32(data), shared, private)
            seen = [(f"process {process}", self._answer(process))]
            if process == forks:
                seen.append((f"a child of process {process}", self.tell(process, "fork", process)))
            for who, (here, kernel, readonly) in seen:
                self._check(model, process, f"{who}, here", "here", here, expected)
                self._check(model, process, f"{who}, the kernel", "kernel", kernel, expected)
                if readonly != zlib.crc32(shown[model.page_size :]):
                    raise Difference(f"{who}: the read-only mapping differs")

    def _check(self, model: Model, process: int, who: str, which: str, seen: View, expected: View) -> None:
        if seen == expected:
            return
        if seen.size != expected.size:
            raise Difference(f"{who}: {seen.size} bytes, not {expected.size}")
        what = next(
            field for field in ("read", "shared", "private") if getattr(seen, field) != getattr(expected, field)
        )
        wanted = model.private(process) if what == "private" else bytes(model.data)
        length = len(wanted) if what == "read" else min(len(wanted), PAGES_MAX * model.page_size)
        found = self.tell(process, "fetch", which, what, length)
        at = next((i for i in range(length) if found[i] != wanted[i]), None)
        if at is None:
            raise Difference(f"{who}: {what} differed, and does no more")
        raise Difference(
            f"{who}: {what} differs at {at:#x} (page {at // model.page_size}): {found[at]:#x}, not {wanted[at]:#x}"
        )


def sequence(seed: int, length: int) -> list[Operation]:
    """Operations, at random but the same for the same seed."""
    rng = random.Random(seed)
    names = [name for name in OPERATIONS for _ in range(WEIGHTS.get(name, 1))]
    return [
        Operation(
            rng.choice(names), rng.randrange(PROCESSES), rng.getrandbits(32), rng.getrandbits(32), rng.getrandbits(32)
        )
        for _ in range(length)
    ]


def shortest_failing(endpoint: str, operations: list[Operation]) -> tuple[list[Operation], str]:
    """A part of a failing sequence that fails, and of which nothing can be left out; and how it fails (as ddmin)."""
    failing, text, runs = operations, "", 0

    def fails(part: list[Operation]) -> str:
        exerciser = Exerciser(endpoint)
        try:
            exerciser.run(part)
        except Difference as difference:
            return str(difference)
        finally:
            exerciser.close()
        return ""

    chunk = max(1, len(failing) // 2)
    while runs < SHRINK_RUNS_MAX:
        for start in range(0, len(failing), chunk):
            runs += 1
            part = failing[:start] + failing[start + chunk :]
            if part and (found := fails(part)):
                failing, text = part, found
                break
        else:
            if chunk == 1:
                break
            chunk = max(1, chunk // 2)
    return failing, text or fails(failing)


def exercise(endpoint: str, seed: int, length: int) -> None:
    """Run a sequence. Raises Difference with the shortest part that fails, as Python that runs it again."""
    operations = sequence(seed, length)
    exerciser = Exerciser(endpoint)
    try:
        exerciser.run(operations)
        return
    except Difference as difference:
        first = str(difference)
    finally:
        exerciser.close()
    after = re.search(r"after operation (\d+)", first)
    done = int(after[1]) + 1 if after else length
    shortest, text = shortest_failing(endpoint, operations[:done])
    lines = "\n".join(f"    {operation}," for operation in shortest)
    raise Difference(f"seed {seed}: {first}\nshortest: {text}\nExerciser(endpoint).run([\n{lines}\n])")
