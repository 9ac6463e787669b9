"""What Ctrl-C does to a command: KeyboardInterrupt while it works, so that it undoes what is half done.

Before and after that there is nothing to undo, and an exception would be a traceback: the process ends at once. Where a
shell has the process ignore SIGINT (a job in the background), it stays ignored.

`_signal` is what `signal` is made of, and is there without any import that takes time.
"""

import _signal  # type: ignore[import-not-found]
import os

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as a shell says it."""


def end_on_interrupt() -> None:
    """From here on Ctrl-C ends the process."""
    _set_handler(lambda _number, _frame: os._exit(EXIT_INTERRUPTED))


def raise_on_interrupt() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt."""
    _set_handler(_signal.default_int_handler)


def _set_handler(handler: object) -> None:
    if _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
        _signal.signal(_signal.SIGINT, handler)
