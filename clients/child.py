"""A process that runs a function of this package, spoken to over a pair of sockets: a demo actor, a stress worker.

A real process in every respect: started afresh (no fork of ours), with a session of its own. It is in a process group
of its own, so that Ctrl-C is for its parent, who ends it. When the parent is gone, it sees the end of the connection.
"""

import importlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from dax_mp.clients.launch import module_command, module_environment


class ChildError(Exception):
    """The process has ended, hangs, or has failed; the text says which."""


class Child:
    """A process that calls `module`'s main(connection, arguments), with the connection to this object.

    name: for messages. pass_fds: stay open in it, with their numbers.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str] = (), pass_fds: Sequence[int] = ()) -> None:
        self.name = name
        self.connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                module_command("dax_mp.clients.child", str(theirs.fileno()), module, *arguments),
                env=module_environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *pass_fds],
                process_group=0,
            )
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: object) -> None:
        """Raises ChildError when it has ended."""
        try:
            self.connection.send(message)
        except OSError:
            raise ChildError(self.epitaph()) from None

    def receive(self, timeout_s: float) -> Any:
        """The next message of it. Raises ChildError when it has ended, or has said nothing for `timeout_s`."""
        try:
            if not self.connection.poll(timeout_s):
                raise ChildError(f"{self.name} (pid {self.pid}) has not answered for {timeout_s:g} s")
            return self.connection.recv()
        except (EOFError, OSError):
            raise ChildError(self.epitaph()) from None

    def epitaph(self) -> str:
        """How it ended. Precondition: its connection has ended, so it is about to."""
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self.name} (pid {self.pid}) {how}"

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it, whatever it does. May be called again."""
        self.kill()
        self.connection.close()


if __name__ == "__main__":
    importlib.import_module(sys.argv[2]).main(Connection(int(sys.argv[1])), sys.argv[3:])
