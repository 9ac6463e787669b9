"""What a private mapping may show: a copy that its process has made by a store, or what the file shows there.

A truncate takes the copies past the new end, at some moment while it goes on; a collapse those past the end that it
leaves, which is not known here. Nothing else takes any.
"""

from typing import Final

_FILE: Final = -1
"""The page shows what the file shows."""


class Copies:
    """Of one private mapping. cutters: the truncates under way, each with its first page and the copies of before."""

    def __init__(self) -> None:
        self._possible: dict[int, set[int]] = {}
        self._cutters: dict[int, tuple[int, dict[int, set[int]]]] = {}

    def _may_be_cut(self, pgoff: int) -> bool:
        return any(first <= pgoff for first, _ in self._cutters.values())

    def begin_cut(self, cut_id: int, first: int) -> None:
        before = {pgoff: values - {_FILE} for pgoff, values in self._possible.items() if pgoff >= first}
        self._cutters[cut_id] = (first, before)
        for pgoff in before:
            self._possible[pgoff].add(_FILE)

    def end_cut(self, cut_id: int, took_all: bool) -> None:
        """took_all: no copy of before its beginning is there any more."""
        if (cut := self._cutters.pop(cut_id, None)) is None or not took_all:
            return  # the mapping is younger, and the truncate may have come before it or after
        for pgoff, values in cut[1].items():
            self._possible[pgoff] -= values
            if not self._possible[pgoff]:
                del self._possible[pgoff]

    def stored(self, pgoff: int, value: int) -> None:
        self._possible[pgoff] = {value, _FILE} if self._may_be_cut(pgoff) else {value}

    def loaded(self, pgoff: int, value: int) -> bool:
        """Assert that it could be what the page shows, or the file's. Returns whether it is a copy."""
        possible = self._possible.get(pgoff, {_FILE})
        if value in possible:
            if not self._may_be_cut(pgoff):
                self._possible[pgoff] = {value}
            return True
        assert _FILE in possible, f"page {pgoff} has lost its private copy {possible}, and shows {value:#x}"
        self._possible.pop(pgoff, None)
        return False
