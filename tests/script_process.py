"""A Python process that runs a test's text, in step with the test: it prints lines, and reads lines from stdin."""

import os
import signal
import subprocess
import sys
from typing import Final, Protocol

from dax_mp.clients.launch import module_environment

END_TIMEOUT_S: Final = 60.0


class ScriptProcess:
    """Runs `text` with `arguments` in sys.argv[1:]; in development mode, so that what it does not close is seen."""

    def __init__(self, text: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-X", "dev", "-c", text, *arguments],
            env=module_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        """The next line that it prints; empty when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def go_on(self, line: str = "") -> None:
        """Let its next `input()` return."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Stop every thread of it; they go on when `resume` is called."""
        self.process.send_signal(signal.SIGSTOP)
        # The signal alone stops the thread that it is delivered to first: the others run on until that one has run.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: (exit code, the rest of stdout, stderr)."""
        output, errors = self.process.communicate(timeout=END_TIMEOUT_S)
        return self.process.returncode, output, errors

    def close(self) -> None:
        """Kill it where it still runs, with the children that it has forked."""
        if self.process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.communicate()


class Script(Protocol):
    """Starts a script; the fixture of this name."""

    def __call__(self, text: str, *arguments: str) -> ScriptProcess: ...
