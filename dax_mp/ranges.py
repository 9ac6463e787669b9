"""Half-open ranges of integers, and maps from them to values.

A `RangeMap` is the one data structure for everything that is known by range: a file's block map (page to frame), what a
VMA has mapped (page to page-table entry), the frames that are free. Neighbouring pieces that continue each other are
one piece, so what is contiguous costs the same however long it is.

It keeps its pieces in three plain sorted lists. A search is a bisection; an insertion moves the tail of the lists,
which stays below the cost of one message up to some hundred thousand pieces. The balanced structures that would not (a
sortedcontainers.SortedDict) weigh 1.6 KiB when empty, and there is one of these maps for each VMA.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Final, Generic, NamedTuple, TypeVar

V = TypeVar("V")

_INSERTIONS_MAX: Final = 1024
"""How many pieces are inserted one by one: a pass over a large map costs about as much as that many insertions."""


class PageRange(NamedTuple):
    """Pages [start, end) of a file, by pgoff."""

    start: int
    end: int

    @property
    def length_pages(self) -> int:
        return self.end - self.start

    def overlaps(self, other: "PageRange") -> bool:
        return self.start < other.end and other.start < self.end


class Extent(NamedTuple):
    """`length_pages` frames from `pfn` on, of one region."""

    pfn: int
    length_pages: int


class RangeMap(Generic[V]):
    """Disjoint half-open ranges, each with a value.

    A subclass says in `advance` what a piece's value is some steps into it; here it is the same all along. Two pieces
    that touch are merged when the second one's value is the first one's, advanced by the first one's length.
    """

    __slots__ = ("_ends", "_starts", "_values")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._values: list[V] = []

    @staticmethod
    def advance(value: V, _steps: int) -> V:
        """The value `steps` after the start of a piece that has `value` at its start."""
        return value

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int, V]]:
        """Every piece as (start, end, value), in order."""
        return zip(self._starts, self._ends, self._values, strict=True)

    def get(self, point: int) -> V | None:
        """The value at `point`, or None where there is none."""
        index = bisect_right(self._starts, point) - 1
        if index < 0 or point >= self._ends[index]:
            return None
        return self.advance(self._values[index], point - self._starts[index])

    def covering(self, start: int, end: int) -> V | None:
        """The value at `start`, if one piece has all of [start, end); else None."""
        index = bisect_right(self._starts, start) - 1
        if index < 0 or end > self._ends[index]:
            return None
        return self.advance(self._values[index], start - self._starts[index])

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, V]]:
        """The parts of the pieces that lie in [start, end), in order."""
        index = bisect_right(self._ends, start) if start < end else len(self._starts)
        while index < len(self._starts) and self._starts[index] < end:
            piece_start = self._starts[index]
            low = max(piece_start, start)
            yield low, min(self._ends[index], end), self.advance(self._values[index], low - piece_start)
            index += 1

    def gaps(self, start: int, end: int) -> Iterator[PageRange]:
        """The parts of [start, end) that have no value, in order."""
        for low, high, _value in self.pieces(start, end):
            if start < low:
                yield PageRange(start, low)
            start = high
        if start < end:
            yield PageRange(start, end)

    def before(self, point: int) -> tuple[int, int, V] | None:
        """The last piece that starts at or before `point`."""
        index = bisect_right(self._starts, point) - 1
        return None if index < 0 else (self._starts[index], self._ends[index], self._values[index])

    def after(self, point: int) -> tuple[int, int, V] | None:
        """The first piece that starts after `point`."""
        index = bisect_right(self._starts, point)
        return None if index == len(self._starts) else (self._starts[index], self._ends[index], self._values[index])

    def span(self, start: int, end: int) -> PageRange | None:
        """From the first to the last point of [start, end) that has a value; None where none has."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end) - 1
        if first > last or start >= end:
            return None
        return PageRange(max(self._starts[first], start), min(self._ends[last], end))

    def total(self) -> int:
        """The number of points that have a value."""
        return sum(self._ends) - sum(self._starts)

    def clear(self, start: int, end: int) -> list[tuple[int, int, V]]:
        """Take [start, end) out. Returns the parts that were there, in order."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end, first)
        if first == last or start >= end:
            return []
        removed = []
        for index in range(first, last):
            piece_start, value = self._starts[index], self._values[index]
            if piece_start < start:
                removed.append((start, min(self._ends[index], end), self.advance(value, start - piece_start)))
            else:
                removed.append((piece_start, min(self._ends[index], end), value))
        starts, ends, values = [], [], []
        if self._starts[first] < start:
            starts.append(self._starts[first])
            ends.append(start)
            values.append(self._values[first])
        if self._ends[last - 1] > end:
            starts.append(end)
            ends.append(self._ends[last - 1])
            values.append(self.advance(self._values[last - 1], end - self._starts[last - 1]))
        self._starts[first:last] = starts
        self._ends[first:last] = ends
        self._values[first:last] = values
        return removed

    def take(self, start: int, length_max: int) -> int | None:
        """Take up to `length_max` points from `start` on out of the piece that has it, and no further.

        Returns where what was taken ends; None where `start` has no value.
        """
        index = bisect_right(self._starts, start) - 1
        if index < 0 or start >= self._ends[index]:
            return None
        piece_start, piece_end, value = self._starts[index], self._ends[index], self._values[index]
        end = min(piece_end, start + length_max)
        if end == piece_end:
            self.clear(start, end)
        elif start == piece_start:
            self._values[index] = self.advance(value, end - start)
            self._starts[index] = end
        else:
            self._ends[index] = start
            self._starts.insert(index + 1, end)
            self._ends.insert(index + 1, piece_end)
            self._values.insert(index + 1, self.advance(value, end - piece_start))
        return end

    def set(self, start: int, end: int, value: V) -> None:
        """Give [start, end) the values that begin with `value`, in place of what was there."""
        assert start < end, f"empty range [{start}, {end})"
        starts, ends, values = self._starts, self._ends, self._values
        first = last = bisect_right(ends, start)
        if first < len(starts) and starts[first] < end:
            if starts[first] <= start and end <= ends[first] and self._continues(first, start, value):
                return  # it is so already
            if (starts[first], ends[first]) == (start, end):
                last += 1  # to be replaced: nothing behind it has to move
            else:
                self.clear(start, end)
                first = last = bisect_right(ends, start)
        # [first:last] are the pieces that the new one takes in: at most one before it, its own, and one behind.
        if last < len(starts) and starts[last] == end and self.advance(value, end - start) == values[last]:
            end = ends[last]
            last += 1
        if first and ends[first - 1] == start and self._continues(first - 1, start, value):
            first -= 1
            start, value = starts[first], values[first]
        starts[first:last] = (start,)
        ends[first:last] = (end,)
        values[first:last] = (value,)

    def insert(self, pieces: Sequence[tuple[int, int, V]]) -> None:
        """Give each of these ranges its values. Precondition: nothing in them has one.

        Each insertion moves what lies behind it, so for many a pass over the whole map is cheaper.
        """
        if len(pieces) < _INSERTIONS_MAX:
            for start, end, value in pieces:
                self.set(start, end, value)
            return
        everything = sorted((*self, *pieces), key=itemgetter(0))
        self._starts, self._ends, self._values = [], [], []
        for start, end, value in everything:
            self.set(start, end, value)

    def _continues(self, index: int, start: int, value: V) -> bool:
        return self.advance(self._values[index], start - self._starts[index]) == value

    def check(self) -> None:
        """Assert that the pieces are in order, disjoint, not empty, and merged where they can be."""
        previous_end: int | None = None
        for index, (start, end, value) in enumerate(self):
            assert start < end, f"empty piece [{start}, {end})"
            if previous_end is not None:
                assert previous_end <= start, f"pieces overlap at {start}"
                assert previous_end < start or not self._continues(index - 1, start, value), f"not merged at {start}"
            previous_end = end


class BlockMap(RangeMap[int]):
    """pgoff to pfn. A piece is an extent: two that follow each other in the file and on the device are one."""

    __slots__ = ()

    @staticmethod
    def advance(value: int, steps: int) -> int:
        return value + steps
