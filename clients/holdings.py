"""What a session has at the coordinator, handles and VMAs, and which of it has been let go of.

Files and mappings end in destructors as often as in close(). A destructor must not wait for an answer, and must take no
lock: the garbage collector runs it anywhere, in the middle of a request too. Nor should it run any Python code: an
asynchronous exception, such as a BusError on its way, would be raised in it, printed, and lost.

So nothing here is a destructor in Python, and no weak reference has a callback that is. A handle's is `deque.append`
itself; a window puts its VMA on a list of its pager, in C, once its translations are gone. The next request of any
thread takes along what has gathered.
"""

import weakref
from collections import deque
from typing import TYPE_CHECKING

from dax_mp import messages

if TYPE_CHECKING:
    from dax_mp.clients.file import DaxFile
    from dax_mp.clients.handle import Handle
    from dax_mp.clients.mapping import Mapping

Release = messages.Close | messages.Munmap


class Holdings:
    """Any thread may call any method; each step is one operation on a built-in type, which the GIL makes atomic."""

    def __init__(self) -> None:
        self._numbers: dict[weakref.ref[Handle], int] = {}
        self._dead_handles: deque[weakref.ref[Handle]] = deque()
        self._files: dict[int, weakref.ref[DaxFile]] = {}
        self._mappings: dict[int, weakref.ref[Mapping]] = {}
        self.closed_vmas: list[int] = []
        """`Pager.closed_vmas`, once there is a pager."""

    def add_handle(self, handle: "Handle") -> None:
        """When the object is gone, the handle is to be closed."""
        self._numbers[weakref.ref(handle, self._dead_handles.append)] = handle.number

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
        return bool(self._dead_handles or self.closed_vmas)

    def take(self) -> tuple[type[Release], int] | None:
        """The request that releases something, and its argument; each is given once."""
        try:
            if self.closed_vmas:
                vma_id = self.closed_vmas.pop()
                self._mappings.pop(vma_id, None)
                return messages.Munmap, vma_id
            number = self._numbers.pop(self._dead_handles.popleft())
            self._files.pop(number, None)
            return messages.Close, number
        except IndexError:
            return None  # another thread has taken it

    def clear(self) -> None:
        """The session is over, and all of it is released."""
        self._dead_handles.clear()
        self.closed_vmas.clear()
