"""A DAX file system in user space, for many processes on one machine.

    import dax_mp

    with dax_mp.launch(size="256MiB") as daemon, dax_mp.connect(daemon.endpoint) as session:
        with session.open("data.bin", "w+") as file:
            file.truncate(1 << 30)
            mapping = file.mmap()
        mapping[4096:4101] = b"hello"
        mapping.close()

The modules of this package are the core: no I/O, no sockets, no processes. The names below are the client library's,
imported when they are first used: the coordinator, which needs only the core, does not load the clients.
"""

import importlib
from os import SEEK_DATA, SEEK_HOLE
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dax_mp import errors
    from dax_mp.clients.arrays import ndarray
    from dax_mp.clients.bus_error import BusError
    from dax_mp.clients.file import DaxFile
    from dax_mp.clients.launch import Daemon, launch
    from dax_mp.clients.mapping import ACCESS_COPY, ACCESS_DEFAULT, ACCESS_READ, ACCESS_WRITE, Mapping
    from dax_mp.clients.page_table import PageTableEntry
    from dax_mp.clients.session import Session, connect, shared_session
    from dax_mp.clients.shareable_list import ShareableList
    from dax_mp.clients.shared_memory import SharedMemory
    from dax_mp.clients.shared_memory_manager import SharedMemoryManager
    from dax_mp.clients.status import DeviceStat, Extent, FileStat, MappedRange, Mapper, VmaMaps

__version__ = "0.1.0"

__all__ = [
    "ACCESS_COPY",
    "ACCESS_DEFAULT",
    "ACCESS_READ",
    "ACCESS_WRITE",
    "SEEK_DATA",
    "SEEK_HOLE",
    "BusError",
    "Daemon",
    "DaxFile",
    "DeviceStat",
    "Extent",
    "FileStat",
    "MappedRange",
    "Mapper",
    "Mapping",
    "PageTableEntry",
    "Session",
    "ShareableList",
    "SharedMemory",
    "SharedMemoryManager",
    "VmaMaps",
    "__version__",
    "connect",
    "errors",
    "launch",
    "ndarray",
    "shared_session",
]

_MODULES = {
    "ACCESS_COPY": "clients.mapping",
    "ACCESS_DEFAULT": "clients.mapping",
    "ACCESS_READ": "clients.mapping",
    "ACCESS_WRITE": "clients.mapping",
    "BusError": "clients.bus_error",
    "Daemon": "clients.launch",
    "DaxFile": "clients.file",
    "DeviceStat": "clients.status",
    "Extent": "clients.status",
    "FileStat": "clients.status",
    "MappedRange": "clients.status",
    "Mapper": "clients.status",
    "Mapping": "clients.mapping",
    "PageTableEntry": "clients.page_table",
    "Session": "clients.session",
    "ShareableList": "clients.shareable_list",
    "SharedMemory": "clients.shared_memory",
    "SharedMemoryManager": "clients.shared_memory_manager",
    "VmaMaps": "clients.status",
    "connect": "clients.session",
    "launch": "clients.launch",
    "ndarray": "clients.arrays",
    "shared_session": "clients.session",
}

if not TYPE_CHECKING:  # a type checker would let any name pass

    def __getattr__(name: str) -> Any:
        if name == "errors":
            return importlib.import_module("dax_mp.errors")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"dax_mp.{_MODULES[name]}"), name)
        globals()[name] = value  # the next use finds it without coming here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
