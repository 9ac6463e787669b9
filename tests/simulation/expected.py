"""What the pages of all files may hold, while operations on them overlap.

`spec` judges a short history exactly; this keeps up with a history of any length, and knows less. A load or a store
takes effect at one known moment. Any other operation takes effect at some moment between its request and its answer:
until then both outcomes are possible, and afterwards too where something else happened to the same page meanwhile.
"""

import errno
from typing import Final, NamedTuple

from simulation.client import PAGE_SIZE, Failed

FILE_PAGES: Final = 8


class Change(NamedTuple):
    """What a request does to a file: the value that each page gets, and the size."""

    pages: dict[int, int]
    truncate_to_bytes: int | None = None
    extend_to_bytes: int | None = None


class Cell:
    """One page's value. pending: of each change under way, the value that it gives the page."""

    def __init__(self) -> None:
        self.possible = {0}
        self.pending: dict[int, int] = {}
        self.overlapped: set[int] = set()

    def now(self) -> set[int]:
        return self.possible.union(self.pending.values())

    def begin(self, change_id: int, value: int) -> None:
        if self.pending:
            self.overlapped.update(self.pending, [change_id])
        self.pending[change_id] = value

    def end(self, change_id: int, took_effect: bool) -> None:
        value = self.pending.pop(change_id)
        if took_effect:
            self.possible = self.possible | {value} if change_id in self.overlapped else {value}
        self.overlapped.discard(change_id)

    def stored(self, value: int) -> None:
        self.possible = {value}
        self.overlapped.update(self.pending)


class Access:
    """A load, a store or a read that is under way: what it may find."""

    def __init__(self, file: "File", pages: range) -> None:
        self.smallest_bytes = min(file.sizes_bytes())
        self.values = {pgoff: file.cells[pgoff].now() for pgoff in pages}


class File:
    """A file of at most FILE_PAGES pages."""

    def __init__(self) -> None:
        self.cells = [Cell() for _ in range(FILE_PAGES)]
        self._sizes_bytes = {0}
        self._changes: dict[int, Change] = {}
        self._overlapped: set[int] = set()
        self.accesses: dict[int, Access] = {}

    def sizes_bytes(self) -> set[int]:
        """Every size that it may have now."""
        changes = self._changes.values()
        sizes = self._sizes_bytes.union(c.truncate_to_bytes for c in changes if c.truncate_to_bytes is not None)
        ends = [c.extend_to_bytes for c in changes if c.extend_to_bytes is not None]
        return sizes.union(max(size, end) for size in sizes for end in ends)

    def begin(self, change_id: int, change: Change) -> None:
        if self._changes:
            self._overlapped.update(self._changes, [change_id])
        self._changes[change_id] = change
        for pgoff, value in change.pages.items():
            self.cells[pgoff].begin(change_id, value)
        for access in self.accesses.values():
            access.smallest_bytes = min(access.smallest_bytes, *self.sizes_bytes())
            self._show(access)

    def end(self, change_id: int, took_effect: bool) -> None:
        change = self._changes.pop(change_id)
        for pgoff in change.pages:
            self.cells[pgoff].end(change_id, took_effect)
        if took_effect:
            self._resize(change, change_id in self._overlapped)
        self._overlapped.discard(change_id)

    def _resize(self, change: Change, overlapped: bool) -> None:
        if change.truncate_to_bytes is not None:
            sizes = {change.truncate_to_bytes}
        elif change.extend_to_bytes is not None:
            # Where a truncate is under way, it may have come before this.
            before = self.sizes_bytes() if overlapped else self._sizes_bytes
            sizes = {max(size, change.extend_to_bytes) for size in before}
        else:
            return
        self._sizes_bytes = self._sizes_bytes | sizes if overlapped else sizes

    def give_up(self) -> None:
        """What is still under way belongs to dead processes: it has taken effect or not, and will not any more."""
        for change_id in list(self._changes):
            self._overlapped.add(change_id)
            for cell in self.cells:
                cell.overlapped.add(change_id)
            self.end(change_id, took_effect=True)

    def _show(self, access: Access) -> None:
        for pgoff in access.values:
            access.values[pgoff] |= self.cells[pgoff].now()

    def begin_access(self, access_id: int, pages: range) -> None:
        self.accesses[access_id] = Access(self, pages)

    def end_access(self, access_id: int) -> Access:
        return self.accesses.pop(access_id)

    # --- what happened ------------------------------------------------------------------------------------------------

    def loaded(self, pgoff: int, value: int) -> None:
        """Assert that a process that is not evicted may have loaded this just now."""
        cell = self.cells[pgoff]
        assert value in cell.now(), f"page {pgoff} shows {value:#x}, but can only be {cell.possible} or {cell.pending}"
        self._assert_inside(pgoff)
        if not cell.pending:
            cell.possible = {value}

    def stored(self, pgoff: int, value: int, *, evicted: bool) -> None:
        if evicted:
            self.cells[pgoff].possible.add(value)  # it may have reached the file's block, or one in quarantine
        else:
            self._assert_inside(pgoff)
            self.cells[pgoff].stored(value)
        for access in self.accesses.values():
            self._show(access)

    def _assert_inside(self, pgoff: int) -> None:
        sizes_bytes = self.sizes_bytes()
        assert pgoff * PAGE_SIZE < max(sizes_bytes), f"page {pgoff} is mapped, and the size can only be {sizes_bytes}"

    def failed(self, access: Access, pgoff: int, failed: Failed) -> None:
        """Assert that the access could fail for the reason that it gives."""
        if failed.errno == errno.EFAULT:
            assert access.smallest_bytes <= pgoff * PAGE_SIZE, (
                f"page {pgoff} was past the end, but the size was at least {access.smallest_bytes} bytes all the time"
            )
