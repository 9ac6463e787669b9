"""The oracle of the stress program: it refuses what no coherent memory could have given, and nothing else."""

import os
import random
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from dax_mp.clients.stress_cells import WORD_BYTES, Geometry, Value
from dax_mp.clients.stress_ledger import Before, Ledger, Reader, Violation

PAGE = os.sysconf("SC_PAGESIZE")
PAGES = 12
WORKERS = 3
GEOMETRY = Geometry(PAGE, 2, PAGES, WORKERS)
FILE = 1


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger.create(GEOMETRY)
    yield ledger
    ledger.close()


@pytest.fixture
def reader(ledger: Ledger) -> Reader:
    return Reader(ledger)


def change_size(ledger: Ledger, size_bytes: int) -> None:
    ledger.end_change(0, FILE, ledger.begin_change(0, FILE, GEOMETRY.truncate(size_bytes)), True)


def store(ledger: Ledger, cell: int, by_write: bool = False) -> int:
    """Note a store from its beginning to its end. Returns the word that is stored."""
    (begun,) = ledger.begin_store(FILE, [cell], by_write)
    ledger.end_store(FILE, [begun], True)
    return word(cell, begun.counter)


def word(cell: int, counter: int, file: int = FILE) -> int:
    return Value(file, cell, counter).pack()


def before(ledger: Ledger, cell: int, by_read: bool = False) -> Before:
    (facts,) = ledger.before_load(FILE, [cell], by_read)
    return facts


# --- cells ------------------------------------------------------------------------------------------------------------


def test_a_value_is_read_back() -> None:
    value = Value(3, 2 * PAGES - 1, 12345)
    assert Value.unpack(value.pack()) == value
    assert value.pack() < 1 << 64


def test_every_cell_has_one_owner_and_every_process_cells() -> None:
    owned = [GEOMETRY.owned(process) for process in range(WORKERS)]
    assert sorted(cell for cells in owned for cell in cells) == list(range(GEOMETRY.cells))
    assert all(owned)


@pytest.mark.parametrize(
    ("size_bytes", "first_gone"),
    [(0, 0), (WORD_BYTES, 1), (PAGE - WORD_BYTES, 1), (PAGE, 2), (PAGES * PAGE, 2 * PAGES)],
)
def test_a_truncate_destroys_the_cells_past_the_end(size_bytes: int, first_gone: int) -> None:
    change = GEOMETRY.truncate(size_bytes)
    destroyed = range(change.destroy_first, change.destroy_end)
    assert list(destroyed) == [cell for cell in range(GEOMETRY.cells) if GEOMETRY.offset_bytes(cell) >= size_bytes]
    assert change.destroy_first == change.cut_first == change.grow_end == first_gone


# --- what the oracle refuses ------------------------------------------------------------------------------------------


def test_what_was_stored_last_is_accepted(ledger: Ledger, reader: Reader) -> None:
    change_size(ledger, PAGES * PAGE)
    stored = store(ledger, 5)
    reader.judge(before(ledger, 5), stored)


def test_a_stale_zero_page_is_refused(ledger: Ledger, reader: Reader) -> None:
    change_size(ledger, PAGES * PAGE)
    store(ledger, 5)
    with pytest.raises(Violation, match=r"page 2, end: expected counter 1 or more.*; saw 0"):
        reader.judge(before(ledger, 5), 0)


def test_a_stale_value_is_refused(ledger: Ledger, reader: Reader) -> None:
    change_size(ledger, PAGES * PAGE)
    stale = store(ledger, 5)
    store(ledger, 5)
    with pytest.raises(Violation, match="expected counter 2 or more, which was stored and not destroyed"):
        reader.judge(before(ledger, 5), stale)


@pytest.mark.parametrize(
    "foreign", [word(7, 1), word(5, 1, file=0), word(5, 1, file=9), 0xDEADBEEF, (1 << 64) - 1], ids=hex
)
def test_a_foreign_value_is_refused(ledger: Ledger, reader: Reader, foreign: int) -> None:
    change_size(ledger, PAGES * PAGE)
    store(ledger, 5)
    with pytest.raises(Violation, match="expected nothing but values of file 1, page 2, end"):
        reader.judge(before(ledger, 5), foreign)


def test_a_value_that_goes_back_is_refused(ledger: Ledger, reader: Reader) -> None:
    """Even where nothing else is certain: the file may have been cut meanwhile."""
    older, newer = store(ledger, 5), store(ledger, 5)
    facts = before(ledger, 5)._replace(outside_at=0)
    reader.judge(facts, older)
    reader.judge(facts, newer)
    with pytest.raises(Violation, match="expected counter 2 or more, which this reader has seen"):
        reader.judge(facts, older)


@pytest.mark.parametrize(
    "change", [GEOMETRY.truncate(PAGE), GEOMETRY.punch_hole(0, 4 * PAGE)], ids=["truncate", "punch"]
)
def test_a_value_that_was_destroyed_is_refused(ledger: Ledger, reader: Reader, change: Any) -> None:
    change_size(ledger, PAGES * PAGE)
    stored = store(ledger, 5)
    ledger.end_change(0, FILE, ledger.begin_change(0, FILE, change), True)
    change_size(ledger, PAGES * PAGE)
    reader.judge(before(ledger, 5), 0)
    with pytest.raises(Violation, match="expected a counter above 1, which was destroyed"):
        reader.judge(before(ledger, 5), stored)


def test_a_value_that_nobody_has_stored_yet_is_refused(ledger: Ledger, reader: Reader) -> None:
    change_size(ledger, PAGES * PAGE)
    store(ledger, 5)
    with pytest.raises(Violation, match="expected at most counter 1, the last one that was begun"):
        reader.judge(before(ledger, 5), word(5, 2))


def test_a_value_whose_store_was_refused_is_refused(ledger: Ledger, reader: Reader) -> None:
    change_size(ledger, PAGES * PAGE)
    begun = ledger.begin_store(FILE, [4], by_write=False)
    ledger.end_store(FILE, begun, False)
    for judge in (reader.judge, reader.judge_body):
        with pytest.raises(Violation, match="expected not counter 1, whose store was refused"):
            judge(before(ledger, 4), word(4, 1))


def test_a_foreign_word_between_the_cells_is_refused(ledger: Ledger, reader: Reader) -> None:
    change_size(ledger, PAGES * PAGE)
    stored = store(ledger, 4)
    reader.judge_body(before(ledger, 4), stored)
    with pytest.raises(Violation, match="nothing but values of file 1, page 2"):
        reader.judge_body(before(ledger, 4), word(6, 1))


@pytest.mark.parametrize("by_read", [False, True])
def test_a_bus_error_within_the_file_is_refused(ledger: Ledger, reader: Reader, by_read: bool) -> None:
    change_size(ledger, 3 * PAGE)
    reader.judge(before(ledger, 6, by_read), None)
    with pytest.raises(Violation, match="expected a page: it is certainly within the file; saw a BusError or a short"):
        reader.judge(before(ledger, 5, by_read), None)


@pytest.mark.parametrize("by_read", [False, True])
def test_a_load_past_the_end_is_refused(ledger: Ledger, reader: Reader, by_read: bool) -> None:
    change_size(ledger, 3 * PAGE)
    reader.judge(before(ledger, 5, by_read), 0)
    with pytest.raises(Violation, match="expected nothing: it is certainly past the end of the file"):
        reader.judge(before(ledger, 6, by_read), 0)


def test_the_last_page_is_mapped_whole_but_read_to_the_end_only(ledger: Ledger, reader: Reader) -> None:
    change_size(ledger, 2 * PAGE + WORD_BYTES)
    reader.judge(before(ledger, 5), 0)
    reader.judge(before(ledger, 5, by_read=True), None)
    with pytest.raises(Violation):
        reader.judge(before(ledger, 5), None)
    with pytest.raises(Violation):
        reader.judge(before(ledger, 5, by_read=True), 0)


def test_what_a_dead_worker_left_open_makes_nothing_certain_until_it_is_repaired(
    ledger: Ledger, reader: Reader
) -> None:
    change_size(ledger, PAGES * PAGE)
    older = store(ledger, 5)
    ledger.begin_change(1, FILE, GEOMETRY.truncate(PAGE))
    newer = store(ledger, 5)
    for seen in (None, 0, older, newer):
        Reader(ledger).judge(before(ledger, 5), seen)
    ledger.repair(1)
    reader.judge(before(ledger, 5), 0)
    change_size(ledger, PAGES * PAGE)
    newest = store(ledger, 5)
    reader.judge(before(ledger, 5), newest)
    with pytest.raises(Violation):
        reader.judge(before(ledger, 5), newer)


# --- what it does not refuse: a memory that is coherent, whatever is done to it at once -------------------------------


class CoherentFile:
    """A file that is as it should be; a subclass is not."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.words: dict[int, int] = {}

    def load(self, cell: int) -> int | None:
        return self.words.get(cell, 0) if cell // 2 * PAGE < self.size_bytes else None

    def read(self, cell: int) -> int | None:
        return self.words.get(cell, 0) if GEOMETRY.offset_bytes(cell) < self.size_bytes else None

    def store(self, cell: int, value: int) -> bool:
        if cell // 2 * PAGE >= self.size_bytes:
            return False
        self.words[cell] = value
        return True

    def write(self, cell: int, value: int) -> bool:
        end_bytes = GEOMETRY.offset_bytes(cell) + WORD_BYTES
        if end_bytes > self.size_bytes:
            self.truncate(end_bytes)
        self.words[cell] = value
        return True

    def truncate(self, size_bytes: int) -> None:
        """A store past the end, in the last page, is undone where the file grows over it; else it may stay."""
        cut = range(GEOMETRY.first_cell_from(min(size_bytes, self.size_bytes)), GEOMETRY.cells)
        for cell in cut:
            if size_bytes < self.size_bytes or GEOMETRY.offset_bytes(cell) < size_bytes:
                self.words.pop(cell, None)
        self.size_bytes = size_bytes

    def punch_hole(self, offset_bytes: int, end_bytes: int) -> None:
        for cell in range(GEOMETRY.first_cell_from(offset_bytes), GEOMETRY.first_cell_from(end_bytes)):
            self.words.pop(cell, None)


class LosesStores(CoherentFile):
    def store(self, cell: int, value: int) -> bool:
        return super().store(cell, value if value % 7 else self.words.get(cell, 0))


class KeepsWhatIsCut(CoherentFile):
    def truncate(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


class KeepsWhatIsPunched(CoherentFile):
    def punch_hole(self, offset_bytes: int, end_bytes: int) -> None:
        super().punch_hole(offset_bytes, end_bytes - 2 * PAGE)


class HasStalePages(CoherentFile):
    """A page that was loaded once is seen as it was then."""

    def __init__(self) -> None:
        super().__init__()
        self._stale: dict[int, int | None] = {}

    def load(self, cell: int) -> int | None:
        return self._stale.setdefault(cell, super().load(cell)) if cell % 5 == 0 else super().load(cell)


class MixesPages(CoherentFile):
    def load(self, cell: int) -> int | None:
        return super().load(cell ^ 2 if cell == 3 else cell)


class StoresInSpiteOfRefusal(CoherentFile):
    def store(self, cell: int, value: int) -> bool:
        return super().store(cell, value) and value % 11 != 0


class EndsEarly(CoherentFile):
    def load(self, cell: int) -> int | None:
        return super().load(cell) if (cell // 2 + 1) * PAGE < self.size_bytes else None


class EndsLate(CoherentFile):
    def load(self, cell: int) -> int | None:
        return super().load(max(cell - 2, 0))


Steps = Generator[None, None, None]


class Simulation:
    """Workers in one process, each somewhere in an operation; which one goes a step further is chosen at random.

    The notes before and after an operation, and its effect, are steps of their own. So the effect comes at any time
    between the two notes, and whatever others do comes in between.
    """

    def __init__(self, ledger: Ledger, file: CoherentFile, seed: int) -> None:
        self._ledger = ledger
        self._file = file
        self._random = random.Random(seed)
        self._readers = [Reader(ledger) for _ in range(WORKERS)]
        self._at: list[Steps] = [self._operation(worker) for worker in range(WORKERS)]
        self.operations = 0

    def run(self, steps: int) -> None:
        """Raises Violation."""
        for _ in range(steps):
            worker = self._random.randrange(WORKERS)
            if self._random.random() < 0.003:
                self._kill(worker)
            elif next(self._at[worker], False) is False:
                self.operations += 1
                self._at[worker] = self._operation(worker)

    def _kill(self, worker: int) -> None:
        """What it has begun is over when it is repaired: done, or not."""
        if self._random.random() < 0.5:
            next(self._at[worker], None)
        self._at[worker].close()
        self._ledger.repair(worker)
        self._readers[worker] = Reader(self._ledger)
        self._at[worker] = self._operation(worker)

    def _operation(self, worker: int) -> Steps:
        operations: list[Callable[[int], Steps]] = [self._load, self._load, self._store, self._store, self._write]
        operations += [self._truncate, self._punch]
        return self._random.choice(operations)(worker)

    def _load(self, worker: int) -> Steps:
        cell, by_read = self._random.randrange(GEOMETRY.cells), self._random.random() < 0.3
        facts = before(self._ledger, cell, by_read)
        yield
        seen = self._file.read(cell) if by_read else self._file.load(cell)
        yield
        self._readers[worker].judge(facts, seen)

    def _store(self, worker: int) -> Steps:
        cell = self._random.choice(GEOMETRY.owned(worker))
        facts = before(self._ledger, cell)
        (begun,) = self._ledger.begin_store(FILE, [cell], by_write=False)
        yield
        stored = self._file.store(cell, word(cell, begun.counter))
        yield
        self._ledger.end_store(FILE, [begun], stored)
        self._readers[worker].judge_extent(facts, stored)

    def _write(self, worker: int) -> Steps:
        cell = self._random.choice(GEOMETRY.owned(worker))
        growth = self._ledger.begin_change(worker, FILE, GEOMETRY.write(GEOMETRY.offset_bytes(cell) + WORD_BYTES))
        (begun,) = self._ledger.begin_store(FILE, [cell], by_write=True)
        yield
        done = self._random.random() < 0.9 and self._file.write(cell, word(cell, begun.counter))  # else ENOSPC
        yield
        self._ledger.end_store(FILE, [begun], done)
        self._ledger.end_change(worker, FILE, growth, done)

    def _truncate(self, worker: int) -> Steps:
        size_bytes = self._random.randrange(PAGES + 1) * PAGE
        if size_bytes and self._random.random() < 0.5:
            size_bytes -= WORD_BYTES * self._random.randrange(PAGE // WORD_BYTES)
        begun = self._ledger.begin_change(worker, FILE, GEOMETRY.truncate(size_bytes))
        yield
        self._file.truncate(size_bytes)
        yield
        self._ledger.end_change(worker, FILE, begun, True)

    def _punch(self, worker: int) -> Steps:
        first, last = sorted(self._random.sample(range(PAGES + 1), 2))
        begun = self._ledger.begin_change(worker, FILE, GEOMETRY.punch_hole(first * PAGE, last * PAGE))
        yield
        self._file.punch_hole(first * PAGE, last * PAGE)
        yield
        self._ledger.end_change(worker, FILE, begun, True)


@pytest.mark.parametrize("seed", range(8))
def test_no_false_alarm(ledger: Ledger, seed: int) -> None:
    simulation = Simulation(ledger, CoherentFile(), seed)
    simulation.run(20_000)
    assert simulation.operations > 5_000


@pytest.mark.parametrize("broken", CoherentFile.__subclasses__())
def test_a_memory_that_is_not_coherent_is_found_out(ledger: Ledger, broken: type[CoherentFile]) -> None:
    with pytest.raises(Violation):
        Simulation(ledger, broken(), seed=1).run(20_000)
