"""The coordinator's log: a line for each event, as text or as JSON, by the standard library's logging.

The loop waits for nobody who reads it. A line goes out by one write(2), where the other end (a pipe, a terminal that is
stopped) has room for it, and no more than LINES_PER_S_MAX of them in a second; what does not go out is counted, and the
next line says how many are missing. A line is one line whatever a process calls itself.
"""

import json
import logging
import os
import select
import sys
import time
from typing import Final

from dax_mp.errors import os_error

STDERR: Final = "-"
LINES_PER_S_MAX: Final = 200
MESSAGE_CHARS_MAX: Final = 500
"""A line is shorter than what a pipe that is writable takes as a whole (PIPE_BUF, 4096 bytes)."""

logger: Final = logging.getLogger("dax_mp.coordinator")
logger.addHandler(logging.NullHandler())  # without any, logging would print warnings on stderr
logger.propagate = False
logger.setLevel(logging.CRITICAL)  # until there is a Log


def event(level: int, name: str, text: str, **fields: object) -> None:
    """Log it. name: what kind of event it is, one word. fields: what JSON has beside the text."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", text, extra={"event": name, "fields": fields})


def process_name(pid: int) -> str:
    """What the process calls itself, as the log has it: `python (pid 12)`."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as comm:
            name = comm.read().removesuffix(b"\n").decode(errors="replace")
    except OSError:
        return f"pid {pid}"
    return f"{name} (pid {pid})"


class Log(logging.Handler):
    """The handler of all of it. path: of the file, made where it is not there; STDERR: no file.

    Raises OSError where the file cannot be opened.
    """

    def __init__(self, path: str, level: str, *, as_json: bool) -> None:
        super().__init__()
        self._path = path if path == STDERR else os.path.abspath(path)
        self._fd = self._open()
        self._json = as_json
        self._missing = 0
        self._second = 0
        self._lines = 0
        logger.setLevel(level.upper())
        logger.addHandler(self)

    def reopen(self) -> None:
        """Go on in a new file of the same name, when the old one has been renamed (logrotate)."""
        if self._path == STDERR:
            return
        try:
            fd = self._open()
        except OSError as error:  # goes on in the old one
            event(logging.ERROR, "log", f"cannot open the log again: {error.strerror}: {self._path}")
            return
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)

    def emit(self, record: logging.LogRecord) -> None:
        if self._has_room():
            missing, self._missing = self._missing, 0
            line = self._as_json(record, missing) if self._json else self._as_text(record, missing)
            try:
                os.write(self._fd, line)
                return
            except OSError:  # nobody reads it, or the disk is full
                self._missing += missing
        self._missing += 1

    def close(self) -> None:
        logger.removeHandler(self)
        if self._path != STDERR and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()

    def _open(self) -> int:
        if self._path == STDERR:
            return sys.__stderr__.fileno() if sys.__stderr__ is not None else -1
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            return os.open(self._path, flags, 0o600)
        except OSError as error:
            raise os_error(error.errno or 0, f"cannot open the log: {error.strerror}", self._path) from None

    def _has_room(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        if self._fd < 0 or self._lines > LINES_PER_S_MAX:
            return False
        writable = select.poll()
        writable.register(self._fd, select.POLLOUT)
        return any(events & select.POLLOUT for _, events in writable.poll(0))

    def _as_text(self, record: logging.LogRecord, missing: int) -> bytes:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        lost = f"[{missing} lines are missing before this one] " if missing else ""
        message = record.getMessage()[:MESSAGE_CHARS_MAX]
        text = f"{stamp}.{int(record.msecs):03} {record.levelname.lower()}: {lost}{message}"
        printable = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
        return printable.encode(errors="backslashreplace") + b"\n"

    def _as_json(self, record: logging.LogRecord, missing: int) -> bytes:
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            "message": record.getMessage()[:MESSAGE_CHARS_MAX],
            **getattr(record, "fields", {}),
        }
        if missing:
            fields["missing_lines"] = missing
        return json.dumps(fields).encode() + b"\n"
