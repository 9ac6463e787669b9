"""Exceptions between any two bytecodes, as a signal handler raises them: at the n-th of an operation, for every n."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupt(BaseException):
    """What nobody catches who does not mean to."""


def interrupt(operation: Callable[[], Any], at: int, exception: BaseException, module: str = "") -> bool:
    """Run the operation, and raise the exception in it before its `at`-th bytecode, in whatever function that is.

    module: count those of functions of modules whose names begin so. Returns False where it has fewer bytecodes: it
    has run to its end then. Raises what the operation raises, the exception included.
    """
    count = 0

    def in_frame(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if event == "opcode":
            count += 1
            if count == at:
                raise exception
        return in_frame

    def on_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith(module):
            return None
        frame.f_trace_opcodes = True
        return in_frame

    sys.settrace(on_call)
    try:
        operation()
    finally:
        sys.settrace(None)
    return count >= at
