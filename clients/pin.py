"""A pin of a mapping's pages, for the length of a `with`.

What it has is on its claim, and there are two ways for it to go back: the end of the `with`, which tells the
coordinator and, where it is interrupted, does so again; and the end of the object, for the case that an exception comes
before the `with` has begun or after it has ended.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from dax_mp import messages, mmu
from dax_mp.clients.lane import Claim

if TYPE_CHECKING:
    from dax_mp.clients.mapping import Mapping


class Pin:
    """`Mapping.pin` makes one. start, length_bytes: in the mapping; first, pages: of the file."""

    def __init__(self, mapping: "Mapping", start: int, length_bytes: int, first: int, pages: int) -> None:
        self._mapping = mapping
        self._range = start, length_bytes
        self._pages = first, pages
        self._claim = Claim(messages.Unpin)
        self._kept: list[None] = []  # an item while the window keeps the range
        self._view: memoryview | None = None

    def __enter__(self) -> memoryview:
        mmu.settled(self._undo, self._take)
        assert self._view is not None
        return self._view

    def __exit__(self, *exception: object) -> None:
        mmu.settled(self._undo, self._give_back)

    def _take(self) -> None:
        mapping = self._mapping
        start, length_bytes = self._range
        self._view = memoryview(cast(Any, mapping))[start : start + length_bytes]  # the mapping stays open
        mapping.acquire_pin(self, self._claim, *self._pages)
        self._kept.extend(map(mapping.keep, (start,), (length_bytes,), (True,)))  # one bytecode
        mmu.Window.populate(mapping, start, length_bytes, mapping.writable)

    def _give_back(self) -> None:
        self._let_go_here()
        if self._claim.number is not None:
            self._mapping.unpin(self._claim.number)
            self._claim.number = None
        self._release_view()

    def _undo(self, failed: bool) -> None:
        """What is left after an exception. Nothing is waited for."""
        if not failed:
            return
        self._let_go_here()
        if self._claim.number is not None:
            self._mapping.channel.post_quietly(messages.Unpin, self._claim.number)
            self._claim.number = None
        with suppress(BufferError):
            self._release_view()

    def _let_go_here(self) -> None:
        while self._kept:
            with suppress(OSError):
                self._mapping.keep(*self._range, False)
            self._kept.clear()

    def _release_view(self) -> None:
        if self._view is not None:
            self._view.release()
            self._view = None
