"""A handle: what Linux calls an open file description, and the requests that go by it.

A file object and its mappings share one. It is closed when the last of them lets go of it: the object's own lifetime
counts them, and `holdings.py` tells the coordinator.
"""

from typing import TYPE_CHECKING

from dax_mp import messages
from dax_mp.clients.lane import Call, Claim
from dax_mp.clients.status import Extent, FileStat
from dax_mp.limits import LIST_ENTRIES_MAX
from dax_mp.messages import OpenFlag

if TYPE_CHECKING:
    from dax_mp.clients.session import Session


class Handle:
    """An open file. All of it raises OSError with the file's name, and ValueError when the session is closed."""

    __slots__ = ("__weakref__", "ino", "name", "number", "session")

    def __init__(self, session: "Session", name: str, flags: OpenFlag) -> None:
        self.session = session
        self.name = name
        claim = Claim(messages.Close)
        session.channel.holdings.add_claim(self, claim)
        self.number: int
        self.number, self.ino, _ = session.channel.acquire(claim, messages.Open, name, int(flags), filename=name)

    def stat(self) -> FileStat:
        return FileStat.from_reply(self.session.channel.request(messages.Fstat, self.number, filename=self.name))

    def size_bytes(self) -> int:
        return self.stat().size_bytes

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """At most IO_CHUNK_BYTES_MAX. Fewer at the end of the file."""
        request = self.session.channel.request
        data: bytes = request(messages.Read, self.number, offset_bytes, length_bytes, filename=self.name)
        return data

    def write(self, offset_bytes: int, data: bytes, append: bool) -> int:
        """At most IO_CHUNK_BYTES_MAX. Returns the offset after the data."""
        request = self.session.channel.request
        end_bytes: int = request(messages.Write, self.number, offset_bytes, int(append), data, filename=self.name)
        return end_bytes

    def seek(self, offset_bytes: int, whence: int) -> int:
        """whence: messages.Whence."""
        request = self.session.channel.request
        found_bytes: int = request(messages.Seek, self.number, offset_bytes, whence, filename=self.name)
        return found_bytes

    def truncate(self, size_bytes: int) -> None:
        self.session.channel.request(messages.Truncate, self.number, size_bytes, filename=self.name)

    def fallocate(self, mode: int, offset_bytes: int, length_bytes: int) -> None:
        """mode: messages.FallocateMode."""
        request = self.session.channel.request
        request(messages.Fallocate, self.number, mode, offset_bytes, length_bytes, filename=self.name)

    def copy_range(self, offset_bytes: int, target: "Handle", target_offset_bytes: int, length_bytes: int) -> int:
        """At most IO_CHUNK_BYTES_MAX into another file of the same session. Returns how much."""
        copied_bytes: int = self.session.channel.request(
            messages.CopyRange,
            self.number,
            offset_bytes,
            target.number,
            target_offset_bytes,
            length_bytes,
            filename=self.name,
        )
        return copied_bytes

    def link(self, name: str, replace: bool) -> None:
        flags = 0 if replace else int(messages.RenameFlag.NOREPLACE)
        self.session.channel.complete(Call(messages.Link, (self.number, name, flags)), name)
        self.name = name

    def unlink_quietly(self) -> None:
        """After an exception: take away the name that the file has, if it has one."""
        stat = self.session.channel.ask_quietly(messages.Fstat, self.number)
        if stat is not None and stat["name"] is not None:
            self.session.channel.ask_quietly(messages.Unlink, stat["name"])

    def setxattr(self, name: str, value: bytes) -> None:
        self.session.channel.request(messages.Setxattr, self.number, name, value, filename=self.name)

    def getxattr(self, name: str) -> bytes:
        value: bytes = self.session.channel.request(messages.Getxattr, self.number, name, filename=self.name)
        return value

    def listxattr(self) -> list[str]:
        names: list[str] = self.session.channel.request(messages.Listxattr, self.number, filename=self.name)
        return names

    def removexattr(self, name: str) -> None:
        self.session.channel.request(messages.Removexattr, self.number, name, filename=self.name)

    def fsync(self) -> None:
        self.session.channel.request(messages.Fsync, self.number, filename=self.name)

    def utime(self, ns: tuple[int, int] | None) -> None:
        """ns: atime and mtime; None: now."""
        request = self.session.channel.request
        request(messages.Utime, self.number, int(ns is None), *(ns or (0, 0)), filename=self.name)

    def msync(self, vma_id: int) -> None:
        self.session.channel.request(messages.Msync, vma_id, filename=self.name)

    def extents(self, unwritten: bool = False) -> list[Extent]:
        """unwritten: those that read as holes, else the others."""
        page_size = self.session.page_size
        extents: list[Extent] = []
        after_pgoff = 0
        while True:
            flat = self.session.channel.request(
                messages.Extents, self.number, after_pgoff, int(unwritten), filename=self.name
            )
            numbers = iter(flat)
            for pgoff, length_pages, pfn in zip(numbers, numbers, numbers, strict=True):
                extents.append(Extent(pgoff * page_size, length_pages * page_size, pfn, unwritten))
                after_pgoff = pgoff + length_pages
            if len(flat) < 3 * LIST_ENTRIES_MAX:
                return extents
