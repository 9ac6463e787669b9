"""SharedMemoryManager of the standard library, over this library's SharedMemory.

There the manager's process notes what was made and unlinks it at the end, with the resource tracker's help. Here that
is the coordinator's work: what a manager makes is ephemeral, and a session of the manager's process holds each until
the manager shuts down, or is killed. So nothing is left behind either way.
"""

import os
from collections.abc import Callable, Iterable
from multiprocessing.managers import BaseManager
from typing import Any, cast

from dax_mp.clients import shareable_list, shared_memory
from dax_mp.clients.session import shared_session


class _Held:
    """In the manager's process: what it holds."""

    def __init__(self) -> None:
        self._held: dict[str, shared_memory.SharedMemory] = {}

    def hold(self, endpoint: str, name: str) -> None:
        self._held[name] = shared_memory.SharedMemory(name, endpoint=endpoint)


class SharedMemoryManager(BaseManager):
    """multiprocessing.managers.SharedMemoryManager: what it makes lives as long as the manager, and is then unlinked.

    address and others: as of BaseManager. endpoint: of the coordinator, for the memory that this process makes.
    """

    def __init__(self, *args: Any, endpoint: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._endpoint = endpoint
        self._holder: Any = None

    def SharedMemory(self, size: int) -> shared_memory.SharedMemory:
        """A new block of shared memory."""
        return self._made(
            lambda: shared_memory.SharedMemory(create=True, size=size, endpoint=self._endpoint, ephemeral=True)
        )

    def ShareableList(self, sequence: Iterable[Any]) -> "shareable_list.ShareableList[Any]":
        """A new list with these values."""
        lists: list[shareable_list.ShareableList[Any]] = []

        def make() -> shared_memory.SharedMemory:
            lists.append(shareable_list.ShareableList(sequence, endpoint=self._endpoint, ephemeral=True))
            shm: shared_memory.SharedMemory = cast(Any, lists[0].shm)  # typed as the standard library's
            return shm

        self._made(make)
        return lists[0]

    def _made(self, make: Callable[[], shared_memory.SharedMemory]) -> shared_memory.SharedMemory:
        """What `make` makes, held by the manager's process. Raises AssertionError, as BaseManager, when not started."""
        if self._holder is None:
            self._holder = self._Held()  # type: ignore[attr-defined]  # registered below
        made = make()
        self._holder.hold(shared_session(self._endpoint).endpoint, made.name)
        return made


SharedMemoryManager.register("_Held", _Held, exposed=("hold",))
