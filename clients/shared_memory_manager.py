"""SharedMemoryManager of the standard library, over this library's SharedMemory.

There the manager's process notes what was made and unlinks it at the end, with the resource tracker's help where that
process is killed. Here what a manager makes is ephemeral: a session of the manager's process holds each until the
manager shuts down, and then takes the names away; and where it is killed, each goes with the last process that has it.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.managers import BaseManager, Server, dispatch  # type: ignore[attr-defined]
from typing import Any, cast

from dax_mp.clients import shareable_list, shared_memory
from dax_mp.clients.session import Session


class _Server(Server):
    """In the manager's process: what it holds."""

    public = [*Server.public, "hold"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: list[shared_memory.SharedMemory] = []

    def hold(self, _connection: Any, session: Session, name: str) -> None:
        self._held.append(shared_memory.SharedMemory(name, session=session))

    def shutdown(self, c: Any) -> None:
        for held in self._held:
            with suppress(OSError):  # somebody has unlinked it, or the coordinator is gone
                held.unlink()
        super().shutdown(c)


class SharedMemoryManager(BaseManager):
    """multiprocessing.managers.SharedMemoryManager: what it makes lives as long as the manager, and is then unlinked.

    address and others: as of BaseManager. endpoint: of the coordinator, for the memory that this process makes.

        >>> with dax_mp.SharedMemoryManager(endpoint=daemon.endpoint) as manager:
        ...     shared, names = manager.SharedMemory(1000), manager.ShareableList(["one", "two"])
        ...     shared.size, names[1]  # both can be given to other processes
        (1000, 'two')
        >>> shared.close(); names.shm.close()
    """

    _Server = _Server

    def __init__(self, *args: Any, endpoint: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._endpoint = endpoint

    def SharedMemory(self, size: int) -> shared_memory.SharedMemory:
        """A new block of shared memory. Raises as SharedMemory, and as the standard library's when not started."""
        with self._client() as connection:
            made = shared_memory.SharedMemory(create=True, size=size, endpoint=self._endpoint, ephemeral=True)
            _hold(connection, made)
            return made

    def ShareableList(self, sequence: Iterable[Any]) -> "shareable_list.ShareableList[Any]":
        """A new list with these values. Raises as `SharedMemory`."""
        with self._client() as connection:
            made: shareable_list.ShareableList[Any]
            made = shareable_list.ShareableList(sequence, endpoint=self._endpoint, ephemeral=True)
            _hold(connection, cast(Any, made.shm))  # typed as the standard library's
            return made

    def _client(self) -> Connection:
        this: Any = self
        connection: Connection = this._Client(this._address, authkey=this._authkey)
        return connection


def _hold(connection: Connection, made: shared_memory.SharedMemory) -> None:
    dispatch(connection, None, "hold", (made.session, made.name))
