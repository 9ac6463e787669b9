"""A file that gets its name last, when all that it is to hold is there, and loses it again where its making is ended.

It is made without a name (O_TMPFILE), so of a process that is killed meanwhile nothing is left. An exception is another
matter: a signal handler's may come when the coordinator has given the file its name already, and then the caller, who
has got no object, would not know that there is something to unlink. So whatever ends the making takes the name back.
The coordinator is asked by the handle whether the file has one: the name may be another file's.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from dax_mp import mmu
from dax_mp.clients.file import DaxFile
from dax_mp.clients.handle import Handle

if TYPE_CHECKING:
    from dax_mp.clients.session import Session

T = TypeVar("T")


class NewFile:
    """name: what it is to be called. ephemeral: as of `Session.open`."""

    def __init__(self, session: "Session", name: str, ephemeral: bool = False) -> None:
        self._session = session
        self._name = name
        self._ephemeral = ephemeral
        self._file: DaxFile | None = None
        self._handle: Handle | None = None

    def make(self, fill: Callable[..., T], *args: Any) -> T:
        """Call `fill(file, *args)`, which links the file, and close the file. What raises leaves no name."""
        return mmu.settled(self._settle, self._make, fill, args)  # type: ignore[no-any-return]

    def _make(self, fill: Callable[..., T], args: tuple[Any, ...]) -> T:
        file = self._file = self._session.tmpfile(self._name, self._ephemeral)
        self._handle = file.handle
        return fill(file, *args)

    def _settle(self, failed: bool) -> None:
        if failed:
            self.take_back_name()
            self._handle = None
        if self._file is not None:
            self._file.forget()
            self._file = None
        if failed:
            self._session.channel.post_released()

    def take_back_name(self) -> None:
        """After an exception, also one that comes later. Does nothing where the file has no name, any more or yet."""
        if self._handle is not None:
            self._handle.unlink_quietly()
