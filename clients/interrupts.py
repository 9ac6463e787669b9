"""What Ctrl-C does to a command: KeyboardInterrupt while it works, so that it undoes what is half done.

Before and after that there is nothing to undo, and an exception would be a traceback: the process ends at once. Where a
shell has the process ignore SIGINT (a job in the background), it stays ignored.
"""

import os
import signal
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from types import FrameType

EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT, as a shell says it."""


def end_on_interrupt() -> None:
    """From here on Ctrl-C ends the process."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(_number: int, _frame: "FrameType | None") -> NoReturn:
    os._exit(EXIT_INTERRUPTED)
