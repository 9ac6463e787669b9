"""What the scenarios of the native part have in common: a pager at a coordinator of a few lines, and helpers."""

import mmap
import os
import secrets
import threading
from collections.abc import Callable
from typing import Any, Final, cast

import numpy as np
import posix_ipc

from dax_mp import messages, mmu
from mmu_coordinator import Coordinator

PAGE: Final = mmap.PAGESIZE
TIMEOUT_MS: Final = 30_000
VMA: Final = 7
FAULTS: Final = os.environ.get("DAX_MP_FAULTS", "signals")


class BusError(OSError):
    """As the client library's: it asks the native side what happened."""

    def __init__(self) -> None:
        code, self.window, self.offset_bytes = mmu.take_bus_error() or (0, None, -1)
        super().__init__(code, os.strerror(code))


class Rig:
    """A coordinator, a region and a pager."""

    def __init__(self, endpoint: str, region_bytes: int = 1 << 20) -> None:
        mmu.set_bus_error(BusError)
        self.coordinator = Coordinator(endpoint)
        region = posix_ipc.SharedMemory(f"/mmu-{secrets.token_hex(8)}", posix_ipc.O_CREX, size=PAGE + region_bytes)
        region.unlink()
        self.region_fd: int = region.fd
        self.region = mmap.mmap(region.fd, region_bytes, offset=PAGE)
        """From frame 1 on: frame 0 is no page's."""
        self.pager = self.new_pager()

    def new_pager(self, **arguments: Any) -> mmu.Pager:
        return mmu.Pager(
            **{
                "path": self.coordinator.endpoint.removeprefix("ipc://"),
                "token": secrets.token_bytes(messages.TOKEN_BYTES),
                "version": messages.PROTOCOL_VERSION,
                "pmem_fd": self.region_fd,
                "dram_fd": -1,
                "timeout_ms": TIMEOUT_MS,
                "sigbus": False,
                "userfaultfd": FAULTS == "userfaultfd",
                "answer_timeout_ms": -1,
                **arguments,
            }
        )

    def window(self, pages: int = 64, *, pgoff: int = 0, vma_id: int = VMA, writable: bool = True) -> mmu.Window:
        return mmu.Window(self.pager, vma_id, pgoff, pages * PAGE, writable)

    def close(self) -> None:
        self.pager.close()
        self.region.close()
        os.close(self.region_fd)
        self.coordinator.close()


Scenario = Callable[[Rig], None]
SCENARIOS: Final[dict[str, Scenario]] = {}
FORKS: Final[set[str]] = set()
"""The scenarios in which a process with a pager's thread forks."""
ADDRESS_SPACE: Final[set[str]] = set()
"""The scenarios that use up the mappings or the address space of the process."""


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def forks(function: Scenario) -> Scenario:
    FORKS.add(function.__name__)
    return function


def address_space(function: Scenario) -> Scenario:
    ADDRESS_SPACE.add(function.__name__)
    return function


def settle() -> None:
    """The interpreter looks for asynchronous exceptions when a function is entered."""


def failure_of(access: Callable[[], object]) -> BusError:
    """The BusError that an access raises, at once or at the next bytecode."""
    try:
        access()
        settle()
    except BusError as error:
        return error
    raise AssertionError("no BusError")


def array_of(window: mmu.Window) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return np.frombuffer(cast(Any, window), dtype=np.uint8)


def in_thread(function: Callable[[], object]) -> object:
    """What the function returns, in a thread of its own."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    assert results, "it raised"
    return results[0]
