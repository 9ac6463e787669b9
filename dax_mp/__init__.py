"""A DAX file system in user space, for many processes on one machine.

    import dax_mp

    with dax_mp.launch(size="16MiB") as daemon, dax_mp.connect(daemon.endpoint) as session:
        with session.open("data.bin", "w+") as file:
            file.truncate(1 << 30)
            mapping = file.mmap()
        mapping[4096:4101] = b"hello"
        mapping.close()

The modules of this package are the core: no I/O, no sockets, no processes. The names below are the client library's,
imported when they are first used: the coordinator, which needs only the core, does not load the clients.

In a checkout Python finds this directory first, without the C extension. The installed package is then imported in its
place: `python` in the checkout runs what `python` elsewhere runs.
"""

import importlib
import os
import sys
from os import SEEK_DATA, SEEK_HOLE

TYPE_CHECKING = False
"""True for type checkers, which know the name. typing's takes long to import, and Ctrl-C is a traceback until then."""

if TYPE_CHECKING:
    from dax_mp import errors
    from dax_mp.clients.arrays import ndarray
    from dax_mp.clients.bus_error import BusError, bus_errors, check
    from dax_mp.clients.file import DaxFile
    from dax_mp.clients.launch import Daemon, launch
    from dax_mp.clients.mapping import ACCESS_COPY, ACCESS_DEFAULT, ACCESS_READ, ACCESS_WRITE, Mapping
    from dax_mp.clients.page_table import PageTableEntry
    from dax_mp.clients.session import Session, connect
    from dax_mp.clients.shareable_list import ShareableList
    from dax_mp.clients.shared_memory import SharedMemory
    from dax_mp.clients.shared_memory_manager import SharedMemoryManager
    from dax_mp.clients.shared_session import shared_session
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
    "bus_errors",
    "check",
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
    "bus_errors": "clients.bus_error",
    "check": "clients.bus_error",
    "connect": "clients.session",
    "launch": "clients.launch",
    "ndarray": "clients.arrays",
    "shared_session": "clients.shared_session",
}


def _replace_by_the_installed() -> None:
    """Have the import statement give the installed package, where this is a checkout and nothing is built in it.

    Raises ImportError, which says what to do, where none is installed.
    """
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    def is_built(package: str) -> bool:
        return PathFinder.find_spec("_mmu", [os.path.join(package, "mmu")]) is not None

    here = os.path.dirname(os.path.abspath(__file__))
    if is_built(here):
        return  # an editable installation
    for entry in sys.path:
        spec = PathFinder.find_spec(__name__, [entry])
        if spec is not None and spec.loader is not None and spec.origin and is_built(os.path.dirname(spec.origin)):
            module = module_from_spec(spec)
            sys.modules[__name__] = module  # import gives what is here in the end
            spec.loader.exec_module(module)
            return
    root = os.path.dirname(here)
    raise ImportError(
        f"dax_mp is not installed for this Python ({sys.executable}), and {root} is a checkout, in which its C "
        f"extension is not built. Run `make demo` there, which sets up {root}/.venv/bin/python; or `pip install {root}`"
    )


if os.path.exists(os.path.join(os.path.dirname(__file__), "mmu", "mmu.h")):  # the sources of C: not in a wheel
    _replace_by_the_installed()

if not TYPE_CHECKING:  # a type checker would let any name pass

    def __getattr__(name):
        if name == "errors":
            return importlib.import_module("dax_mp.errors")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"dax_mp.{_MODULES[name]}"), name)
        globals()[name] = value  # the next use finds it without coming here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
