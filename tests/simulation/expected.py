"""What the pages of all files may hold, while operations on them overlap.

`spec` judges a short history exactly; this keeps up with a history of any length, and knows less. A load or a store
takes effect at one known moment. Any other operation takes effect at some moment between its request and its answer:
until then both outcomes are possible, and afterwards too where something else happened to the same page meanwhile.

While pages move (collapse, insert), any page may show what any page of the file may hold. Afterwards each one holds
what its predecessor held; or, where something else happened to the file meanwhile, any of it.
"""

import errno

from simulation.changes import CELLS, Change, Shift
from simulation.client import PAGE_SIZE, Failed


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
        self.values = {pgoff: file.now(pgoff) for pgoff in pages}


class File:
    """A file of at most CELLS pages."""

    def __init__(self) -> None:
        self.cells = [Cell() for _ in range(CELLS)]
        self._shifts: dict[int, Shift] = {}
        self._disturbed: set[int] = set()
        """The shifts with which something else has happened at the same time."""
        self._passing: set[int] = set()
        """What any page has held since the shifts under way began."""
        self.shifted = False
        """Have its pages ever moved?"""
        self._sizes_bytes = {0}
        self._changes: dict[int, Change] = {}
        self._overlapped: set[int] = set()
        self.accesses: dict[int, Access] = {}

    def sizes_bytes(self) -> set[int]:
        """Every size that it may have now."""
        changes = self._changes.values()
        sizes = self._sizes_bytes.union(c.truncate_to_bytes for c in changes if c.truncate_to_bytes is not None)
        ends = [c.extend_to_bytes for c in changes if c.extend_to_bytes is not None]
        sizes = sizes.union(max(size, end) for size in sizes for end in ends)
        for shift in self._shifts.values():
            sizes |= {size + shift.moved_bytes for size in sizes if size + shift.moved_bytes >= 0}
        return sizes

    def now(self, pgoff: int) -> set[int]:
        """What the page may show now."""
        return self._anything() if self._shifts else self.cells[pgoff].now()

    def _anything(self) -> set[int]:
        return self._passing.union([0], *(cell.now() for cell in self.cells))

    def begin_shift(self, shift_id: int, shift: Shift) -> None:
        self._disturb()
        if self._changes or self._shifts:
            self._disturbed.add(shift_id)
        self._shifts[shift_id] = shift
        self._passing |= self._anything()
        self.shifted = True
        for access in self.accesses.values():
            access.smallest_bytes = min(access.smallest_bytes, *self.sizes_bytes())
            self._show(access)

    def end_shift(self, shift_id: int, took_effect: bool) -> None:
        sizes, anything = self._sizes_bytes, self._anything()
        shift = self._shifts.pop(shift_id)
        disturbed = shift_id in self._disturbed
        self._disturbed.discard(shift_id)
        self._disturb()
        if not took_effect:
            return
        if disturbed:
            sizes = self.sizes_bytes()
            for cell in self.cells[shift.first :]:
                cell.possible |= anything
            for cell in self.cells:
                cell.overlapped.update(cell.pending)
            self._overlapped.update(self._changes)
        else:
            self._move(shift)
        moved = {size + shift.moved_bytes for size in sizes if size + shift.moved_bytes >= 0}
        self._sizes_bytes = self._sizes_bytes | moved if disturbed else moved
        for access in self.accesses.values():
            self._show(access)

    def _move(self, shift: Shift) -> None:
        before = [cell.possible for cell in self.cells]
        for pgoff in range(shift.first, CELLS):
            source = pgoff - shift.pages
            inserted = shift.first > source or source >= CELLS
            self.cells[pgoff].possible = {0} if inserted else before[source]

    def _disturb(self) -> None:
        """Something happens to the file, now. What is there may have moved already, or may be put over what has not."""
        if self._shifts:
            self._disturbed.update(self._shifts)
            self._passing |= self._anything()
        else:
            self._passing.clear()

    def begin(self, change_id: int, change: Change) -> None:
        self._disturb()
        if self._changes:
            self._overlapped.update(self._changes, [change_id])
        self._changes[change_id] = change
        for pgoff, value in change.pages.items():
            self.cells[pgoff].begin(change_id, value)
        for access in self.accesses.values():
            access.smallest_bytes = min(access.smallest_bytes, *self.sizes_bytes())
            self._show(access)

    def end(self, change_id: int, took_effect: bool | None) -> None:
        """took_effect: None where that is not known, but it will not any more."""
        if took_effect is None:
            self._overlapped.add(change_id)
            for cell in self.cells:
                cell.overlapped.add(change_id)
        self._disturb()
        change = self._changes.pop(change_id)
        for pgoff in change.pages:
            self.cells[pgoff].end(change_id, took_effect is not False)
        for cell in self.cells:
            cell.overlapped.discard(change_id)
        if took_effect is not False:
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
            self.end(change_id, took_effect=None)
        for shift_id in list(self._shifts):
            self._disturbed.add(shift_id)
            self.end_shift(shift_id, took_effect=True)

    def _show(self, access: Access) -> None:
        for pgoff in access.values:
            access.values[pgoff] |= self.now(pgoff)

    def begin_access(self, access_id: int, pages: range) -> None:
        self.accesses[access_id] = Access(self, pages)

    def end_access(self, access_id: int) -> Access:
        return self.accesses.pop(access_id)

    # --- what happened ------------------------------------------------------------------------------------------------

    def loaded(self, pgoff: int, value: int) -> None:
        """Assert that a process that is not evicted may have loaded this just now."""
        cell = self.cells[pgoff]
        possible = self.now(pgoff)
        assert value in possible, f"page {pgoff} shows {value:#x}, but can only be {possible}"
        self._assert_inside(pgoff)
        if not cell.pending and not self._shifts:
            cell.possible = {value}

    def stored(self, pgoff: int, value: int, *, evicted: bool) -> None:
        self._disturb()
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
