"""`dax-mp serve --daemonize`: a coordinator behind the command that started it.

The command forks before anything is locked or listened to, since both belong to the process that did it, and waits for
the one line of JSON that says whether the child serves (`--ready-fd`). The child has a session of its own, no terminal,
and no directory that it keeps from being unmounted.
"""

import argparse
import json
import os
import signal
import sys
from typing import Final

_EXIT_ERROR: Final = 1


def daemonize(options: argparse.Namespace) -> int | None:
    """In the child: None, with `options` as it is to serve. In the command: the exit code, when that is known."""
    for name in ("endpoint", "log"):
        if path := getattr(options, name):
            setattr(options, name, os.path.abspath(path))  # before the child is in another directory
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(writer)
        return _wait(reader, pid)
    os.close(reader)
    os.setsid()
    os.chdir("/")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    options.ready_fd = writer
    return None


def _wait(reader: int, pid: int) -> int:
    """Until the child serves, or does not. Ctrl-C ends both."""
    signal.signal(signal.SIGINT, lambda _number, _frame: os.kill(pid, signal.SIGTERM))
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.kill(pid, signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    with open(reader, "rb") as ready:
        said = ready.readline()
    answer = json.loads(said) if said else {"error": "the coordinator ended before it served"}
    if "error" in answer:
        print(f"dax-mp serve: {answer['error']}", file=sys.stderr)
        return _EXIT_ERROR
    print(f"serving at {answer['endpoint']} (pid {answer['pid']})")
    return 0
