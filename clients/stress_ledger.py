"""What is certain about every cell: the oracle of the stress program.

The workers share one piece of ordinary memory, the ledger. It has nothing to do with what is tested. They note in it
what they are about to do and what they have done; so a reader can tell, of a value it has just loaded, whether any
coherent memory could have given it.

*The operation under test never runs under a lock of the ledger.* A lock (one for each file) is held for the notes
alone. What is known of an operation is therefore only: it took effect some time between its two notes. Each rule below
holds wherever in that time that was.

For each cell the ledger has

    begun                the counter of the last store that was begun; counters only grow, and are never used again
    refused              the counter of the last store that the system refused (BusError, ENOSPC)
    low, low_at          the counter of the last store that was completed, and the generation at which it is certain
    dead                 values up to this counter have been destroyed
    destroys             a generation: how often a truncate or punch that destroys the cell was begun
    cuts, inside_at      how often a truncate that takes the cell out of the file was begun; the generation at which it
                         is certain that the cell lies within the file
    growths, outside_at  how often an operation that brings the cell into the file was begun; likewise, past its end

A fact is *certain* as long as its generation is the present one. It is noted with the generation of before the
operation that made it true, and only where nothing that undoes it was pending then. So if the generations are still
equal, nothing that could undo it has been begun from before it became true until now. Hence, for one load, with what
was noted before it ("before") and after it ("after"):

    1. The word is 0, or names its own file and cell.
    2. Its counter is at most `begun` (after), and is not `refused` (before): begun is noted before the store.
    3. Its counter is above `dead` (before). A truncate or punch notes as dead, at its end, what was stored with
       certainty before its beginning. That was within the file, so it was destroyed, and counters never come back.
    4. If `low` (before) is certain, and still is (after), then the counter is at least `low`. The store of `low` was
       complete before the load, and nothing that destroys the cell was begun before, between or during them.
    5. It is never less than what this reader saw in the cell before. One owner wrote both, the smaller one first, so
       whoever has seen the larger one, and sees the smaller one later, sees stale memory.
    6. There is a BusError, or a short read(2), only where it is not certain that the cell is inside (before, after);
       and no value only where it is not certain that it is outside. A mapping has whole pages, so for a load through it
       the page's first cell decides.

A store through a mapping makes `low` certain only where the cell was certainly inside: what is stored past the end, in
the last page, may vanish when the file grows. write(2) brings the cell inside itself.

The order of memory: a store under test and the notes around it are separated by lock and unlock, system calls that no
load or store passes. So a reader whose "before" has the note of a completed store loads after that store.

Death: a worker that is killed leaves its locks (record locks go with their process) and notes that are half written.
Notes are written so that any first part of them is true: `low` before `low_at`, a change as pending before its
generations, and those before it takes place. What was pending stays pending, and makes nothing certain, until `repair`.
"""

import fcntl
import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dax_mp.clients.stress_cells import WORD_BYTES, Change, Geometry, Value, cell_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Words = memoryview[int]

NEVER: Final = 0
"""No generation: a fact that is not certain. Generations start at 1."""

RECORD_WORDS: Final = 32
"""Of each worker's own record, whose meaning is `stress_worker`'s."""

_PENDING_WORDS: Final = 2 + len(Change._fields)
_CELL_FIELDS: Final = 10


class Violation(Exception):
    """Memory was not coherent. `evidence` has what is needed to look into it."""

    def __init__(self, evidence: dict[str, Any]) -> None:
        super().__init__(f"{evidence['where']}: expected {evidence['expected']}; saw {evidence['seen']}")
        self.evidence = evidence


class FileNotes:
    """The notes on one file: a word for each of its cells, and the pending change of each worker."""

    def __init__(self, words: "Words", pending: "Words", cells: int) -> None:
        columns = [words[cells * index : cells * (index + 1)] for index in range(_CELL_FIELDS)]
        self.begun, self.refused, self.low, self.low_at, self.dead = columns[:5]
        self.destroys, self.cuts, self.inside_at, self.growths, self.outside_at = columns[5:]
        self._pending = pending

    def pending(self, worker: int) -> Change | None:
        """What the worker has begun to do to this file and not ended."""
        words = self._pending[worker * _PENDING_WORDS : (worker + 1) * _PENDING_WORDS]
        return Change(*words[2:].tolist()) if words[0] else None

    def set_pending(self, worker: int, change: Change | None) -> None:
        words = self._pending[worker * _PENDING_WORDS : (worker + 1) * _PENDING_WORDS]
        if change is not None:
            for index, number in enumerate(change):
                words[2 + index] = number
        words[0] = change is not None

    def all_pending(self) -> list[Change]:
        workers = len(self._pending) // _PENDING_WORDS
        return [change for worker in range(workers) if (change := self.pending(worker))]

    def begin_change(self, change: Change) -> None:
        """From here on nothing that the change undoes is certain."""
        _count_up(self.destroys, change.destroy_first, change.destroy_end)
        _count_up(self.cuts, change.cut_first, len(self.cuts))
        _count_up(self.growths, 0, change.grow_end)


def _count_up(generations: "Words", first: int, end: int) -> None:
    for cell in range(first, end):
        generations[cell] += 1


class BegunStore(NamedTuple):
    """A store that is about to be made."""

    cell: int
    counter: int
    generation: int
    """At which it will be certain; NEVER where it cannot be."""


class BegunChange(NamedTuple):
    """A truncate, punch or write(2) that is about to be made, and what will be so when it is done."""

    change: Change
    gone: "dict[int, int]"
    """Counters that will be dead."""
    inside: "dict[int, int]"
    """Cells that will be within the file, with their generations of cuts."""
    outside: "dict[int, int]"


class Before(NamedTuple):
    """What was certain of a cell before a load."""

    file: int
    cell: int
    extent_cell: int
    """The cell that decides whether there is anything to load."""
    refused: int
    dead: int
    low: int
    low_at: int
    inside_at: int
    outside_at: int


class Ledger:
    """The notes on all files, in a memory file that every worker has open.

    Precondition of every method that takes `file` or `worker`: they are in the geometry. One thread a process.
    """

    def __init__(self, fd: int, geometry: Geometry) -> None:
        self.fd = fd
        self.geometry = geometry
        self._map = mmap.mmap(fd, 0)
        words = memoryview(self._map).cast("Q")
        file_words = _CELL_FIELDS * geometry.cells
        pending_words = _PENDING_WORDS * geometry.processes
        self.files: list[FileNotes] = []
        position = 0
        for _ in range(geometry.files):
            pending = words[position + file_words : position + file_words + pending_words]
            self.files.append(FileNotes(words[position : position + file_words], pending, geometry.cells))
            position += file_words + pending_words
        self.records = [
            words[position + RECORD_WORDS * worker : position + RECORD_WORDS * (worker + 1)]
            for worker in range(geometry.processes)
        ]

    @classmethod
    def create(cls, geometry: Geometry) -> "Ledger":
        """A new ledger, of files that are empty. It goes with the last process that has it."""
        file_words = _CELL_FIELDS * geometry.cells + _PENDING_WORDS * geometry.processes
        fd = os.memfd_create("stress-ledger")
        os.ftruncate(fd, WORD_BYTES * (geometry.files * file_words + geometry.processes * RECORD_WORDS))
        ledger = cls(fd, geometry)
        for notes in ledger.files:
            for generations in (notes.destroys, notes.cuts, notes.growths):
                _count_up(generations, 0, geometry.cells)
            _count_up(notes.outside_at, 0, geometry.cells)
        return ledger

    def close(self) -> None:
        """Let go of the memory file; what this process has mapped of it stays until the ledger goes."""
        os.close(self.fd)

    @contextmanager
    def locked(self, file: int, kind: int = fcntl.LOCK_EX) -> "Iterator[FileNotes]":
        """The notes on a file, to be changed (LOCK_EX) or read (LOCK_SH)."""
        fcntl.lockf(self.fd, kind, 1, file)
        try:
            yield self.files[file]
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, file)

    # --- stores ----------------------------------------------------------------------------------------------------

    def begin_store(self, file: int, cells: "Sequence[int]", by_write: bool) -> list[BegunStore]:
        """Take the next counter of each cell. by_write: by write(2), not through a mapping. The caller owns them."""
        with self.locked(file) as notes:
            pending = notes.all_pending()
            begun = []
            for cell in cells:
                counter = notes.begun[cell] + 1
                notes.begun[cell] = counter
                quiet = not any(change.destroy_first <= cell < change.destroy_end for change in pending)
                stays = by_write or notes.inside_at[cell] == notes.cuts[cell]
                begun.append(BegunStore(cell, counter, notes.destroys[cell] if quiet and stays else NEVER))
            return begun

    def end_store(self, file: int, stores: "Sequence[BegunStore]", stored: bool) -> None:
        """They are stored, or were refused."""
        with self.locked(file) as notes:
            for cell, counter, generation in stores:
                if stored:
                    notes.low[cell] = counter
                    notes.low_at[cell] = generation if generation == notes.destroys[cell] else NEVER
                else:
                    notes.refused[cell] = counter

    # --- truncate, punch, and the growth of a write ----------------------------------------------------------------

    def begin_change(self, worker: int, file: int, change: Change) -> BegunChange:
        with self.locked(file) as notes:
            others = notes.all_pending()
            certain_end = min([change.grow_end, *(other.cut_first for other in others)])
            certain_first = max([change.cut_first, *(other.grow_end for other in others)])
            begun = BegunChange(
                change,
                gone={
                    cell: notes.low[cell]
                    for cell in range(change.destroy_first, change.destroy_end)
                    if notes.low_at[cell] == notes.destroys[cell]
                },
                inside={cell: notes.cuts[cell] for cell in range(certain_end)},
                outside={cell: notes.growths[cell] for cell in range(certain_first, self.geometry.cells)},
            )
            notes.set_pending(worker, change)
            notes.begin_change(change)
            return begun

    def end_change(self, worker: int, file: int, begun: BegunChange, done: bool) -> None:
        """It is done, or was refused and has changed nothing."""
        with self.locked(file) as notes:
            if done:
                for cell, counter in begun.gone.items():
                    notes.dead[cell] = max(notes.dead[cell], counter)
                for cell, generation in begun.inside.items():
                    if generation == notes.cuts[cell]:
                        notes.inside_at[cell] = generation
                for cell, generation in begun.outside.items():
                    if generation == notes.growths[cell]:
                        notes.outside_at[cell] = generation
            notes.set_pending(worker, None)

    def repair(self, worker: int) -> None:
        """Close what a dead worker has left open. Precondition: nothing it has asked for is still to come."""
        for file in range(self.geometry.files):
            with self.locked(file) as notes:
                if change := notes.pending(worker):
                    notes.begin_change(change)
                    notes.set_pending(worker, None)

    # --- loads -----------------------------------------------------------------------------------------------------

    def facts(self, file: int, cell: int) -> dict[str, int]:
        """All that is noted of a cell, certain or not, for the evidence."""
        with self.locked(file, fcntl.LOCK_SH) as notes:
            return {name: column[cell] for name, column in vars(notes).items() if not name.startswith("_")}

    def before_load(self, file: int, cells: "Sequence[int]", by_read: bool) -> list[Before]:
        """What is certain now. by_read: what comes is read(2), not a load through a mapping."""
        with self.locked(file, fcntl.LOCK_SH) as notes:
            facts = []
            for cell in cells:
                extent_cell = cell if by_read else cell - cell % 2
                low_at, inside_at, outside_at = (
                    notes.low_at[cell],
                    notes.inside_at[extent_cell],
                    notes.outside_at[extent_cell],
                )
                facts.append(
                    Before(
                        file,
                        cell,
                        extent_cell,
                        notes.refused[cell],
                        notes.dead[cell],
                        notes.low[cell],
                        low_at if low_at == notes.destroys[cell] else NEVER,
                        inside_at if inside_at == notes.cuts[extent_cell] else NEVER,
                        outside_at if outside_at == notes.growths[extent_cell] else NEVER,
                    )
                )
            return facts


class Reader:
    """One process that loads cells, and what it has seen of them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._seen = [[0] * ledger.geometry.cells for _ in range(ledger.geometry.files)]

    def judge(self, before: Before, word: int | None) -> None:
        """Raises Violation unless a coherent memory could have given this word; None is a BusError or a short read."""
        self.judge_extent(before, word is not None)
        if word is None:
            return
        with self._ledger.locked(before.file, fcntl.LOCK_SH) as notes:
            begun = notes.begun[before.cell]
            low_certain = before.low_at != NEVER and before.low_at == notes.destroys[before.cell]
        counter = self._counter(before, word, begun)
        if low_certain and counter < before.low:
            raise self._violation(before, word, f"counter {before.low} or more, which was stored and not destroyed")
        if counter and counter <= before.dead:
            raise self._violation(before, word, f"a counter above {before.dead}, which was destroyed")
        seen = self._seen[before.file]
        if counter and counter < seen[before.cell]:
            raise self._violation(before, word, f"counter {seen[before.cell]} or more, which this reader has seen")
        seen[before.cell] = max(seen[before.cell], counter)

    def judge_extent(self, before: Before, present: bool) -> None:
        """Raises Violation unless there could have been (present), or not been, anything to load or to store to."""
        with self._ledger.locked(before.file, fcntl.LOCK_SH) as notes:
            inside = before.inside_at != NEVER and before.inside_at == notes.cuts[before.extent_cell]
            outside = before.outside_at != NEVER and before.outside_at == notes.growths[before.extent_cell]
        if inside and not present:
            raise self._violation(before, None, "a page: it is certainly within the file")
        if outside and present:
            raise self._violation(before, None, "nothing: it is certainly past the end of the file")

    def judge_body(self, before: Before, word: int | None) -> None:
        """Likewise for a word of the page between its cells, which may be older or newer than the cell at its start."""
        if word is not None:
            with self._ledger.locked(before.file, fcntl.LOCK_SH) as notes:
                begun = notes.begun[before.cell]
            self._counter(before, word, begun)

    def _counter(self, before: Before, word: int, begun: int) -> int:
        """The word's counter, 0 for none. Raises Violation where nobody can have stored it there."""
        if not word:
            return 0
        value = Value.unpack(word)
        if (value.file, value.cell) != (before.file, before.cell):
            raise self._violation(before, word, f"nothing but values of {cell_name(before.file, before.cell)}")
        if not 0 < value.counter <= begun:
            raise self._violation(before, word, f"at most counter {begun}, the last one that was begun")
        if value.counter == before.refused:
            raise self._violation(before, word, f"not counter {before.refused}, whose store was refused")
        return value.counter

    def _violation(self, before: Before, word: int | None, expected: str) -> Violation:
        if word is None:
            seen = "an access that succeeded" if expected.startswith("nothing") else "a BusError or a short read"
        else:
            seen = f"{word:#x}: {Value.unpack(word)}" if word else "0: nothing was ever stored"
        return Violation(
            {
                "where": cell_name(before.file, before.cell),
                "file": before.file,
                "page": before.cell // 2,
                "expected": expected,
                "seen": seen,
                "ledger_before": before._asdict(),
                "ledger_after": self._ledger.facts(before.file, before.cell),
                "reader_had_seen": self._seen[before.file][before.cell],
            }
        )
