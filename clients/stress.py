"""`dax-mp stress`: many processes use shared files at random, and every word that any of them sees is judged.

The workers (`stress_worker`) work and judge; this starts them, watches them and reports. With `kill`, it kills one with
SIGKILL now and then and starts another in its place. The new one must not come before what the dead one has asked for
is over: a write that is still on its way would go over one of its successor's. It is over when the coordinator has
dropped the dead session (its mappings are gone from the rmap), and after that a read of each file has come back: reads
wait behind writes and truncates, in the order in which they came.

Now and then it fills the device with a file of its own, the ballast, and empties that again: workers then find no space
(ENOSPC), and their blocks come from, and go to, a file whose words none of theirs may show.

At the end the files are read once more, by everyone's rules, and the device is counted: each of its pages is free, in
quarantine, or in exactly one file.
"""

import errno
import json
import os
import random
import secrets
import sys
import time
from contextlib import ExitStack
from multiprocessing.connection import wait
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from dax_mp.clients.child import Child, ChildError
from dax_mp.clients.launch import launch
from dax_mp.clients.session import Session, connect
from dax_mp.clients.status import DeviceStat
from dax_mp.clients.stress_cells import WORD_BYTES, Geometry, Value
from dax_mp.clients.stress_ledger import Ledger, Reader, Violation
from dax_mp.clients.stress_progress import Show, shown_progress
from dax_mp.clients.stress_worker import EXPECTED_ERRORS, OPERATIONS, RECORD_FIELDS, describe, longest
from dax_mp.sizes import format_size

FILES: Final = 4
FILE_PAGES: Final = 192
DEVICE_PAGES: Final = FILES * FILE_PAGES
BALLAST_PAGES_MAX: Final = 4 * DEVICE_PAGES
"""A device that has more free than this is not filled up."""
PAGE_CACHE_PAGES: Final = 64

START_TIMEOUT_S: Final = 60.0
GRACE_S: Final = 30.0
"""How long one operation may take, the noise of a busy machine included."""
KILL_INTERVAL_S: Final = (0.5, 2.0)
BALLAST_INTERVAL_S: Final = (0.2, 0.8)
BALLAST_WORD: Final = Value(FILES, 0, 1).pack()
"""A word of a file that is none of the workers'."""
_TICK_S: Final = 0.1
_COUNTERS: Final = ("faults", "unmaps", "evictions", "reclaims")


class Failure(Exception):
    """The run has failed; `evidence` says how, and `evidence["what"]` in a line."""

    def __init__(self, what: str, **evidence: Any) -> None:
        super().__init__(what)
        self.evidence: dict[str, Any] = {"what": what, **evidence}


class Stress:
    """One run against the coordinator of `endpoint`.

    grace_s: how long an operation may take before its worker counts as hung. kill: kill workers now and then. show:
    called about ten times a second.
    """

    def __init__(
        self,
        endpoint: str,
        processes: int,
        seconds: float,
        seed: int,
        kill: bool = True,
        grace_s: float = GRACE_S,
        show: Show = lambda elapsed_s, operations, killed: None,
    ) -> None:
        self._endpoint = endpoint
        self._seconds = seconds
        self._seed = seed
        self._kill = kill
        self._grace_s = grace_s
        self._show = show
        self._random = random.Random(seed)
        self._prefix = f"stress-{os.getpid()}-{secrets.token_hex(4)}-"
        page_size = os.sysconf("SC_PAGESIZE")
        self._geometry = Geometry(page_size, FILES, FILE_PAGES, processes)
        self._names = [f"{self._prefix}{file}" for file in range(FILES)]
        self._ballast_name = f"{self._prefix}ballast"
        self._ledger = Ledger.create(self._geometry)
        self._workers: dict[int, Child] = {}
        """Those that run, by number."""
        self._starting: set[int] = set()
        self._dead: dict[int, int] = {}
        """Workers that were killed and whose session may still be there: their pids."""
        self._incarnations = [0] * processes
        self._deadline_ns = 0
        self.killed = 0
        self.elapsed_s = 0.0

    def run(self) -> dict[str, Any]:
        """Returns what was done. Raises Failure."""
        with ExitStack() as stack:
            stack.callback(self._ledger.close)
            session = stack.enter_context(connect(self._endpoint))
            for name in [*self._names, self._ballast_name]:
                session.open(name, "x+").close()
                stack.callback(_unlink, session, name)
            stack.callback(self._end_workers)
            before = session.statfs()
            for number in range(self._geometry.processes):
                self._start(number)
            self._wait_until_ready()
            started_ns = time.monotonic_ns()
            self._deadline_ns = started_ns + round(self._seconds * 1e9)
            for child in self._workers.values():
                child.send(self._deadline_ns)
            self._watch(session)
            self.elapsed_s = (time.monotonic_ns() - started_ns) / 1e9
            after = session.statfs()
            self._judge_the_end(session)
            if after.sessions == 1:
                self._count_the_device(session)
            return self._summary(before, after)

    # --- workers ---------------------------------------------------------------------------------------------------

    def _start(self, number: int) -> None:
        self._incarnations[number] += 1
        seed = f"{self._seed}/{number}/{self._incarnations[number]}"
        fd = self._ledger.fd
        arguments = [str(fd), self._endpoint, str(number), seed, self._prefix, *map(str, self._geometry)]
        self._workers[number] = Child(f"worker {number}", "dax_mp.clients.stress_worker", arguments, [fd])
        self._starting.add(number)

    def _wait_until_ready(self) -> None:
        """All of them, so that they begin together."""
        for number, child in self._workers.items():
            try:
                self._hear(number, child.receive(START_TIMEOUT_S))
            except ChildError as error:
                raise Failure(str(error)) from None

    def _watch(self, session: Session) -> None:
        """Until every worker has said that it is done."""
        next_kill_s, next_ballast_s = self._soon(KILL_INTERVAL_S), self._soon(BALLAST_INTERVAL_S)
        while self._workers or self._dead:
            numbers = {child.connection: number for number, child in self._workers.items()}
            for connection in wait(list(numbers), _TICK_S):
                number = numbers[connection]  # type: ignore[index]  # only connections are waited for
                child = self._workers[number]
                try:
                    self._hear(number, child.receive(0))
                except ChildError as error:
                    raise Failure(f"{error}; it was at: {self._at(number)}") from None
            self._look_for_hung_workers()
            self._replace_the_dead(session)
            if self._kill and time.monotonic() >= next_kill_s and not self._time_is_up():
                self._kill_one()
                next_kill_s = self._soon(KILL_INTERVAL_S)
            if time.monotonic() >= next_ballast_s:
                self._shift_ballast(session)
                next_ballast_s = self._soon(BALLAST_INTERVAL_S)
            elapsed_s = self._seconds - (self._deadline_ns - time.monotonic_ns()) / 1e9
            self._show(elapsed_s, sum(self._totals()[name] for name in OPERATIONS), self.killed)

    def _totals(self) -> dict[str, int]:
        """What the workers count, of all of them."""
        return {
            name: sum(record[index] for record in self._ledger.records)
            for index, name in enumerate(RECORD_FIELDS)
            if name in OPERATIONS or name in EXPECTED_ERRORS
        }

    def _soon(self, interval_s: tuple[float, float]) -> float:
        return time.monotonic() + self._random.uniform(*interval_s)

    def _shift_ballast(self, session: Session) -> None:
        """Fill the device, or, where the ballast is in, throw it out."""
        with session.open(self._ballast_name, "r+") as file:
            if file.size:
                file.truncate(0)
                return
            free_pages = session.statfs().pages_free
            if free_pages > BALLAST_PAGES_MAX:
                return
            words = BALLAST_WORD.to_bytes(WORD_BYTES, sys.byteorder) * (self._geometry.page_size // WORD_BYTES)
            try:
                file.write(words * free_pages)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def _hear(self, number: int, message: tuple[Any, ...]) -> None:
        kind, *details = message
        if kind == "ready":
            self._starting.discard(number)
            if self._deadline_ns:
                self._workers[number].send(self._deadline_ns)
        elif kind == "done":
            self._workers.pop(number).close()
        elif kind == "violation":
            raise self._failure_of(number, details[0])
        else:
            raise Failure(f"worker {number} failed at: {self._at(number)}", traceback=details[0])

    def _hear_the_last(self, number: int, child: Child) -> None:
        try:
            self._hear(number, child.receive(0))
        except ChildError:
            pass  # it had not

    def _failure_of(self, number: int, evidence: dict[str, Any]) -> Failure:
        return Failure(str(Violation(evidence)), worker=number, operation=self._at(number), **evidence)

    def _at(self, number: int) -> str:
        return describe(self._ledger.records[number])

    def _time_is_up(self) -> bool:
        return time.monotonic_ns() >= self._deadline_ns

    def _look_for_hung_workers(self) -> None:
        now_ns, grace_ns = time.monotonic_ns(), round(self._grace_s * 1e9)
        for number, child in self._workers.items():
            operation, _, _, since_ns = self._ledger.records[number][:4]
            if operation and now_ns - since_ns > grace_ns:
                raise Failure(f"{child.name} (pid {child.pid}) hangs at: {self._at(number)}")
            if now_ns - self._deadline_ns > grace_ns + START_TIMEOUT_S * 1e9 * (number in self._starting):
                raise Failure(f"{child.name} (pid {child.pid}) does not end; it was at: {self._at(number)}")

    # --- SIGKILL ---------------------------------------------------------------------------------------------------

    def _kill_one(self) -> None:
        candidates = sorted(set(self._workers) - self._starting)
        if candidates:
            number = self._random.choice(candidates)
            child = self._workers[number]
            child.kill()
            self._dead[number] = child.pid
            self.killed += 1
            if child.connection.poll():  # it had something to say before it died
                self._hear_the_last(number, child)
            self._workers.pop(number, child).close()

    def _replace_the_dead(self, session: Session) -> None:
        for number, pid in list(self._dead.items()):
            if any(vma.pid == pid for vma in session.maps(self._names[0])):
                continue
            for name in self._names:
                with session.open(name, "r") as file:
                    file.read(1)
            # Whatever it had asked for is done, or never will be.
            self._ledger.repair(number)
            self._ledger.records[number][0] = 0
            del self._dead[number]
            if not self._time_is_up():
                self._start(number)

    def _end_workers(self) -> None:
        for child in self._workers.values():
            child.close()

    # --- the end ---------------------------------------------------------------------------------------------------

    def _judge_the_end(self, session: Session) -> None:
        """Nobody is at work any more: what is in the files now must be what was stored last."""
        reader = Reader(self._ledger)
        cells = range(self._geometry.cells)
        for number, name in enumerate(self._names):
            facts = self._ledger.before_load(number, cells, by_read=True)
            with session.open(name, "r") as file:
                data = file.read()
            for before in facts:
                at = self._geometry.offset_bytes(before.cell)
                word = data[at : at + WORD_BYTES]
                try:
                    reader.judge(before, int.from_bytes(word, sys.byteorder) if len(word) == WORD_BYTES else None)
                except Violation as violation:
                    raise Failure(f"at the end, {violation}", **violation.evidence) from None

    def _count_the_device(self, session: Session) -> None:
        """Precondition: no other session, which could have a file without a name, is there."""
        frames: set[int] = set()
        pages = 0
        for stat in session.scandir():
            with session.open(stat.name or "", "r") as file:
                for extent in file.extents():
                    length_pages = extent.length_bytes // self._geometry.page_size
                    frames.update(range(extent.frame, extent.frame + length_pages))
                    pages += length_pages
        if len(frames) != pages:
            raise Failure(f"{pages - len(frames)} frames of the device are in two places")
        device = session.statfs()
        if pages + device.pages_free + device.pages_quarantined != device.pages:
            raise Failure(
                f"of {device.pages} pages {device.pages_free} are free, {device.pages_quarantined} in quarantine and "
                f"{pages} in files"
            )

    def _summary(self, before: DeviceStat, after: DeviceStat) -> dict[str, Any]:
        totals = self._totals()
        operations = sum(totals[name] for name in OPERATIONS)
        events = {name: after.counters[name] - before.counters[name] for name in _COUNTERS}
        longest_operation, longest_s = longest(self._ledger.records)
        return {
            "elapsed_s": round(self.elapsed_s, 3),
            "hole_policy": after.hole_policy,
            "operations": operations,
            "operations_of_each_kind": {name: totals[name] for name in OPERATIONS},
            "expected_errors": {name: totals[name] for name in EXPECTED_ERRORS},
            "events": events,
            "per_second": {
                name: round(count / self.elapsed_s, 1) for name, count in {"operations": operations, **events}.items()
            },
            "longest": {"operation": longest_operation, "seconds": round(longest_s, 3)},
            "killed": self.killed,
        }


def _unlink(session: Session, name: str) -> None:
    try:
        session.unlink(name)
    except ConnectionError:
        pass  # the coordinator has ended, and the file with it


def run_stress(
    processes: int,
    seconds: float,
    seed: int | None,
    hole_policy: str,
    json_output: bool,
    endpoint: str | None = None,
    kill: bool = True,
) -> int:
    """Run it, print what came of it, and return the exit code: 0, or 1 where a process saw what it must not see.

    seed: of every random choice; None takes a new one. endpoint: None starts a coordinator with that hole policy, and
    with a device that is too small for all. kill: kill a worker now and then, and start another.
    """
    seed = secrets.randbits(32) if seed is None else seed
    head = {"seed": seed, "processes": processes, "seconds": seconds, "kill": kill}
    console = Console(highlight=False)
    with ExitStack() as stack:
        if endpoint is None:
            page_size = os.sysconf("SC_PAGESIZE")
            page_cache_size = PAGE_CACHE_PAGES * page_size if hole_policy == "page-cache" else None
            endpoint = stack.enter_context(launch(DEVICE_PAGES * page_size, hole_policy, page_cache_size)).endpoint
        if not json_output:
            _print_head(console, head)
        try:
            with shown_progress(seconds) as show:
                run = Stress(endpoint, processes, seconds, seed, kill, show=show)
                result: dict[str, Any] = {"verdict": "coherent", **run.run()}
        except Failure as failure:
            result = {"verdict": "failed", **failure.evidence}
        except OSError as error:
            result = {"verdict": "failed", "what": str(error)}
    if json_output:
        print(json.dumps({**head, **result}, indent=2))
    else:
        _print_result(console, result)
    return 0 if result["verdict"] == "coherent" else 1


def _print_head(console: Console, head: dict[str, Any]) -> None:
    size = format_size(FILE_PAGES * os.sysconf("SC_PAGESIZE"))
    console.print(f"{head['processes']} processes, {FILES} files of up to {size}, seed {head['seed']}")


def _print_result(console: Console, result: dict[str, Any]) -> None:
    if result["verdict"] != "coherent":
        console.print("[bold red]failed[/]:", end=" ")
        console.print(result["what"], markup=False, soft_wrap=True)
        for name, value in result.items():
            if name not in ("verdict", "what"):
                console.print(f"  {name}: {value}", markup=False, soft_wrap=True)
        return
    table = Table("", "total", "per second", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    kinds = {f"  {name}": count for name, count in result["operations_of_each_kind"].items()}
    for name, count in {"operations": result["operations"], **kinds, **result["events"]}.items():
        table.add_row(name, f"{count:,}", f"{count / result['elapsed_s']:,.1f}")
    console.print(table)
    errors = result["expected_errors"]
    console.print(f"refused, rightly: {errors['past_eof']:,} past the end, {errors['no_space']:,} for want of space")
    console.print(f"longest: {result['longest']['operation']}, {result['longest']['seconds']:.3f} s")
    if result["killed"]:
        console.print(f"killed and replaced: {result['killed']}")
    console.print("[bold green]coherent[/]: nobody saw a stale, foreign or vanished byte")
