"""An actor of the demo: a client process that does one thing at a time, as it is told, and says what it saw."""

import errno
import hashlib
import os
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dax_mp.clients.bus_error import BusError
from dax_mp.clients.child import Child, ChildError
from dax_mp.clients.mapping import ACCESS_READ, ACCESS_WRITE, Mapping
from dax_mp.clients.page_table import PageTableEntry
from dax_mp.clients.session import Session, connect

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


class SawBusError(NamedTuple):
    """The access raised BusError, with this errno."""

    errno: int

    def __str__(self) -> str:
        return "BusError: past the end" if self == PAST_THE_END else f"BusError: {os.strerror(self.errno)}"


PAST_THE_END: Final = SawBusError(errno.EFAULT)


class Hashed(NamedTuple):
    """What hashing a file through a mapping gave, and took."""

    sha256: str
    faults: int


class Actor:
    """What an actor can be told to do. It has one file mapped at a time, open as `r+`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._mapping: Mapping | None = None

    def map(self, name: str) -> None:
        """Map the whole file, to load and to store."""
        with self._session.open(name, "r+") as file:
            self._mapping = file.mmap(access=ACCESS_WRITE)

    def unmap(self) -> None:
        self._mapped().close()
        self._mapping = None

    def load(self, offset_bytes: int, length_bytes: int) -> bytes:
        return self._mapped()[offset_bytes : offset_bytes + length_bytes]

    def store(self, offset_bytes: int, data: bytes) -> None:
        self._mapped()[offset_bytes : offset_bytes + len(data)] = data

    def page_table(self) -> list[PageTableEntry]:
        """What the kernel has mapped in this process, from /proc/self/maps."""
        return self._mapped().page_table()

    def truncate(self, name: str, size_bytes: int) -> None:
        with self._session.open(name, "r+") as file:
            file.truncate(size_bytes)

    def fill(self, name: str, pattern: bytes, length_bytes: int) -> None:
        """Write a new file that has nothing but the pattern in it, with write(2). The pattern's length divides it."""
        chunk_bytes = 1 << 20
        chunk = pattern * (chunk_bytes // len(pattern))
        with self._session.open(name, "x") as file:
            for start in range(0, length_bytes, chunk_bytes):
                file.write(chunk[: length_bytes - start])

    def hash(self, name: str) -> Hashed:
        """Map the file read-only and hash the mapped memory, as hashlib does any buffer."""
        faults = self._session.counters()["faults"]
        with self._session.open(name, "r") as file, file.mmap(access=ACCESS_READ) as mapping:
            digest = hashlib.sha256(mapping).hexdigest()
        return Hashed(digest, self._session.counters()["faults"] - faults)

    def _mapped(self) -> Mapping:
        assert self._mapping is not None, "the actor has not been told to map a file"
        return self._mapping


class ActorProcess:
    """The director's side of an actor. timeout_s: how long it may take for one command."""

    def __init__(self, name: str, endpoint: str, timeout_s: float) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._child = Child(f"actor {name}", "dax_mp.clients.demo_actor", [endpoint])

    @property
    def pid(self) -> int:
        return self._child.pid

    def tell(self, command: str, *arguments: object) -> Any:
        """Have a method of `Actor` called. Returns what it returned, or a SawBusError.

        Raises ChildError when the process has ended, hangs, or the method has failed.
        """
        self._child.send((command, arguments))
        failure, value = self._child.receive(self._timeout_s)
        if failure:
            raise ChildError(f"actor {self.name} (pid {self.pid}) has failed at {command}:\n{failure}")
        return value

    def close(self) -> None:
        self._child.close()


def main(connection: "Connection[Any, Any]", arguments: Sequence[str]) -> None:
    """In the actor's process: do what is told, until the director is gone. arguments: the endpoint."""
    (endpoint,) = arguments
    with connect(endpoint) as session:
        actor = Actor(session)
        while True:
            try:
                command, parameters = connection.recv()
            except EOFError:
                return
            failure, value = None, None
            try:
                value = getattr(actor, command)(*parameters)
            except BusError as error:
                value = SawBusError(error.errno or 0)
            except Exception:
                failure = traceback.format_exc()
            connection.send((failure, value))
