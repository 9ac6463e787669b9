"""The command line, run as users run it: its output, its exit codes, and one line for what goes wrong."""

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import dax_mp
from dax_mp.clients import cli, cli_copy
from dax_mp.clients.launch import module_environment
from script_process import Script

PAGE: Final = os.sysconf("SC_PAGESIZE")
TIMEOUT_S: Final = 60


class CommandLine:
    """dax-mp, at one endpoint."""

    def __init__(self, endpoint: str) -> None:
        self.environment = {**module_environment(), "DAX_MP_ENDPOINT": endpoint, "COLUMNS": "80"}

    def start(self, *arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "dax_mp.clients.cli", *arguments]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=self.environment, **{**streams, **options})

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


@pytest.fixture
def command(session: dax_mp.Session) -> CommandLine:
    """At the coordinator of `session`, which has no file at first."""
    return CommandLine(session.endpoint)


@pytest.fixture
def sparse_path(tmp_path: Path) -> Path:
    """A real file with data at both ends of a hole, and a hole at its end."""
    path = tmp_path / "sparse"
    with open(path, "wb") as stream:
        stream.write(random.Random(1).randbytes(2 * PAGE + 5))
        stream.seek(3 << 20)
        stream.write(random.Random(2).randbytes((1 << 20) + PAGE + 77))
        stream.truncate((6 << 20) + 123)
    return path


# --- put and get ------------------------------------------------------------------------------------------------------


def test_put_and_get_keep_holes(command: CommandLine, session: dax_mp.Session, sparse_path: Path) -> None:
    assert command.succeed("put", str(sparse_path)) == b""
    stat = session.stat("sparse")
    assert stat.size_bytes == sparse_path.stat().st_size
    assert stat.blocks * PAGE <= sparse_path.stat().st_blocks * 512
    with session.open("sparse") as file:
        assert file.readall() == sparse_path.read_bytes()
        assert file.seek(3 * PAGE, dax_mp.SEEK_DATA) == 3 << 20
    copy = sparse_path.with_name("copy")
    command.succeed("get", "sparse", str(copy))
    assert copy.read_bytes() == sparse_path.read_bytes()
    assert copy.stat().st_blocks <= sparse_path.stat().st_blocks + 2 * PAGE // 512
    assert sorted(os.listdir(copy.parent)) == ["copy", "sparse"]
    assert session.listdir() == ["sparse"]


def test_put_and_get_an_empty_file_and_one_hole(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    for size in (0, 1, 40 << 20):
        with open(tmp_path / "file", "wb") as stream:
            stream.truncate(size)
        command.succeed("put", str(tmp_path / "file"))
        assert (session.stat("file").size_bytes, session.stat("file").blocks) == (size, 0)
        command.succeed("get", "file", str(tmp_path / "back"))
        assert (tmp_path / "back").stat().st_size == size
        assert (tmp_path / "back").stat().st_blocks == 0


def test_streams(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    data = random.Random(3).randbytes((2 << 20) + 99)
    command.succeed("put", "-", "streamed", data=data)
    assert command.succeed("get", "streamed", "-") == data
    assert "put - NAME" in command.fail("put", "-", code=2, data=b"")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with command.start("get", "streamed", str(fifo)) as process:
        assert fifo.read_bytes() == data
    assert process.returncode == 0
    assert fifo.is_fifo()
    command.succeed("put", "/proc/self/stat", "proc")  # a file that says it is empty
    assert session.stat("proc").size_bytes > 10


def test_put_replaces_and_leaves_what_is_mapped(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"new")
    with session.open("file", "w+") as file:
        file.write(b"old content")
        mapping = file.mmap()
    command.succeed("put", str(tmp_path / "file"))
    assert mapping[:3] == b"old"
    with session.open("file") as file:
        assert file.readall() == b"new"


def test_get_replaces_at_once(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    """Through a link, and keeping the mode of what was there."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    with session.open("file", "w") as file:
        file.write(b"new")
    with open(target, "rb") as before:
        command.succeed("get", "file", str(link))
        assert before.read() == b"old"
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    command.succeed("get", "file", str(tmp_path))
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_copy_that_fails_leaves_nothing(session: dax_mp.Session, tmp_path: Path) -> None:
    with dax_mp.launch("4MiB") as daemon, dax_mp.connect(daemon.endpoint) as small:
        command = CommandLine(daemon.endpoint)
        (tmp_path / "large").write_bytes(bytes(5 << 20))
        assert "No space left" in command.fail("put", str(tmp_path / "large"))
        assert small.listdir() == []
        assert small.statfs().pages_free == small.statfs().pages
        (tmp_path / "small").write_bytes(b"fits")
        command.succeed("put", str(tmp_path / "small"))
        command.fail("get", "small", str(tmp_path / "missing" / "file"))
        command.fail("get", "small", "/proc/version")
        command.fail("put", str(tmp_path))
        command.fail("put", str(tmp_path / "nothing"))
        command.fail("put", str(tmp_path / "small"), "a/b", code=2)
        assert small.listdir() == ["small"]
    assert sorted(os.listdir(tmp_path)) == ["large", "small"]


def test_a_long_copy_shows_its_progress_on_a_terminal(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with open(tmp_path / "long", "wb") as stream:
        stream.write(b"x" * (16 << 20))
        stream.truncate(cli_copy.LONG_BYTES)
    controller, terminal = pty.openpty()
    try:
        with command.start("put", str(tmp_path / "long"), stderr=terminal) as process:
            os.close(terminal)
            shown = read_terminal(controller)
    finally:
        os.close(controller)
    assert process.returncode == 0
    assert b"put" in shown
    assert b"64" in shown
    assert command.run("put", str(tmp_path / "long"))[2] == ""


def read_terminal(controller: int) -> bytes:
    """All that is shown until the last process lets go of the terminal."""
    shown = b""
    while True:
        assert select.select([controller], [], [], TIMEOUT_S)[0]
        try:
            shown += os.read(controller, 65536)
        except OSError:  # EIO: nobody has it any more
            return shown


# --- what is there ----------------------------------------------------------------------------------------------------


def test_ls(command: CommandLine, session: dax_mp.Session) -> None:
    assert json.loads(command.succeed("ls", "--json")) == []
    command.succeed("ls")
    names = ["[red]plain", "b" * 200, "ä"]
    for name in names:
        with session.open(name, "w") as file:
            file.write(b"x")
            file.truncate(10 << 20)
    listed = json.loads(command.succeed("ls", "--json"))
    assert [entry["name"] for entry in listed] == sorted(names)
    assert [(entry["size_bytes"], entry["blocks"], entry["mappers"]) for entry in listed] == [(10 << 20, 1, [])] * 3
    lines = command.succeed("ls").decode().splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", *sorted(names)]
    assert lines[1].split()[1:] == ["10MiB", "4KiB" if PAGE == 4096 else f"{PAGE // 1024}KiB", "0"]


MAPPER: Final = """
import dax_mp, sys
with dax_mp.connect(sys.argv[1]) as session, session.open("file", "r+") as file:
    with file.mmap(access=dax_mp.ACCESS_READ) as one, file.mmap(offset=4 * session.page_size) as other:
        other[0] = 1
        print(one[4 * session.page_size], flush=True)
        input()
"""


def test_stat_and_maps(command: CommandLine, session: dax_mp.Session, script: Script) -> None:
    with session.open("file", "w+") as file:
        file.truncate(16 * PAGE)
        assert json.loads(command.succeed("maps", "file", "--json")) == []
        assert command.succeed("maps", "file").split()[:2] == [b"PID", b"VMA"]
        assert "nobody" in command.succeed("stat", "file").decode()
        other = script(MAPPER, session.endpoint)
        assert other.line() == "1"
        (extent,) = file.extents()

        stat = json.loads(command.succeed("stat", "file", "--json"))
        assert (stat["name"], stat["size_bytes"], stat["blocks"]) == ("file", 16 * PAGE, 1)
        assert stat["mappers"] == [{"pid": other.pid, "vmas": 2}]
        assert f"pid {other.pid} (2 VMAs)" in command.succeed("stat", "file").decode()

        reader, writer = json.loads(command.succeed("maps", "file", "--json"))
        assert (reader["pid"], reader["pgoff"], reader["length_pages"], reader["access"]) == (other.pid, 0, 16, "r-")
        assert (writer["pid"], writer["pgoff"], writer["length_pages"], writer["access"]) == (other.pid, 4, 12, "rw")
        block = {"pgoff": 4, "length_pages": 1, "target": "pmem", "pfn": extent.frame, "access": "rw"}
        assert block in writer["mapped"]
        table = command.succeed("maps", "file").decode()
        assert str(other.pid) in table
        assert "[4, 16)" in table
        assert "[4, 5)" in table
        assert f"[{extent.frame}, {extent.frame + 1})" in table


def test_df(command: CommandLine, session: dax_mp.Session) -> None:
    with session.open("file", "w") as file:
        file.write(b"x")
    device = json.loads(command.succeed("df", "--json"))
    assert device["pages"] == device["pages_free"] + 1
    assert device["page_size"] == PAGE
    assert device["counters"]["faults"] >= 0
    table = command.succeed("df").decode()
    assert "64MiB" in table
    assert "1 file, 2 sessions, 0 VMAs" in table


# --- changing what is there -------------------------------------------------------------------------------------------


def test_truncate_punch_and_rm(command: CommandLine, session: dax_mp.Session) -> None:
    assert "No such file" in command.fail("truncate", "file", "1MiB")
    command.succeed("truncate", "--create", "file", "1MiB")
    assert session.stat("file").size_bytes == 1 << 20
    command.succeed("truncate", "file", "1.5GiB")
    with session.open("file", "r+") as file:
        assert file.size == 3 << 29
        file.write(b"x" * 4 * PAGE)
    command.succeed("punch", "file", str(PAGE), str(2 * PAGE))
    assert session.stat("file").blocks == 2
    session.open("other", "x").close()
    command.succeed("rm", "file", "other")
    assert session.listdir() == []
    assert "missing: No such file" in command.fail("rm", "missing")


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["stat", "x"], ["maps", "x"], ["get", "x"], ["punch", "x", "0", "1"], ["truncate", "x", "1"]], ids=str
)
def test_a_file_that_is_not_there(command: CommandLine, arguments: list[str]) -> None:
    assert command.fail(*arguments) == "dax-mp: x: No such file or directory\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["stat"],
        ["stat", "a", "b"],
        ["ls", "--nothing"],
        ["truncate", "x", "much"],
        ["truncate", "x", "--", "-1"],
        ["punch", "x", "0", "1KB"],
        ["put"],
        ["stress", "--processes", "0"],
        ["stress", "--hole-policy", "none"],
    ],
    ids=str,
)
def test_wrong_usage(command: CommandLine, arguments: list[str]) -> None:
    assert "--help" in command.fail(*arguments, code=2)


def test_no_coordinator(endpoint: str) -> None:
    command = CommandLine(endpoint)
    for arguments in (["ls"], ["df", "--json"], ["put", "/dev/null", "x"], ["rm", "x"]):
        assert f"start one with: dax-mp serve --endpoint {endpoint}" in command.fail(*arguments)
    other = endpoint + "-other"
    assert other in command.fail("ls", "--endpoint", other)


def test_a_name_that_is_not_text(command: CommandLine) -> None:
    assert "utf-8" in command.fail("stat", os.fsdecode(b"\xff"))


def test_a_coordinator_that_ends_meanwhile(tmp_path: Path) -> None:
    with dax_mp.launch("4MiB") as daemon:
        command = CommandLine(daemon.endpoint)
        with command.start("put", "-", "file", stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            with dax_mp.connect(daemon.endpoint) as session:
                while not session.listdir():
                    pass  # it has begun
            os.kill(daemon.pid, signal.SIGKILL)
            _, errors = process.communicate(b"data", TIMEOUT_S)
    assert process.returncode == 1
    assert errors.decode().startswith("dax-mp: ")
    assert "has ended" in errors.decode()
    assert errors.count(b"\n") == 1


def test_nobody_reads_the_output(command: CommandLine, session: dax_mp.Session) -> None:
    with session.open("file", "x") as file:
        file.write(b"x")
    for arguments in (["ls"], ["get", "file", "-"], ["ls", "--json"]):
        reader, writer = os.pipe()
        with command.start(*arguments, stdout=writer) as process:
            os.close(writer)
            os.close(reader)
            _, errors = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, errors) == (1, b"")


def test_interrupted(command: CommandLine, session: dax_mp.Session) -> None:
    """130, no traceback, and nothing half done is left."""
    with command.start("put", "-", "file", stdin=subprocess.PIPE) as process:
        while not session.listdir():
            pass  # it has begun
        process.send_signal(signal.SIGINT)
        process.wait(TIMEOUT_S)
        assert process.stderr is not None
        assert process.stderr.read().strip() == b""
    assert process.returncode == 130
    assert session.listdir() == []


def test_help_and_version(command: CommandLine) -> None:
    assert dax_mp.__version__ in command.succeed("--version").decode()
    text = command.succeed("--help").decode()
    names = ("serve", "demo", "put", "get", "ls", "stat", "maps", "df", "truncate", "punch", "rm", "stress")
    assert set(names) <= set(cli.commands.commands)
    for name in names:
        assert f"\n  {name} " in text
    assert "--create" in command.succeed("truncate", "--help").decode()
    code, output, errors = command.run()
    assert (code, output) == (2, b"")
    assert "Usage" in errors


# --- the coordinator --------------------------------------------------------------------------------------------------


@pytest.fixture
def served(endpoint: str) -> Iterator["subprocess.Popen[bytes]"]:
    with CommandLine("").start("serve", "--size", "4MiB", "--endpoint", endpoint) as process:
        yield process
        process.terminate()


def test_serve(served: "subprocess.Popen[bytes]", endpoint: str) -> None:
    """It becomes the coordinator itself: the same process."""
    assert served.stdout is not None
    line = served.stdout.readline().decode()
    assert endpoint in line
    assert f"pid {served.pid}" in line
    command = CommandLine(endpoint)
    command.succeed("put", "/proc/self/status", "status")
    assert b"VmRSS" in command.succeed("get", "status", "-")
    assert str(served.pid) in command.run("serve", "--endpoint", endpoint)[2]
    served.send_signal(signal.SIGINT)
    assert served.wait(TIMEOUT_S) == 0
    assert not os.path.exists(endpoint)


def test_serve_has_its_own_usage(command: CommandLine) -> None:
    assert "--hole-policy" in command.succeed("serve", "--help").decode()
    assert command.run("serve", "--size", "none")[0] == 2
