"""One of the three processes: it does what it is told on both sides, and says what it sees."""

import mmap
import os
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import dax_mp
from exerciser.model import PAGES_MAX
from exerciser.sides import Here, Kernel, Side

_LENGTH = PAGES_MAX * mmap.PAGESIZE


class View(NamedTuple):
    """What one side shows: its size, and checksums of what a read, the shared and the private mapping give."""

    size: int
    read: int
    shared: int
    private: int


def view_of(side: Side) -> View:
    size = side.size()
    shown = min(size, _LENGTH)
    return View(
        size, zlib.crc32(side.pread(size, 0)), zlib.crc32(side.load(False, shown)), zlib.crc32(side.load(True, shown))
    )


class Worker:
    """The commands: each is a method, called with what follows its name."""

    def __init__(self, endpoint: str) -> None:
        self._session = dax_mp.connect(endpoint)
        self._sides: dict[str, Side] = {}

    def open(self, name: str, path: str) -> None:
        self._sides = {"here": Here(self._session, name), "kernel": Kernel(path)}

    def do(self, which: str, method: str, *arguments: Any) -> None:
        for name, side in self._sides.items():
            if which in (name, "both"):
                getattr(side, method)(*arguments)

    def here(self, method: str, *arguments: Any) -> Any:
        """Of the file here alone, what the other side has not."""
        side = self._sides["here"]
        assert isinstance(side, Here)
        return getattr(side.file, method)(*arguments)

    def mapping(self, method: str, *arguments: Any) -> None:
        side = self._sides["here"]
        assert isinstance(side, Here)
        getattr(side.shared, method)(*arguments)

    def look(self) -> tuple[View, View, int]:
        """Both sides, and the checksum of the read-only mapping of all but the first page."""
        side = self._sides["here"]
        assert isinstance(side, Here)
        shown = max(0, min(side.size(), _LENGTH) - mmap.PAGESIZE)
        return view_of(side), view_of(self._sides["kernel"]), zlib.crc32(side.readonly[:shown])

    def fetch(self, which: str, what: str, length: int) -> bytes:
        side = self._sides[which]
        return side.pread(length, 0) if what == "read" else side.load(what == "private", length)

    def fork(self, process: int) -> tuple[View, View, int]:
        """What a child of this process sees through the mappings made before the fork, and its private stores do."""
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                seen = self.look()
                for side in self._sides.values():
                    if seen[0].size:
                        side.store(True, 0, b"\xff")  # a copy of the child's own
                os.write(writer, repr((*map(tuple, seen[:2]), seen[2])).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            text = pipe.read()
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"
        here, kernel, readonly = eval(text)
        return View(*here), View(*kernel), readonly

    def close(self) -> None:
        for side in self._sides.values():
            side.close()
        self._sides = {}


def main(connection: Connection, endpoint: str) -> None:
    """Obey until the other end is closed. An exception is the answer, as text."""
    worker = Worker(endpoint)
    while True:
        try:
            name, *arguments = connection.recv()
        except (EOFError, ConnectionResetError):
            worker.close()
            worker._session.close()
            return
        command: Callable[..., Any] = getattr(worker, name)
        try:
            connection.send((True, command(*arguments)))
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))
