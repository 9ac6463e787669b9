"""The command line as tests run it: real processes, at one endpoint."""

import os
import pty
import select
import shlex
import subprocess
import sys
import termios
from typing import Any, Final

import dax_mp
from coordinator_process import wait_until
from dax_mp.clients import cli_copy
from dax_mp.clients.launch import module_environment

TIMEOUT_S: Final = 60


class CommandLine:
    """dax-mp, at one endpoint."""

    def __init__(self, endpoint: str) -> None:
        self.environment = {**module_environment(), "DAX_MP_ENDPOINT": endpoint, "COLUMNS": "80"}

    def start(self, *arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "dax_mp", *arguments]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, **{"env": self.environment, **streams, **options})

    def run(self, *arguments: str, data: bytes | None = None) -> tuple[int, bytes, str]:
        """(exit code, stdout, stderr)."""
        with self.start(*arguments, stdin=subprocess.PIPE) as process:
            output, errors = process.communicate(data, TIMEOUT_S)
        return process.returncode, output, errors.decode()

    def succeed(self, *arguments: str, data: bytes | None = None) -> bytes:
        """stdout of a command that has nothing to complain about."""
        code, output, errors = self.run(*arguments, data=data)
        assert (code, errors) == (0, "")
        return output

    def fail(self, *arguments: str, code: int = 1, data: bytes | None = None) -> str:
        """The one line of a command that fails."""
        exit_code, output, errors = self.run(*arguments, data=data)
        assert (exit_code, output) == (code, b""), errors
        assert errors.startswith("dax-mp: ")
        assert errors.count("\n") == 1
        return errors

    def shell(self, line: str, *arguments: str) -> tuple[int, bytes, str]:
        """(exit code, stdout, stderr) of a line of bash, in which dax-mp is the command and $1 the first argument."""
        script = f'dax-mp() {{ {shlex.quote(sys.executable)} -P -m dax_mp "$@"; }}; {line}'
        command = ["bash", "-c", script, "bash", *arguments]
        done = subprocess.run(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr.decode()

    def on_a_terminal(self, *arguments: str, columns: int = 80) -> tuple[int, str]:
        """(exit code, what is shown)."""
        controller, terminal = pty.openpty()
        environment = {**self.environment, "TERM": "xterm"}
        environment.pop("COLUMNS")
        termios.tcsetwinsize(terminal, (24, columns))
        try:
            with self.start(*arguments, stdout=terminal, stderr=terminal, env=environment) as process:
                os.close(terminal)
                shown = read_terminal(controller)
        finally:
            os.close(controller)
        return process.returncode, shown.decode().replace("\r\n", "\n")


def read_terminal(controller: int) -> bytes:
    """All that is shown until the last process lets go of the terminal."""
    shown = b""
    while True:
        assert select.select([controller], [], [], TIMEOUT_S)[0]
        try:
            shown += os.read(controller, 65536)
        except OSError:  # EIO: nobody has it any more
            return shown


def begin(process: "subprocess.Popen[bytes]", session: dax_mp.Session) -> None:
    """Let a put of its stdin take some data, and then wait for more."""
    assert process.stdin is not None
    before_pages = session.statfs().pages_free
    process.stdin.write(bytes(cli_copy.PIECE_BYTES))
    process.stdin.flush()
    wait_until(lambda: session.statfs().pages_free < before_pages)
