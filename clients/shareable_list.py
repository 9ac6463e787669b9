"""ShareableList of the standard library, over this library's SharedMemory.

The list's format and methods are the standard library's own: only where it makes its memory differs. Its constructor
takes `SharedMemory` from the globals of its module, so it is run with globals in which that name is ours.
"""

import multiprocessing.shared_memory
import os
from collections.abc import Iterable
from functools import partial
from types import FunctionType
from typing import Any, Generic, TypeVar, cast

from dax_mp import mmu
from dax_mp.clients.session import Session
from dax_mp.clients.shared_memory import SharedMemory
from dax_mp.clients.shared_session import shared_session

T = TypeVar("T", int, float, bool, str, bytes, None)

_theirs = multiprocessing.shared_memory.ShareableList


def _init_with(shared_memory: Any) -> Any:
    """The standard library's constructor, with this in the place of its SharedMemory."""
    original = _theirs.__init__
    scope = {**vars(multiprocessing.shared_memory), "SharedMemory": shared_memory}
    copy = FunctionType(original.__code__, scope, original.__name__, original.__defaults__, original.__closure__)
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


class ShareableList(_theirs[T], Generic[T]):
    """multiprocessing.shared_memory.ShareableList over `SharedMemory`.

    session, endpoint, ephemeral: as of SharedMemory.

        >>> numbers = dax_mp.ShareableList([1, 2.5, "three", None], session=session)
        >>> numbers[2]
        'three'
        >>> other = dax_mp.ShareableList(name=numbers.shm.name, session=session)
        >>> other[0] = 7
        >>> numbers[0], len(numbers)
        (7, 4)
        >>> other.shm.close(); numbers.shm.close(); numbers.shm.unlink()
    """

    def __init__(
        self,
        sequence: Iterable[T] | None = None,
        *,
        name: str | None = None,
        session: Session | None = None,
        endpoint: str | os.PathLike[str] | None = None,
        ephemeral: bool = False,
    ) -> None:
        session = shared_session(endpoint) if session is None else session

        memory = SharedMemory.__new__(SharedMemory)  # there before it has anything

        def shared_memory(name: str | None = None, create: bool = False, size: int = 0) -> SharedMemory:
            SharedMemory.__init__(memory, name, create, size, session=session, ephemeral=ephemeral)
            return memory

        def settle(failed: bool) -> None:
            if failed and hasattr(memory, "_made"):  # a value that cannot be stored, say: nobody would ever unlink it
                memory.take_back()

        mmu.settled(settle, partial(_init_with(shared_memory), self, sequence, name=name))

    def __reduce__(self) -> Any:
        shared_memory = cast(SharedMemory, self.shm)  # typed as the standard library's
        return _attach, (type(self), shared_memory.session, shared_memory.name)


def _attach(cls: "type[ShareableList[Any]]", session: Session, name: str) -> "ShareableList[Any]":
    return cls(name=name, session=session)
