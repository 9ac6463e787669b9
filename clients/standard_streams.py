"""stdin, stdout and stderr as the shell has left them: closed, full, or with a reader that goes away.

A closed one (`<&-`) is opened for the other direction, so that its use is an error (EBADF) as that of a closed one is,
and its number is nobody else's: what is printed could go to a socket or a region otherwise. Python, which has no object
for a closed one, gets one.

An error of stdout is an OutputError, and BrokenPipeError where its reader has gone. What is still in its buffer then is
to be dropped, since Python would try again at its end and complain.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

STDIN: Final = 0
STDOUT: Final = 1
STDERR: Final = 2

_closed: Final[list[int]] = []
"""Those that the shell has closed."""


class OutputError(OSError):
    """stdout cannot be written to."""


@contextmanager
def output_errors() -> Iterator[None]:
    """An OSError in the block is an OutputError."""
    try:
        yield
    except (BrokenPipeError, BlockingIOError):
        raise
    except OSError as error:
        raise OutputError(error.errno, error.strerror, "stdout") from None


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        with output_errors():
            return super().write(data)


def prepare() -> None:
    """To be called once, before anything is opened or printed."""
    for fd in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(fd)
        except OSError:
            _open_null(fd, os.O_WRONLY if fd == STDIN else os.O_RDONLY)
            _closed.append(fd)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for good: print() takes stdout where it is None
    encoding = sys.stdout.encoding if sys.stdout is not None else "utf-8"
    raw = _Output(STDOUT, "w", closefd=False)
    buffered = io.BufferedWriter(raw)
    sys.stdout = io.TextIOWrapper(buffered, encoding, errors="backslashreplace", line_buffering=raw.isatty())


def silence_closed() -> None:
    """Before another program takes this process over: what was closed takes what it prints, and drops it."""
    for fd in _closed:
        _open_null(fd, os.O_RDWR)


def drop_output() -> None:
    """Throw away what is still to be written: it cannot be."""
    _open_null(STDOUT, os.O_WRONLY)


def _open_null(fd: int, flags: int) -> None:
    null = os.open(os.devnull, flags)
    if null != fd:
        os.dup2(null, fd)
        os.close(null)
    os.set_inheritable(fd, True)


def printable(text: str) -> str:
    """The text with its control characters escaped: what a terminal would obey is shown instead."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
