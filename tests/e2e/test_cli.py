"""The command line, run as users run it: its output, its exit codes, and one line for what goes wrong."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import dax_mp
from command_line import TIMEOUT_S, CommandLine, begin
from dax_mp.clients import cli
from script_process import Script

PAGE: Final = os.sysconf("SC_PAGESIZE")


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
    with dax_mp.launch("16MiB") as daemon:
        command = CommandLine(daemon.endpoint)
        with command.start("put", "-", "file", stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            with dax_mp.connect(daemon.endpoint) as session:
                begin(process, session)
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
        begin(process, session)
        process.send_signal(signal.SIGINT)
        process.wait(TIMEOUT_S)
        assert process.stderr is not None
        assert process.stderr.read().strip() == b""
    assert process.returncode == 130
    assert session.listdir() == []


def test_nothing_hidden_is_left_of_a_put_that_is_killed_by_kill_9(
    command: CommandLine, session: dax_mp.Session
) -> None:
    before_pages = session.statfs().pages_free
    with command.start("put", "-", "file", stdin=subprocess.PIPE) as process:
        begin(process, session)
        assert session.listdir() == [], "it is seen before it is complete"
        process.kill()
        process.wait()
    assert session.listdir() == []
    assert session.statfs().pages_free == before_pages


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
