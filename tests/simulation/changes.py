"""What a request does to the pages and the size of its file, if it succeeds."""

from typing import Any, Final, NamedTuple

from dax_mp.messages import Fallocate, FallocateMode, Truncate, Write
from simulation.client import PAGE_SIZE, DirectWrite, page_value

FILE_PAGES: Final = 8
"""Operations are about the first pages of a file."""
CELLS: Final = 32
"""As long as a file can become, by insertions."""


class Change(NamedTuple):
    """The value that each page gets, and the size."""

    pages: dict[int, int]
    truncate_to_bytes: int | None = None
    extend_to_bytes: int | None = None


class Shift(NamedTuple):
    """Pages move from `first` on: up, and zeroes come in, or down by -pages, over those that are taken out."""

    first: int
    pages: int

    @property
    def moved_bytes(self) -> int:
        return self.pages * PAGE_SIZE


def pages_of(offset_bytes: int, length_bytes: int) -> range:
    return range(offset_bytes // PAGE_SIZE, -(-(offset_bytes + length_bytes) // PAGE_SIZE))


def change_of(operation: Any) -> Change | Shift | None:
    """Of a request or a direct write; None where it changes nothing."""
    if isinstance(operation, Truncate):
        cut = range(-(-operation.size_bytes // PAGE_SIZE), CELLS)
        return Change(dict.fromkeys(cut, 0), truncate_to_bytes=operation.size_bytes)
    if isinstance(operation, Fallocate):
        return _change_of_fallocate(operation)
    if isinstance(operation, Write):
        data, pages = operation.data, pages_of(operation.offset_bytes, len(operation.data))
        values = {p: page_value(data[p * PAGE_SIZE - operation.offset_bytes :]) for p in pages}
        return Change(values, extend_to_bytes=operation.offset_bytes + len(data))
    if isinstance(operation, DirectWrite):
        values = dict(enumerate(operation.values, operation.pgoff))
        return Change(values, extend_to_bytes=(operation.pgoff + len(operation.values)) * PAGE_SIZE)
    return None


def _change_of_fallocate(request: Fallocate) -> Change | Shift:
    pages = pages_of(request.offset_bytes, request.length_bytes)
    if request.mode == FallocateMode.COLLAPSE_RANGE:
        return Shift(pages.start, -len(pages))
    if request.mode == FallocateMode.INSERT_RANGE:
        return Shift(pages.start, len(pages))
    zeroes = request.mode & (FallocateMode.PUNCH_HOLE | FallocateMode.ZERO_RANGE)
    end_bytes = None if request.mode & FallocateMode.KEEP_SIZE else request.offset_bytes + request.length_bytes
    return Change(dict.fromkeys(pages, 0) if zeroes else {}, extend_to_bytes=end_bytes)
