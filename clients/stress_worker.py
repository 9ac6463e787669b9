"""One worker of the stress program: a process that does at random what programs do with shared files.

It judges every word that it loads (`stress_ledger`). Before each operation it writes down in its record what it is
about to do, so that its parent can say what a worker was at when it died or did not come back.

It says ("ready",), is told the time of its end on the monotonic clock, works until then, and says ("done",),
("violation", evidence) or ("failed", text).
"""

import errno
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from dax_mp.clients.bus_error import BusError
from dax_mp.clients.mapping import ACCESS_READ, ACCESS_WRITE, Mapping
from dax_mp.clients.session import Session, connect
from dax_mp.clients.stress_cells import WORD_BYTES, Change, Geometry, Value, cell_name
from dax_mp.clients.stress_ledger import Ledger, Reader, Violation

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from dax_mp.clients.file import DaxFile

OPERATIONS: Final = {
    "load": 80,
    "store": 50,
    "read": 12,
    "write": 16,
    "load_body": 8,
    "punch": 4,
    "truncate": 1,
    "grow": 4,
    "map": 6,
    "unmap": 6,
    "flush": 1,
}
"""What a worker does, and how often in relation to the others."""

EXPECTED_ERRORS: Final = ("past_eof", "no_space")
"""What may come of an operation besides success: BusError EFAULT or a short read, and ENOSPC."""

RECORD_FIELDS: Final = (
    "operation",
    "file",
    "cell",
    "since_ns",
    "longest_ns",
    "longest_operation",
    *OPERATIONS,
    *EXPECTED_ERRORS,
)
"""What the words of a worker's record are. `operation`, the last one that it has begun, counts from 1 in OPERATIONS."""

_NAMES: Final = tuple(OPERATIONS)
_WEIGHTS: Final = tuple(OPERATIONS.values())
_COUNTS: Final = {name: index for index, name in enumerate(RECORD_FIELDS)}
_HOT_CELLS: Final = 16
_MAPPINGS_MAX: Final = 6
_RUN_CELLS_MAX: Final = 6
_OPERATIONS_PER_LOOK_AT_PARENT: Final = 64


def describe(record: Sequence[int]) -> str:
    """What a worker was at when its record was like this."""
    if not record[0]:
        return "nothing yet"
    ago_s = (time.monotonic_ns() - record[3]) / 1e9
    return f"{_NAMES[record[0] - 1]} of {cell_name(record[1], record[2])}, begun {ago_s:.1f} s ago"


def longest(records: Sequence[Sequence[int]]) -> tuple[str, float]:
    """The operation that has taken longest, of all workers, and its seconds. Precondition: there has been one."""
    longest_ns, operation = max((record[4], record[5]) for record in records)
    return _NAMES[operation - 1], longest_ns / 1e9


class MappedWords:
    """A mapping, and a view of it in words."""

    def __init__(self, mapping: Mapping, first_page: int, writable: bool) -> None:
        self.mapping = mapping
        self.words = memoryview(mapping).cast("Q")
        self.first_page = first_page
        self.writable = writable

    def index(self, offset_bytes: int) -> int | None:
        """Which word lies at this offset of the file; None where it is not mapped."""
        index = (offset_bytes - self.mapping.offset_bytes) // WORD_BYTES
        return index if 0 <= index < len(self.words) else None

    def close(self) -> None:
        self.words.release()
        self.mapping.close()


def _let_bus_error_come() -> None:
    """Called after an access through a raw buffer: a call is where Python raises what a signal handler has left."""


class Worker:
    """The files, mappings and random choices of one process."""

    def __init__(
        self,
        session: Session,
        ledger: Ledger,
        number: int,
        seed: str,
        names: Sequence[str],
        parent_gone: Callable[[], bool],
    ) -> None:
        self._session = session
        self._ledger = ledger
        self._geometry = ledger.geometry
        self._number = number
        self._random = random.Random(seed)
        self._parent_gone = parent_gone
        self._record = ledger.records[number]
        self._reader = Reader(ledger)
        self._owned = self._geometry.owned(number)
        self._files: list[DaxFile] = [session.open(name, "r+") for name in names]
        # The first mapping of each file stays, whatever happens to the file. It also tells the parent that the session
        # is still there (`stress.Stress`).
        whole_bytes = self._geometry.pages * self._geometry.page_size
        self._mapped = [[MappedWords(file.mmap(whole_bytes, past_eof=True), 0, True)] for file in self._files]

    def run(self, deadline_ns: int) -> None:
        """Work until the deadline or the parent's end. Raises Violation."""
        operations: list[Callable[[int, int], None]] = [getattr(self, f"_{name}") for name in _NAMES]
        since_look = 0
        while (now_ns := time.monotonic_ns()) < deadline_ns:
            since_look += 1
            if since_look % _OPERATIONS_PER_LOOK_AT_PARENT == 0 and self._parent_gone():
                return
            (number,) = self._random.choices(range(len(operations)), _WEIGHTS)
            file, cell = self._choose()
            self._record[1], self._record[2], self._record[3] = file, cell, now_ns
            self._record[0] = number + 1
            operations[number](file, cell)
            self._count(_NAMES[number])
            took_ns = time.monotonic_ns() - now_ns
            if took_ns > self._record[4]:
                self._record[4], self._record[5] = took_ns, number + 1

    def _choose(self) -> tuple[int, int]:
        """A file and a cell; every second time one of the few that all are after."""
        cells = _HOT_CELLS if self._random.random() < 0.5 else self._geometry.cells
        return self._random.randrange(self._geometry.files), self._random.randrange(cells)

    def _choose_own_run(self, near: int) -> range:
        """A run of cells of our own, the nearest one after `near`, if there is any."""
        first = next((cell for cell in self._owned if cell >= near), self._owned[0])
        end = first + 1
        length_max = self._random.randint(1, _RUN_CELLS_MAX)
        while end - first < length_max and end in self._owned:
            end += 1
        return range(first, end)

    def _count(self, name: str) -> None:
        self._record[_COUNTS[name]] += 1

    def _expect(self, error: OSError, *expected: int) -> None:
        """Count the error, or raise it where it is none of those that may come."""
        if error.errno not in expected:
            raise error
        self._count("no_space" if error.errno == errno.ENOSPC else "past_eof")

    # --- loads -----------------------------------------------------------------------------------------------------

    def _load(self, file: int, cell: int) -> None:
        mapped, index = self._mapping_with(file, cell, ACCESS_READ)
        (before,) = self._ledger.before_load(file, [cell], by_read=False)
        word = self._load_word(mapped, index)
        try:
            self._reader.judge(before, word)
        except Violation as violation:
            violation.evidence["mapped"] = self._mapped_as(mapped, cell // 2)
            raise

    def _load_body(self, file: int, cell: int) -> None:
        """Any word of the page but the last: write(2) stores there with the counter of the page's first cell."""
        cell -= cell % 2
        mapped, index = self._mapping_with(file, cell, ACCESS_READ)
        words = min(self._geometry.page_size // WORD_BYTES - 1, len(mapped.words) - index)
        (before,) = self._ledger.before_load(file, [cell], by_read=False)
        self._reader.judge_body(before, self._load_word(mapped, index + self._random.randrange(words)))

    def _load_word(self, mapped: MappedWords, index: int) -> int | None:
        """By the raw buffer or by a slice, which raise BusError in different ways; None for past the end."""
        try:
            if self._random.random() < 0.5:
                word = mapped.words[index]
                _let_bus_error_come()
                return word
            data = mapped.mapping[index * WORD_BYTES : (index + 1) * WORD_BYTES]
            return int.from_bytes(data, sys.byteorder)
        except BusError as error:
            self._expect(error, errno.EFAULT)
            return None

    def _read(self, file: int, cell: int) -> None:
        cells = range(cell, min(cell + self._random.randint(1, 8), self._geometry.cells))
        start_bytes, end_bytes = self._geometry.offset_bytes(cell), self._geometry.offset_bytes(cells[-1]) + WORD_BYTES
        facts = self._ledger.before_load(file, cells, by_read=True)
        self._files[file].seek(start_bytes)
        data = self._files[file].read(end_bytes - start_bytes)
        for before in facts:
            at = self._geometry.offset_bytes(before.cell) - start_bytes
            word = data[at : at + WORD_BYTES]
            self._reader.judge(before, int.from_bytes(word, sys.byteorder) if len(word) == WORD_BYTES else None)
        if len(data) < end_bytes - start_bytes:
            self._count("past_eof")

    # --- stores ----------------------------------------------------------------------------------------------------

    def _store(self, file: int, cell: int) -> None:
        """Store to a run of cells, in sequence, and up to the first that is refused."""
        for own in self._choose_own_run(cell):
            if not self._store_cell(file, own):
                return

    def _store_cell(self, file: int, cell: int) -> bool:
        mapped, index = self._mapping_with(file, cell, ACCESS_WRITE)
        (before,) = self._ledger.before_load(file, [cell], by_read=False)
        (begun,) = self._ledger.begin_store(file, [cell], by_write=False)
        refusal = self._store_word(mapped, index, Value(file, cell, begun.counter).pack())
        self._ledger.end_store(file, [begun], refusal is None)
        self._reader.judge_extent(before, refusal != errno.EFAULT)
        return refusal is None

    def _store_word(self, mapped: MappedWords, index: int, word: int) -> int | None:
        """By the raw buffer or by a slice. Returns the errno of its BusError."""
        try:
            if self._random.random() < 0.5:
                mapped.words[index] = word
                _let_bus_error_come()
            else:
                at = index * WORD_BYTES
                mapped.mapping[at : at + WORD_BYTES] = word.to_bytes(WORD_BYTES, sys.byteorder)
        except BusError as error:
            self._expect(error, errno.EFAULT, errno.ENOSPC)
            return error.errno
        return None

    def _write(self, file: int, cell: int) -> None:
        """write(2) of a run of cells of our own, and of all that lies between them."""
        run = self._choose_own_run(cell)
        change = self._geometry.write(self._geometry.offset_bytes(run[-1]) + WORD_BYTES)
        growth = self._ledger.begin_change(self._number, file, change)
        begun = self._ledger.begin_store(file, run, by_write=True)
        data = self._run_of_words(file, {store.cell: store.counter for store in begun})
        self._files[file].seek(self._geometry.offset_bytes(run[0]))
        try:
            self._files[file].write(data)
            done = True
        except OSError as error:
            self._expect(error, errno.ENOSPC)
            done = False
        self._ledger.end_store(file, begun, done)
        self._ledger.end_change(self._number, file, growth, done)

    def _run_of_words(self, file: int, counters: dict[int, int]) -> bytes:
        """What is written from the first of these cells to the last one: a page's body has the value of its start."""
        data = b""
        for cell, counter in counters.items():
            data += Value(file, cell, counter).pack().to_bytes(WORD_BYTES, sys.byteorder)
            if cell % 2 == 0 and cell + 1 in counters:
                data += data[-WORD_BYTES:] * (self._geometry.page_size // WORD_BYTES - 2)
        return data

    # --- truncate and punch ----------------------------------------------------------------------------------------

    def _change(self, file: int, change: Change, operation: Callable[[], object]) -> None:
        """Do it, and look at the cells next to the edges of what it has destroyed."""
        begun = self._ledger.begin_change(self._number, file, change)
        operation()
        self._ledger.end_change(self._number, file, begun, True)
        for cell in {change.destroy_first - 1, change.destroy_first, change.destroy_end - 1, change.destroy_end}:
            if 0 <= cell < self._geometry.cells:
                self._load(file, cell)

    def _set_size(self, file: int, size_bytes: int) -> None:
        self._change(file, self._geometry.truncate(size_bytes), lambda: self._files[file].truncate(size_bytes))

    def _truncate(self, file: int, cell: int) -> None:
        """Most often somewhere near the end, so that there is something left to work on."""
        if self._random.random() < 0.7:
            cell = self._random.randrange(self._geometry.cells // 2, self._geometry.cells)
        in_page_bytes = self._in_page_bytes() if self._random.random() < 0.5 else 0
        self._set_size(file, cell // 2 * self._geometry.page_size + in_page_bytes)

    def _grow(self, file: int, cell: int) -> None:
        page = max(cell // 2, self._random.randrange(self._geometry.pages))
        self._set_size(file, (page + 1) * self._geometry.page_size - self._random.choice([0, WORD_BYTES]))

    def _punch(self, file: int, cell: int) -> None:
        offset_bytes = cell // 2 * self._geometry.page_size
        length_bytes = self._random.randint(1, 4) * self._geometry.page_size
        if self._random.random() < 0.3:  # parts of pages
            offset_bytes += self._in_page_bytes()
            length_bytes -= self._in_page_bytes()
        end_bytes = min(offset_bytes + length_bytes, self._geometry.pages * self._geometry.page_size)
        change = self._geometry.punch_hole(offset_bytes, end_bytes)
        self._change(file, change, lambda: self._files[file].punch_hole(offset_bytes, end_bytes - offset_bytes))

    def _in_page_bytes(self) -> int:
        return WORD_BYTES * self._random.randrange(self._geometry.page_size // WORD_BYTES)

    def _flush(self, file: int, _cell: int) -> None:
        self._mapped[file][-1].mapping.flush()
        self._files[file].fsync()

    # --- mappings --------------------------------------------------------------------------------------------------

    def _mapping_with(self, file: int, cell: int, access: int) -> tuple[MappedWords, int]:
        """One of our mappings that has the cell, and which of its words that is."""
        offset_bytes = self._geometry.offset_bytes(cell)
        found = [
            (mapped, index)
            for mapped in self._mapped[file]
            if (mapped.writable or access == ACCESS_READ) and (index := mapped.index(offset_bytes)) is not None
        ]
        return self._random.choice(found)

    def _map(self, file: int, cell: int) -> None:
        if len(self._mapped[file]) >= _MAPPINGS_MAX:
            self._unmap(file, cell)
        page_size, first_page = self._geometry.page_size, cell // 2
        access = self._random.choice([ACCESS_READ, ACCESS_WRITE])
        past_eof = self._random.random() < 0.7
        pages = self._random.randint(1, self._geometry.pages - first_page)
        length_bytes = pages * page_size if past_eof else 0
        try:
            mapping = self._files[file].mmap(length_bytes, first_page * page_size, access, past_eof)
        except ValueError:  # length 0 is to the end of the file, and there is nothing
            if past_eof:
                raise
            return
        self._mapped[file].append(MappedWords(mapping, first_page, access == ACCESS_WRITE))

    def _unmap(self, file: int, _cell: int) -> None:
        if len(self._mapped[file]) > 1:
            self._mapped[file].pop(self._random.randrange(1, len(self._mapped[file]))).close()

    def _mapped_as(self, mapped: MappedWords, page: int) -> str:
        """What this process's kernel has mapped there now, for the evidence."""
        for entry in mapped.mapping.page_table():
            if entry.pgoff <= page < entry.pgoff + entry.length_pages:
                return f"{entry.target} frame {entry.pfn + page - entry.pgoff}, {'rw' if entry.writable else 'r'}"
        return "nothing"

    def close(self) -> None:
        for mappings in self._mapped:
            for mapped in mappings:
                mapped.close()
        for file in self._files:
            file.close()


def main(connection: "Connection[Any, Any]", arguments: Sequence[str]) -> None:
    """In the worker's process.

    arguments: the ledger's descriptor, the endpoint, the worker's number, the seed, what the files' names begin with,
    and the geometry.
    """
    ledger_fd, endpoint, number, seed, prefix, *numbers = arguments
    geometry = Geometry(*map(int, numbers))
    try:
        with connect(endpoint) as session:
            names = [f"{prefix}{file}" for file in range(geometry.files)]
            worker = Worker(session, Ledger(int(ledger_fd), geometry), int(number), seed, names, connection.poll)
            connection.send(("ready",))
            worker.run(connection.recv())
            worker.close()
        connection.send(("done",))
    except Violation as violation:
        connection.send(("violation", violation.evidence))
    except EOFError:
        pass  # the parent is gone
    except Exception:
        connection.send(("failed", traceback.format_exc()))
