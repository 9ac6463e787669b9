"""The client's MMU: windows of address space, the fault handler and the pager thread, in C.

One fault, in order: `fault.c` (the signal handler posts it and sleeps), `pager.c` (sends Fault, receives Map),
`window.c` (mmap(MAP_FIXED) over the window), `fault.c` (the thread wakes and its instruction runs again). Where there
is nothing to map, `bus_error.c` makes an exception of it. `wire.c` reads and writes the few msgpack messages of the
pager channel, and `zmtp.c` is the ZeroMQ connection under it. What Python sees is in `module.c`, `pager_type.c` and
`window_type.c`. `mmu.h` says who may do what, and in which order locks are taken.
"""

from dax_mp.mmu._mmu import (
    Pager,
    Window,
    claim_signals,
    keep_forever,
    release_signals,
    set_bus_error,
    take_bus_error,
)

__all__ = [
    "Pager",
    "Window",
    "claim_signals",
    "keep_forever",
    "release_signals",
    "set_bus_error",
    "take_bus_error",
]
