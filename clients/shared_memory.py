"""Shared memory with the interface of multiprocessing.shared_memory.SharedMemory, over a file of the device.

Beside what that has: it can be resized while it is mapped, in every process; it is exactly as long as was asked for,
everywhere; and nothing tracks it. It lives until it is unlinked, or, when it is ephemeral, until the last process that
has it is gone, however that ended: the coordinator counts.

Nobody ever sees one half made, and of one whose maker is killed nothing is left: it is made without a name (O_TMPFILE),
sized, and then linked, unless the name is taken (`new_file.py`).
"""

import errno
import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

from dax_mp import mmu
from dax_mp.clients.file import DaxFile
from dax_mp.clients.new_file import NewFile
from dax_mp.clients.session import Session
from dax_mp.clients.shared_session import shared_session
from dax_mp.errors import os_error
from dax_mp.limits import NAME_BYTES_MAX

if TYPE_CHECKING:
    from dax_mp.clients.mapping import Mapping

_NAME_TRIES: Final = 16


class SharedMemory:
    """A block of shared memory, of exactly `size` bytes.

    name: None to make one up. create: make it (FileExistsError where the name is taken), else attach to it
    (FileNotFoundError). size: of a new one, in bytes. track: ignored, there is no tracker. session: whose to use; else
    the process's shared session at `endpoint`, by default $DAX_MP_ENDPOINT or the user's own. ephemeral: a new one is
    unlinked when no process has it any more. reserve: allocate all its blocks now (OSError ENOSPC), so that no later
    store finds the device full.

        >>> shared = dax_mp.SharedMemory(create=True, size=10_000, session=session)
        >>> shared.buf[:5] = b"hello"
        >>> other = dax_mp.SharedMemory(shared.name, session=session)  # in another process, likely
        >>> bytes(other.buf[:5]), other.size
        (b'hello', 10000)
        >>> other.resize(20_000)
        >>> other.close()
        >>> shared.close()
        >>> shared.unlink()
    """

    def __init__(
        self,
        name: str | None = None,
        create: bool = False,
        size: int = 0,
        *,
        track: bool = True,
        session: Session | None = None,
        endpoint: str | os.PathLike[str] | None = None,
        ephemeral: bool = False,
        reserve: bool = False,
    ) -> None:
        self._mapping: Mapping | None = None
        self._buf: memoryview | None = None
        self._size_bytes = 0
        self._made: NewFile | None = None
        if not size >= 0:
            raise ValueError("'size' must be a positive integer")
        if create and size == 0:
            raise ValueError("'size' must be a positive number different from zero")
        if name is None and not create:
            raise ValueError("'name' can only be None if create=True")
        self._session = shared_session(endpoint) if session is None else session
        if create:
            self._name = "" if name is None else name
            file_name = "shared memory" if name is None else _file_name(name)
            self._made = NewFile(self._session, file_name, ephemeral)
            self._made.make(self._fill, name, size, reserve)
        else:
            assert name is not None
            self._name = name
            with self._session.open(_file_name(name), "r+") as file:
                if reserve:
                    file.fallocate(0, file.size)
                self._map(file.mmap())

    def _fill(self, file: DaxFile, name: str | None, size: int, reserve: bool) -> None:
        """Size it, map it, and give it its name."""
        file.truncate(size)
        if reserve:
            file.fallocate(0, size)
        mapping = file.mmap()
        try:
            self._name = self._link(file, name)
        except BaseException:
            mapping.close()
            raise
        mapping.renamed(_file_name(self._name))
        self._map(mapping)

    def _link(self, file: DaxFile, name: str | None) -> str:
        """Give the file its name; returns it."""
        if name is not None:
            file.link()
            return name
        for _ in range(_NAME_TRIES):
            name = f"psm_{secrets.token_hex(4)}"
            try:
                file.link(name)
            except FileExistsError:
                continue
            return name
        raise os_error(errno.EEXIST, "no free name found")

    def _map(self, mapping: "Mapping") -> None:
        self._mapping = mapping
        self._view()

    def _view(self) -> None:
        assert self._mapping is not None
        self._buf = memoryview(self._mapping)
        self._size_bytes = len(self._mapping)

    @property
    def name(self) -> str:
        """By which other processes attach to it."""
        return self._name

    @property
    def session(self) -> Session:
        """Whose it is."""
        return self._session

    @property
    def size(self) -> int:
        """In bytes. Where another process has resized it, `resize()` to see that here."""
        return self._size_bytes

    @property
    def _fd(self) -> int:
        """What some packages call os.posix_fallocate() with. Any descriptor would have them allocate something else."""
        raise AttributeError(
            "a block of the device has no file descriptor; SharedMemory(..., reserve=True) allocates all of it at once"
        )

    @property
    def buf(self) -> memoryview:
        """Its memory; None when it is closed."""
        return cast(memoryview, self._buf)  # typed for those who use it rightly, as the standard library's

    def resize(self, size: int | None = None) -> None:
        """Give it another size, for all processes; None: take over here what another one has given it.

        `buf` is a new view afterwards. Views made before stay valid; past the end an access is a BusError.
        Raises ValueError when it is closed, or for a size that cannot be; OSError.
        """
        if self._mapping is None or self._buf is None:
            raise ValueError("the shared memory is closed")
        if size is not None and not size > 0:
            raise ValueError("'size' must be a positive number different from zero")
        mmu.settled(self._settle_size, self._resize, self._mapping, size)

    def _resize(self, mapping: "Mapping", size: int | None) -> None:
        try:
            self._set_size(mapping, size)
        except BufferError:
            self._buf = None  # what would have to move has no views then, if nobody has taken this one
            self._set_size(mapping, size)

    def _settle_size(self, _failed: bool) -> None:
        if self._mapping is not None and not self._mapping.closed:
            self._view()  # the old one lives on for who has it

    def _set_size(self, mapping: "Mapping", size: int | None) -> None:
        if size is None:
            mapping.remap(mapping.size())
        else:
            mapping.resize(size)

    def close(self) -> None:
        """Unmap it here. Raises BufferError where a view of it is still out. May be called again."""
        if self._buf is not None:
            self._buf.release()
            self._buf = None
        self._made = None  # it has the handle, which goes with the mapping
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

    def take_back(self) -> None:
        """For the library's own modules, after an exception: undo its creation, if it was created."""
        if self._made is not None:
            self._made.take_back_name()
        with suppress(BufferError):  # a view is out yet, and keeps it until that ends
            self.close()

    def unlink(self) -> None:
        """Take its name away; it lives on for those who have it. Raises FileNotFoundError."""
        self._session.unlink(_file_name(self._name))

    def __del__(self) -> None:
        try:
            self.close()
        except (BufferError, OSError, ValueError, AttributeError):
            pass

    def __reduce__(self) -> Any:
        return _attach, (type(self), self._session, self._name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r}, size={self.size})"


def _attach(cls: type[SharedMemory], session: Session, name: str) -> SharedMemory:
    return cls(name, session=session)


def _file_name(name: str) -> str:
    """Names are those of shm_open(3): they may begin with slashes. Raises OSError EINVAL, ValueError, TypeError."""
    file_name = ("/" + name).lstrip("/")
    if "\0" in file_name:
        raise ValueError("embedded null character")
    if not file_name or "/" in file_name or len(file_name.encode()) > NAME_BYTES_MAX:
        raise os_error(errno.EINVAL, filename=name)
    return file_name
