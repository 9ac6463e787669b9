"""A coordinator as tests start it: `python -m dax_mp.daemons.serve`, watched through its --ready-fd."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

START_TIMEOUT_S: Final = 60.0
END_TIMEOUT_S: Final = 60.0
WAIT_TIMEOUT_S: Final = 60.0


def serve_command(*options: str) -> list[str]:
    """The command that serves, with the package that this interpreter imports."""
    return [sys.executable, "-P", "-m", "dax_mp.daemons.serve", *options]


class CoordinatorProcess:
    """A coordinator that runs; or that has failed to, which `error` then says.

    error: what it writes to --ready-fd when it cannot serve ("error", "errno"), empty when it ends without a word;
    None when it serves.
    """

    def __init__(self, endpoint: str, *options: str) -> None:
        self.endpoint = endpoint
        reader, writer = os.pipe()
        ready_options = ("--endpoint", endpoint, "--ready-fd", str(writer), "--exit-with", str(os.getpid()))
        try:
            self.process = subprocess.Popen(
                serve_command(*ready_options, *options), pass_fds=[writer], stderr=subprocess.PIPE, text=True
            )
        finally:
            os.close(writer)
        self._ready = os.fdopen(reader, "rb")
        self.error: dict[str, Any] | None = {}

    def wait_ready(self) -> None:
        """Until it serves or says why it cannot."""
        with self._ready as ready:
            readable, _, _ = select.select([ready], [], [], START_TIMEOUT_S)
            assert readable, f"coordinator {self.pid} neither serves nor fails"
            answer = json.loads(ready.readline() or b"{}")
        self.error = None if answer.get("pid") == self.pid else answer

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def region_names(self) -> list[str]:
        """The paths of its regions, from its lock file."""
        with open(os.path.join(self.endpoint, "coordinator.lock"), encoding="utf-8") as lock:
            return ["/dev/shm" + name for name in json.load(lock)["region_names"]]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send the signal and wait. Returns the exit code, negative for a signal that killed it."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end. Returns the exit code."""
        _, self.stderr = self.process.communicate(timeout=END_TIMEOUT_S)
        return self.process.returncode

    def close(self) -> None:
        """End it where the test has not, and show what it wrote to stderr."""
        self._ready.close()
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self.end()
        sys.stderr.write(self.stderr)


def wait_until(condition: Callable[[], bool]) -> None:
    """For what makes no event that could be waited for: ask until it is so."""
    deadline_s = time.monotonic() + WAIT_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it is not so, and will not be"


class Serve(Protocol):
    """Starts a coordinator and waits until it serves or fails; the fixture of this name."""

    def __call__(self, *options: str, endpoint: str | None = None, size: str = "4MiB") -> CoordinatorProcess: ...
