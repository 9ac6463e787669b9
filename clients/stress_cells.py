"""What the stress program writes, and where: cells.

A *cell* is an aligned word of 8 bytes, the first or the last one of a page: cell 2p begins page p, cell 2p+1 ends it. A
word of that kind is loaded and stored by one instruction, so a reader sees a value that was written or none, never a
mixture. The value is file, cell and counter in one, and 0 where nothing was written: a byte that has come from another
page, another file or another time says so by itself.

Each cell has one owner, the only process that stores to it, always a larger counter than before. Neighbouring pages
have the same owner, so that runs of pages are written in sequence; of an odd page the end belongs to another process
than the start, so that two processes' first stores to a hole race for one page.
"""

from typing import Final, NamedTuple

WORD_BYTES: Final = 8
_COUNTER_BITS: Final = 32
_CELL_BITS: Final = 24
_OWNED_RUN_PAGES: Final = 4


class Value(NamedTuple):
    """What a word says about itself."""

    file: int
    cell: int
    counter: int

    def pack(self) -> int:
        return ((self.file + 1) << _CELL_BITS | self.cell) << _COUNTER_BITS | self.counter

    @classmethod
    def unpack(cls, word: int) -> "Value":
        """What a word that is not 0 says. `file` is -1, or too large, where no process can have written it."""
        return cls(
            (word >> _CELL_BITS + _COUNTER_BITS) - 1,
            word >> _COUNTER_BITS & (1 << _CELL_BITS) - 1,
            word & (1 << _COUNTER_BITS) - 1,
        )

    def __str__(self) -> str:
        return f"counter {self.counter} of {cell_name(self.file, self.cell)}"


def cell_name(file: int, cell: int) -> str:
    return f"file {file}, page {cell // 2}, {'end' if cell % 2 else 'start'}"


class Change(NamedTuple):
    """What an operation does to the cells of a file, other than storing a value.

    destroy_first, destroy_end: cells that it zeroes or takes away. cut_first: cells from there on end up past the end
    of the file. grow_end: cells before that end up within the file.
    """

    destroy_first: int
    destroy_end: int
    cut_first: int
    grow_end: int


class Geometry(NamedTuple):
    """The files under stress, and who owns what in them."""

    page_size: int
    files: int
    pages: int
    """Of each file at its longest."""
    processes: int

    @property
    def cells(self) -> int:
        """Of each file."""
        return 2 * self.pages

    def offset_bytes(self, cell: int) -> int:
        return cell // 2 * self.page_size + cell % 2 * (self.page_size - WORD_BYTES)

    def first_cell_from(self, offset_bytes: int) -> int:
        """The first cell that begins at or after an offset, a multiple of WORD_BYTES."""
        page, in_page_bytes = divmod(offset_bytes, self.page_size)
        return 2 * page + (in_page_bytes > 0)

    def owner(self, cell: int) -> int:
        page, at_end = divmod(cell, 2)
        return (page // _OWNED_RUN_PAGES + page % 2 * at_end) % self.processes

    def owned(self, process: int) -> list[int]:
        """The cells of each file that a process owns."""
        return [cell for cell in range(self.cells) if self.owner(cell) == process]

    def truncate(self, size_bytes: int) -> Change:
        first_gone = self.first_cell_from(size_bytes)
        return Change(first_gone, self.cells, first_gone, first_gone)

    def punch_hole(self, offset_bytes: int, end_bytes: int) -> Change:
        first, end = self.first_cell_from(offset_bytes), self.first_cell_from(end_bytes)
        return Change(first, end, self.cells, 0)

    def write(self, end_bytes: int) -> Change:
        """What write(2) up to `end_bytes` does besides storing: the file may grow."""
        return Change(0, 0, self.cells, self.first_cell_from(end_bytes))
