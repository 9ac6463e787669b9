"""SIGTERM, SIGINT and SIGHUP: what they interrupt is chosen, never left to the moment.

From the first line of the daemon they are blocked. The start asks between its steps whether one is pending; the loop
lets them in, and each becomes a byte on a socket that it polls. So no signal ever lands between the making of a thing
and the note that it is there to be removed.

SIGHUP ends nothing: a coordinator outlives the terminal that it was started from, and opens its log again.
"""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_STOP: Final = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A signal asked for the end before the coordinator served."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} before it served")


class StopSignals:
    """The signals that this process acts on. A SIGINT that our parent had us ignore (a shell's &) stays ignored."""

    def __init__(self) -> None:
        self._stop = {
            number for number in _STOP if number is signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN
        }
        self._numbers = self._stop | {signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)

    def check(self) -> None:
        """Raises Stopped when one has come that ends this process."""
        pending = signal.sigpending() & self._stop
        if pending:
            raise Stopped(min(pending))

    @contextmanager
    def delivered_to_socket(self) -> Iterator[socket.socket]:
        """Let them in: each now writes its number to the socket, and does nothing else. Afterwards they are blocked."""
        reader, writer = socket.socketpair()
        with reader, writer:
            reader.setblocking(False)
            writer.setblocking(False)
            signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            for number in self._numbers:
                signal.signal(number, lambda _number, _frame: None)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)
            try:
                yield reader
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
                signal.set_wakeup_fd(-1)
