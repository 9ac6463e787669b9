"""What a session has at the coordinator, handles and VMAs, and which of it has been let go of.

Files and mappings end in destructors as often as in close(). A destructor must not wait for an answer, and must take no
lock: the garbage collector runs it anywhere, in the middle of a request too. Nor should it run any Python code: an
asynchronous exception, such as a BusError on its way, would be raised in it, printed, and lost.

So nothing here is a destructor in Python, and no weak reference has a callback that is. That of the owner of a `Claim`
is `deque.append` itself; a window puts its VMA on a list of its pager, in C, once its translations are gone. The next
request of any thread takes along what has gathered.
"""

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from dax_mp import messages
from dax_mp.clients.lane import Claim, RequestType

if TYPE_CHECKING:
    from dax_mp.clients.file import DaxFile
    from dax_mp.clients.handle import Handle
    from dax_mp.clients.mapping import Mapping


class Holdings:
    """Any thread may call any method; each step is one operation on a built-in type, which the GIL makes atomic."""

    def __init__(self) -> None:
        self._claims: dict[weakref.ref[Any], Claim] = {}
        self._dead: deque[weakref.ref[Any]] = deque()
        self._files: dict[int, weakref.ref[DaxFile]] = {}
        self._mappings: dict[int, weakref.ref[Mapping]] = {}
        self.closed_vmas: list[int] = []
        """`Pager.closed_vmas`, once there is a pager."""

    def add_claim(self, owner: object, claim: Claim) -> None:
        """When the owner is gone, what has been acquired for it is to be released. To be said before it is acquired."""
        self._claims[weakref.ref(owner, self._dead.append)] = claim

    def add_file(self, file: "DaxFile", handle: "Handle") -> None:
        self._files[handle.number] = weakref.ref(file)

    def add_mapping(self, mapping: "Mapping") -> None:
        self._mappings[mapping.vma_id] = weakref.ref(mapping)

    def files(self) -> "list[DaxFile]":
        """Those that are still there, open or closed."""
        return [file for reference in list(self._files.values()) if (file := reference()) is not None]

    def mappings(self) -> "list[Mapping]":
        """Those that are still there, open or closed."""
        return [mapping for reference in list(self._mappings.values()) if (mapping := reference()) is not None]

    def renumber(self, mapping: "Mapping", vma_id: int) -> None:
        """In a fork's child: the mapping's VMA is this one now."""
        reference = self._mappings.pop(mapping.vma_id)
        self._mappings[vma_id] = reference

    def __bool__(self) -> bool:
        """Is there something to release?"""
        return bool(self._dead or self.closed_vmas)

    def first(self) -> tuple[RequestType, int, Callable[[], None]] | None:
        """The request that releases something, its argument, and what forgets it, to be called when that is done.

        Two threads may be told the same: a release that comes too late is refused, and does no harm.
        """
        while self._dead:
            reference = self._dead[0]
            claim = self._claims.get(reference)
            forget = partial(self._forget_claim, reference)
            if claim is not None and claim.number is not None:
                return claim.release, claim.number, forget
            forget()
        for vma_id in self.closed_vmas[-1:]:
            return messages.Munmap, vma_id, partial(self._forget_vma, vma_id)
        return None

    def _forget_claim(self, reference: "weakref.ref[Any]") -> None:
        claim = self._claims.pop(reference, None)
        if claim is not None and claim.number is not None:
            self._files.pop(claim.number, None)
        with suppress(ValueError):  # another thread has
            self._dead.remove(reference)

    def _forget_vma(self, vma_id: int) -> None:
        self._mappings.pop(vma_id, None)
        with suppress(ValueError):
            self.closed_vmas.remove(vma_id)

    def clear(self) -> None:
        """The session is over, and all of it is released."""
        self._dead.clear()
        self.closed_vmas.clear()
