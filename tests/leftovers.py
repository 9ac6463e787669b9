"""What a test run leaves behind: processes, objects in /dev/shm, files.

The run, its workers and all they start carry one mark in their environment and keep their files in one directory. So
what is left at the end can be told from what others do on the machine.
"""

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

MARK: Final = "DAX_MP_TEST_ROOT"
"""The environment variable: its value is the run's directory."""
GRACE_S: Final = 10.0
"""How long what is about to go may take to be gone."""


def left_behind(root: str, shared_memory_before: set[str]) -> list[str]:
    """One line for each thing that is left. Of these, the processes are killed, and their shared memory is removed.

    root: the run's directory. shared_memory_before: `unused_shared_memory` before the run.
    """
    deadline_s = time.monotonic() + GRACE_S
    while (processes := _marked_processes(root)) and time.monotonic() < deadline_s:
        _wait_for_an_end(processes, deadline_s - time.monotonic())
    # Another run on this machine may be about to sweep up after a coordinator that it has killed.
    while (shared_memory := unused_shared_memory() - shared_memory_before) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    lines = [f"process {pid}: {command}" for pid, command in processes.items()]
    lines += [str(path) for path in Path(root).rglob("*") if not _belongs_there(path.relative_to(root))]
    lines += sorted(shared_memory)
    for pid in processes:
        _kill(pid)
    return lines


def _kill(pid: int) -> None:
    opened = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    os.kill(pid, signal.SIGKILL)
    for path in opened & {str(path) for path in Path("/dev/shm").iterdir()}:
        os.unlink(path)


def unused_shared_memory() -> set[str]:
    """Our user's objects in /dev/shm that no process has open or mapped: nobody is going to remove them."""
    names = {str(path) for path in Path("/dev/shm").iterdir() if path.lstat().st_uid == os.geteuid()}
    for process in _processes():
        if names:
            try:
                names -= {os.readlink(fd) for fd in (process / "fd").iterdir()}
                names -= {line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()}
            except OSError:  # it has ended, or is another user's
                continue
    return names


def _processes() -> Iterator[Path]:
    return (path for path in Path("/proc").iterdir() if path.name.isdigit())


def _marked_processes(root: str) -> dict[int, str]:
    """The command lines, by pid, of the processes that were started with our mark."""
    mark = f"{MARK}={root}\0".encode()
    found = {}
    for process in _processes():
        try:
            if mark in (process / "environ").read_bytes():
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(process.name)] = command.decode(errors="replace")
        except OSError:
            continue
    return found


def _wait_for_an_end(pids: dict[int, str], timeout_s: float) -> None:
    ends = select.poll()
    with _pidfds(pids) as pidfds:
        for pidfd in pidfds:
            ends.register(pidfd, select.POLLIN)
        if len(pidfds) == len(pids):  # none has ended since we looked
            ends.poll(timeout_s * 1000)


@contextmanager
def _pidfds(pids: dict[int, str]) -> Iterator[list[int]]:
    opened: list[int] = []
    try:
        for pid in pids:
            try:
                opened.append(os.pidfd_open(pid))
            except ProcessLookupError:
                continue
        yield opened
    finally:
        for pidfd in opened:
            os.close(pidfd)


def _belongs_there(path: Path) -> bool:
    """The runtime directory, and what pytest itself keeps for tmp_path."""
    return path == Path("runtime") or path.parts[0].startswith("pytest-of-")
