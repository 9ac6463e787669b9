"""The command line's streams, signals and terminal: closed, full, narrow, interrupted; never a traceback."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import click
import pytest

import dax_mp
from command_line import TIMEOUT_S, CommandLine, begin
from dax_mp.clients import cli


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
            begin(process, session)
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


@pytest.mark.parametrize("imports", range(1, 140, 23))
def test_ctrl_c_while_the_command_is_imported(command: CommandLine, imports: int) -> None:
    """Python says what it imports; SIGINT comes after so many modules. From there on it is 130, or done."""
    arguments = [sys.executable, "-P", "-X", "importtime", "-m", "dax_mp", "stat", "file"]
    with subprocess.Popen(
        arguments, env=command.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        while b"| dax_mp.clients.interrupts" not in (line := process.stderr.readline()):
            assert line
        for _ in range(imports):
            process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode in (0, 130)
    assert b"Traceback" not in rest


def test_ctrl_c_ends_stress_and_all_its_processes(command: CommandLine) -> None:
    with command.start("stress", "--seconds", "600", "--processes", "2") as process:
        assert process.stdout is not None
        assert b"2 processes" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)  # the end of stdout: no process has it any more
    assert (process.returncode, errors.strip()) == (130, b"")


# --- the coordinator's end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["put", "get", "cat"])
def test_a_coordinator_that_is_killed_in_a_copy_is_one_line(tmp_path: Path, name: str) -> None:
    """The copy waits for the test in the middle of it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with dax_mp.launch("16MiB") as daemon, dax_mp.connect(daemon.endpoint) as session:
        command = CommandLine(daemon.endpoint)
        with session.open("file", "w") as file:
            file.write(bytes(12 << 20))
        arguments = {"put": ["put", str(fifo), "other"], "get": ["get", "file", str(fifo)], "cat": ["cat", "file"]}[
            name
        ]
        with command.start(*arguments, stdout=subprocess.PIPE) as process:
            if name == "cat":
                assert process.stdout is not None
                os.read(process.stdout.fileno(), 1)
                os.kill(daemon.pid, signal.SIGKILL)
            else:
                with open(fifo, "wb" if name == "put" else "rb", buffering=0) as stream:
                    _ = stream.write(b"x") if name == "put" else stream.read(1)
                    os.kill(daemon.pid, signal.SIGKILL)
                    if name == "get":
                        stream.read()
            _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert errors.startswith(b"dax-mp: ")
    assert b"has ended" in errors
    assert errors.count(b"\n") == 1


# --- terminals --------------------------------------------------------------------------------------------------------


def test_a_narrow_terminal_shows_all(command: CommandLine, session: dax_mp.Session) -> None:
    names = ["n" * 90, "ä" * 50, "漢字" * 20]
    for name in names:
        session.open(name, "x").close()
    for arguments in (["ls"], ["stat", names[0]], ["maps", "file"], ["df"], ["ls", "--help"]):
        code, shown = command.on_a_terminal(*arguments, columns=40)
        assert code == 0
        if arguments in (["ls"], ["stat", names[0]]):  # the others have columns that give way no more
            assert max(map(len, shown.splitlines())) <= 40
    _, shown = command.on_a_terminal("ls", columns=40)
    assert [shown.count(letter) for letter in "nä漢字"] == [90, 50, 20, 20]


def test_no_color_and_other_locales(command: CommandLine, session: dax_mp.Session) -> None:
    session.open("ä", "x").close()
    assert "ä" in command.succeed("ls").decode()
    for name, value in (("LC_ALL", "C"), ("LC_ALL", "POSIX"), ("PYTHONIOENCODING", "ascii"), ("NO_COLOR", "1")):
        command.environment[name] = value
        assert command.succeed("ls").decode().splitlines()[0].split()[0] == "NAME"
        assert [entry["name"] for entry in json.loads(command.succeed("ls", "--json"))] == ["file", "ä"]
        assert command.fail("stat", "ö").rstrip("\n").isprintable()
        _, shown = command.on_a_terminal("ls")
        assert "\x1b" not in shown


def test_stress_shows_its_progress_on_a_terminal_alone(command: CommandLine) -> None:
    code, shown = command.on_a_terminal("stress", "--seconds", "1", "--processes", "2")
    assert code == 0
    assert re.search(r"/1 s [\d,]+ operations, \d+ killed", shown)
    assert "coherent" in shown
    code, output, errors = command.run("stress", "--seconds", "0.5", "--processes", "2")
    assert (code, errors) == (0, "")
    assert b"/0.5 s" not in output


# --- completion -------------------------------------------------------------------------------------------------------


def completions(command: CommandLine, *words: str) -> list[str]:
    """What the shell is offered for the last word."""
    variables = {"_DAX_MP_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    with command.start(env={**command.environment, **variables}) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, errors) == (0, b"")
    return [line.partition(",")[2] for line in output.decode().splitlines() if line.startswith("plain,")]


def test_completion_of_commands_and_names(command: CommandLine, session: dax_mp.Session) -> None:
    for name in ("first", "five words", "new\nline", "other"):
        session.open(name, "x").close()
    assert completions(command, "dax-mp", "tr") == ["truncate"]
    assert completions(command, "dax-mp", "xattr", "") == ["get", "list", "remove", "set"]
    assert completions(command, "dax-mp", "ls", "--j") == ["--json"]
    for words in (["rm"], ["rm", "other"], ["get"], ["mv", "other"], ["cp"], ["xattr", "get"], ["stat", "--json"]):
        assert completions(command, "dax-mp", *words, "fi") == ["file", "first", "five words"]
    assert completions(command, "dax-mp", "rm", "--endpoint", "/nothing", "fi") == []


def test_completion_of_a_coordinator_that_is_stopped_gives_up(tmp_path: Path) -> None:
    with dax_mp.launch("4MiB") as daemon:
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            assert completions(CommandLine(daemon.endpoint), "dax-mp", "rm", "fi") == []
        finally:
            os.kill(daemon.pid, signal.SIGCONT)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(command: CommandLine, shell: str) -> None:
    script = command.succeed("completion", shell).decode()
    assert "_DAX_MP_COMPLETE" in script
    if shell == "bash":
        line = 'eval "$(dax-mp completion bash)"; complete -p dax-mp'
        assert b"-F _dax_mp_completion" in command.shell(line)[1]


# --- help -------------------------------------------------------------------------------------------------------------


def test_one_style_of_help(command: CommandLine) -> None:
    """Usage, a sentence that says what it does, more sentences, options that are explained by sentences."""
    for name in ("put", "xattr set", "serve"):
        text = command.succeed(*name.split(), "--help").decode()
        assert text.startswith(f"Usage: dax-mp {name} [OPTIONS]")
        assert "\nOptions:\n" in text
        assert re.search(r"-h, --help +Show this message and exit\.\n", text)
    for name, entry in cli.commands.commands.items():
        first = (entry.help or "").splitlines()[0]
        assert re.fullmatch(r"[A-Z].*\.", first), name
        for parameter in entry.params:
            if isinstance(parameter, click.Option):
                assert re.fullmatch(r"[A-Z].*[.\]]", parameter.help or ""), (name, parameter.name)


def test_every_command_is_in_a_section_of_the_help() -> None:
    listed = [name for names in cli.SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(cli.commands.commands)
