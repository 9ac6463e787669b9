"""The command line's streams, signals and terminal: closed, full, narrow, interrupted; never a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import dax_mp
from command_line import TIMEOUT_S, CommandLine


@pytest.fixture
def command(command: CommandLine, session: dax_mp.Session) -> CommandLine:
    """With one file, `file`."""
    with session.open("file", "w") as file:
        file.write(b"content\n")
        file.setxattr("user.x", b"value")
    return command


PRINTING: Final = ("ls", "stat file", "df --json", "cat file", "xattr get file user.x", "--help", "completion bash")


@pytest.mark.parametrize("arguments", PRINTING)
def test_closed_or_full_stdout_is_one_line(command: CommandLine, arguments: str) -> None:
    closed = command.shell(f"dax-mp {arguments} >&-")
    assert closed == (1, b"", "dax-mp: stdout: Bad file descriptor\n")
    full = command.shell(f"dax-mp {arguments} > /dev/full")
    assert full == (1, b"", "dax-mp: stdout: No space left on device\n")
    assert command.shell(f"dax-mp {arguments} | head -0") == (0, b"", "")


def test_closed_stdin_and_stderr(command: CommandLine, session: dax_mp.Session) -> None:
    assert command.shell("dax-mp put - other <&-") == (1, b"", "dax-mp: stdin: Bad file descriptor\n")
    assert command.shell("dax-mp cat file <&-") == (0, b"content\n", "")
    assert command.shell("dax-mp cat file missing 2>&-")[:2] == (1, b"content\n")
    assert command.shell("dax-mp stat missing 2>/dev/full") == (1, b"", "")
    assert command.shell("dax-mp stat missing <&- >&- 2>&-") == (1, b"", "")
    assert command.shell("dax-mp touch new <&- >&- 2>&-") == (0, b"", "")
    assert session.listdir() == ["file", "new"]


def test_serve_with_closed_streams(command: CommandLine, endpoint: str) -> None:
    line = 'exec "$1" -P -m dax_mp serve --size 4MiB --endpoint "$2" <&- >&- 2>&-'
    with subprocess.Popen(["bash", "-c", line, "bash", sys.executable, endpoint], env=command.environment) as process:
        while command.run("ls", "--endpoint", endpoint)[0]:
            assert process.poll() is None
        process.terminate()
    assert process.returncode == 0


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def interrupt(process: "subprocess.Popen[bytes]") -> None:
    """SIGINT, and what it is to lead to: 130, and nothing to read."""
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, errors.strip()) == (130, b"")


@pytest.mark.parametrize("name", ["put", "get", "cat"])
def test_ctrl_c_in_a_copy_that_waits_leaves_nothing(
    command: CommandLine, session: dax_mp.Session, tmp_path: Path, name: str
) -> None:
    with session.open("file", "w") as file:
        file.write(bytes(1 << 20))
    if name == "put":
        with command.start("put", "-", "other", stdin=subprocess.PIPE) as process:
            while session.listdir() == ["file"] and session.statfs().files == 1:
                pass  # it has begun
            interrupt(process)
    elif name == "get":
        os.mkfifo(tmp_path / "fifo")
        fifo = str(tmp_path / "fifo")
        with command.start("get", "file", fifo) as process, open(fifo, "rb") as stream:
            stream.read(1)
            interrupt(process)
        assert os.listdir(tmp_path) == ["fifo"]
    else:
        with command.start("cat", "file") as process:
            assert process.stdout is not None
            os.read(process.stdout.fileno(), 1)
            interrupt(process)
    assert session.listdir() == ["file"]


STOPPED: Final = ("put /dev/null x", "get file -", "cp file x", "rm file", "truncate file 1", "ls", "df")


@pytest.mark.parametrize("arguments", STOPPED)
def test_ctrl_c_ends_a_command_whose_coordinator_is_stopped(endpoint: str, arguments: str) -> None:
    with dax_mp.launch("4MiB", endpoint=endpoint) as daemon:
        command = CommandLine(endpoint)
        command.succeed("put", "/dev/null", "file")
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            with command.start(*arguments.split()) as process:
                sessions = Path(endpoint, "sessions")
                while not any(sessions.iterdir()):
                    assert process.poll() is None  # it asks for a session
                interrupt(process)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        with dax_mp.connect(endpoint) as session:
            assert session.listdir() == ["file"]
