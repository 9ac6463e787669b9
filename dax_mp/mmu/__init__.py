"""The client's MMU: windows of address space, the fault handler and the pager thread, in C.

| file | concept |
|---|---|
| `fault.c` | the handler of SIGSEGV and SIGBUS: posts a fault and sleeps until it is answered |
| `userfaultfd.c`, `verdict.c` | the second way for faults to arrive; how a sleeping thread learns that one failed |
| `fault_queue.c` | faults on their way to the pager's thread, and answers on their way back |
| `pager.c`, `orders.c` | the pager's thread; what the coordinator orders it to map and unmap |
| `window.c`, `window_table.c` | address space; how the handler finds a window without a lock |
| `closed.c` | the address space of windows that are closed, which pointers may still point into |
| `protection.c` | mprotect(2) for windows |
| `translations.c`, `private.c` | what is mapped in a window; copies of pages of private ones |
| `guard.c` | accesses that can be left: those of the mappings' own methods |
| `scratch.c`, `bus_error.c` | an access that has nothing to map: a page to end on, an exception |
| `io.c` | long reads and writes |
| `interpose.c` | our functions in the place of the libc's, in a process that runs already |
| `buffers.c`, `system_calls.c`, `sockets.c`, `stdio.c` | system calls whose buffers lie in windows |
| `memory_calls.c` | mprotect of windows |
| `wire.c`, `zmtp.c`, `thread.c` | the few msgpack messages of the pager channel; the ZeroMQ connection; threads |
| `brackets.c` | calls whose beginning and end no exception of a signal handler comes between |
| `watch.c` | who gets the failed accesses of threads that are not Python's |
| `module.c`, `pager_type.c`, `bus_errors_type.c` | what Python sees |
| `window_type.c`, `window_access.c`, `window_items.c`, `window_ranges.c` | its windows |

One fault, in order: `fault.c` (posts it), `fault_queue.c` (sends Fault), `orders.c` (receives Map), `translations.c`
(mmap(MAP_FIXED) over the window), `fault.c` (the thread wakes and its instruction runs again). `mmu.h` says who may do
what, and in which order locks are taken.
"""

from dax_mp.mmu._mmu import (
    BusErrors,
    Pager,
    Window,
    borrowed,
    check,
    claim_signals,
    interpose_system_calls,
    keep_forever,
    locked,
    marked,
    postponed,
    release_signals,
    set_bus_error,
    settled,
    take_bus_error,
)

__all__ = [
    "BusErrors",
    "Pager",
    "Window",
    "borrowed",
    "check",
    "claim_signals",
    "interpose_system_calls",
    "keep_forever",
    "locked",
    "marked",
    "postponed",
    "release_signals",
    "set_bus_error",
    "settled",
    "take_bus_error",
]
