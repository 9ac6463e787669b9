"""Interrupts `Session.close` before each of its bytecodes, and looks what is left (test_interrupts.py).

    python interrupted_session.py ENDPOINT OPERATION STRIDE [START]

Of this process: descriptors and threads. At the coordinator: sessions, and their files.
"""

import gc
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final

import dax_mp
from interrupts import Interrupt, interrupt


def connect(endpoint: str) -> Callable[[], Any]:
    return lambda: dax_mp.connect(endpoint).close()


def close(endpoint: str) -> Callable[[], Any]:
    session = dax_mp.connect(endpoint)
    return session.close


OPERATIONS: Final = {"close": close}


def descriptors() -> dict[str, str]:
    """All but the one that reads them."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            pass
    return found


def left(endpoint: str, observer: dax_mp.Session) -> tuple[Any, ...]:
    sessions = observer.statfs().sessions, len(os.listdir(os.path.join(endpoint, "sessions")))
    return descriptors(), len(os.listdir("/proc/self/task")), sessions


def interrupted(operation: Callable[[], Any], at: int) -> tuple[bool, str]:
    """Was it, and where."""
    exception = Interrupt()
    try:
        there = interrupt(operation, at, exception)
    except Interrupt:
        there = True
    where = "".join(traceback.format_tb(exception.__traceback__))
    exception.__traceback__ = None
    return there, where


def main(endpoint: str, name: str, stride: int, at: int = 1) -> None:
    sys.unraisablehook = lambda unraisable: None  # what comes in a destructor is lost, as ever
    with dax_mp.connect(endpoint) as observer:
        connect(endpoint)()  # what is imported, and made once
        before = left(endpoint, observer)
        there = True
        while there:
            there, where = interrupted(OPERATIONS[name](endpoint), at)
            gc.collect()  # a session that has been made and not returned yet ends in its destructor
            if (after := left(endpoint, observer)) != before:
                raise SystemExit(f"{name!r} interrupted at {at}:\n{before}\n{after}\n{where}")
            at += stride
    print(at)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
