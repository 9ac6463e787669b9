"""The commands on names and space: rm, ls, mv, touch, fallocate, xattr; patterns; names that are no plain words."""

import json
import os
from typing import Final

import pytest

import dax_mp
from command_line import CommandLine

PAGE: Final = os.sysconf("SC_PAGESIZE")
MISSING: Final = "No such file or directory"


def make(session: dax_mp.Session, *names: str) -> None:
    for name in names:
        session.open(name, "x").close()


# --- rm ---------------------------------------------------------------------------------------------------------------


def test_rm_goes_on_and_then_fails(command: CommandLine, session: dax_mp.Session) -> None:
    make(session, "a", "c")
    code, output, errors = command.run("rm", "a", "b", "c", "d", "n" * 300)
    assert (code, output) == (1, b"")
    lines = errors.splitlines()
    assert lines[:2] == [f"dax-mp: b: {MISSING}", f"dax-mp: d: {MISSING}"]
    assert lines[2].startswith("dax-mp: " + "n" * 300)
    assert session.listdir() == []


def test_rm_f_says_nothing_of_what_is_not_there(command: CommandLine, session: dax_mp.Session) -> None:
    make(session, "a")
    command.succeed("rm", "-f", "missing", "a", "*.none")
    assert session.listdir() == []
    command.succeed("rm", "-f")
    assert "NAME" in command.fail("rm", code=2)
    assert "n" * 300 in command.fail("rm", "-f", "n" * 300)


def test_rm_with_patterns(command: CommandLine, session: dax_mp.Session) -> None:
    make(session, "a.tmp", "b.tmp", "b.txt", ".hidden.tmp", "[x]", "c1", "c2", "cx")
    command.succeed("rm", "*.tmp", "c[0-9]")
    assert session.listdir() == [".hidden.tmp", "[x]", "b.txt", "cx"]
    assert command.fail("rm", "*.tmp") == f"dax-mp: *.tmp: {MISSING}\n"
    command.succeed("rm", ".*", "[x]", "?x", "b*")
    assert session.listdir() == []


def test_rm_of_a_name_that_is_a_pattern_removes_that_file_alone(command: CommandLine, session: dax_mp.Session) -> None:
    make(session, "*", "a", "b")
    command.succeed("rm", "*")
    assert session.listdir() == ["a", "b"]
    make(session, "*")
    command.succeed("rm", "[*]")
    assert session.listdir() == ["a", "b"]


# --- ls ---------------------------------------------------------------------------------------------------------------


def test_ls_of_names_and_patterns(command: CommandLine, session: dax_mp.Session) -> None:
    make(session, "a.log", "b.log", "c.txt")
    listed = json.loads(command.succeed("ls", "--json", "*.log"))
    assert [entry["name"] for entry in listed] == ["a.log", "b.log"]
    code, output, errors = command.run("ls", "c.txt", "missing", "*.none")
    assert (code, errors) == (1, f"dax-mp: missing: {MISSING}\ndax-mp: *.none: {MISSING}\n")
    assert [line.split()[0] for line in output.splitlines()] == [b"NAME", b"c.txt"]
    assert command.fail("ls", "missing") == f"dax-mp: missing: {MISSING}\n"


def test_ls_of_10_000_files() -> None:
    """At a coordinator that does not check all of them after every event."""
    names = [f"file {number:05}" for number in range(10_000)]
    with dax_mp.launch("4MiB") as own, dax_mp.connect(own.endpoint) as session:
        command = CommandLine(own.endpoint)
        make(session, *names)
        lines = command.succeed("ls").decode().splitlines()
        assert [line[:10] for line in lines[1:]] == names
        assert len({len(line) for line in lines}) == 1
        assert len(json.loads(command.succeed("ls", "--json"))) == 10_000
        command.succeed("rm", "file *")
        assert session.listdir() == []


# --- mv, touch, fallocate, xattr --------------------------------------------------------------------------------------


def test_mv(command: CommandLine, session: dax_mp.Session) -> None:
    make(session, "a", "b")
    with session.open("a", "w") as file:
        file.write(b"content")
    assert command.fail("mv", "-n", "a", "b").startswith("dax-mp: a -> b: File exists")
    command.succeed("mv", "a", "b")
    assert session.listdir() == ["b"]
    with session.open("b") as file:
        assert file.readall() == b"content"
    assert MISSING in command.fail("mv", "a", "c")
    command.succeed("mv", "-n", "b", "c")
    assert session.listdir() == ["c"]


def test_touch(command: CommandLine, session: dax_mp.Session) -> None:
    with session.open("there", "w") as file:
        file.write(b"content")
    session.utime("there", (1, 1))
    command.succeed("touch", "there", "new")
    assert session.listdir() == ["new", "there"]
    assert session.stat("there").mtime_ns > 1
    assert session.stat("there").size_bytes == 7
    command.succeed("touch", "-c", "other")
    assert session.listdir() == ["new", "there"]
    code, _, errors = command.run("touch", "n" * 300, "last")
    assert code == 1
    assert errors.count("\n") == 1
    assert session.listdir() == ["last", "new", "there"]


def test_fallocate(command: CommandLine, session: dax_mp.Session) -> None:
    assert MISSING in command.fail("fallocate", "file", "0", "16KiB")
    command.succeed("fallocate", "--create", "file", "0", str(4 * PAGE))
    with session.open("file", "r+") as file:
        assert (file.size, file.stat().blocks) == (4 * PAGE, 4)
        for page in range(4):
            file.pwrite(bytes([65 + page]) * PAGE, page * PAGE)
        command.succeed("fallocate", "-n", "file", str(4 * PAGE), str(PAGE))
        assert (file.size, file.stat().blocks) == (4 * PAGE, 5)
        command.succeed("fallocate", "--punch-hole", "file", "0", str(PAGE))
        assert file.stat().blocks == 4
        command.succeed("fallocate", "--zero-range", "file", str(PAGE), "1")
        assert file.pread(2, PAGE) == b"\0B"
        command.succeed("fallocate", "--collapse-range", "file", "0", str(PAGE))
        assert file.pread(2, 0) == b"\0B"
        command.succeed("fallocate", "--insert-range", "file", "0", str(2 * PAGE))
        assert (file.pread(2, 2 * PAGE), file.size) == (b"\0B", 5 * PAGE)
    assert "one of them" in command.fail("fallocate", "-p", "-z", "file", "0", "1", code=2)
    assert "changes the size" in command.fail("fallocate", "-n", "-c", "file", "0", "1", code=2)
    assert "page size" in command.fail("fallocate", "-c", "file", "0", "1")


def test_xattr(command: CommandLine, session: dax_mp.Session) -> None:
    make(session, "file")
    command.succeed("xattr", "set", "file", "user.one", "value")
    command.succeed("xattr", "set", "file", "user.two", os.fsdecode(b"\xff\x01"))
    assert command.succeed("xattr", "get", "file", "user.one") == b"value"
    assert command.succeed("xattr", "get", "file", "user.two") == b"\xff\x01"
    assert command.succeed("xattr", "list", "file") == b"user.one\nuser.two\n"
    assert json.loads(command.succeed("xattr", "list", "--json", "file")) == ["user.one", "user.two"]
    command.succeed("xattr", "remove", "file", "user.one")
    assert command.succeed("xattr", "list", "file") == b"user.two\n"
    for action in (["get"], ["remove"]):
        assert command.fail("xattr", *action, "file", "user.one") == "dax-mp: file: No data available\n"
    assert command.fail("xattr", "list", "missing") == f"dax-mp: missing: {MISSING}\n"
    assert "--help" in command.fail("xattr", "nothing", code=2)


# --- names ------------------------------------------------------------------------------------------------------------

ESCAPE: Final = "\x1b[31mred\x1b]0;title\x07"


def test_control_characters_in_names_are_escaped(command: CommandLine, session: dax_mp.Session) -> None:
    """In what people read; JSON has the names as they are."""
    names = [ESCAPE, "two\nlines", "\u202eback", "tab\there"]
    make(session, *names)
    for arguments in (["ls"], ["stat", ESCAPE], ["maps", ESCAPE], ["df"]):
        output = command.succeed(*arguments).decode()
        assert all(character.isprintable() for character in output.replace("\n", ""))
    listed = command.succeed("ls").decode()
    assert "\\x1b[31mred\\x1b]0;title\\x07" in listed
    assert "two\\nlines" in listed
    assert listed.count("\n") == 1 + len(names)
    assert {entry["name"] for entry in json.loads(command.succeed("ls", "--json"))} == set(names)
    for arguments in (["stat", "\x1b[0m"], ["rm", "\x1b[0m"], ["get", "a\nb"], ["ls", "\x1b?"], ["mv", "\r", "a"]):
        errors = command.fail(*arguments)
        assert errors.rstrip("\n").isprintable()
    assert command.fail("no\x1b[0m", code=2).rstrip("\n").isprintable()
    command.succeed("xattr", "set", ESCAPE, "user.\x1b", "value")
    assert command.succeed("xattr", "list", ESCAPE) == b"user.\\x1b\n"


ODD_NAMES: Final = ("-dash", "--help", " ", "two words", "new\nline", "ä€😀", "*", "n" * 255, "-")


def test_odd_names_are_names(command: CommandLine, session: dax_mp.Session) -> None:
    command.succeed("touch", "--", *ODD_NAMES)
    assert session.listdir() == sorted(ODD_NAMES)
    assert {entry["name"] for entry in json.loads(command.succeed("ls", "--json", "--", *ODD_NAMES))} == set(ODD_NAMES)
    assert command.succeed("cat", "--", *ODD_NAMES) == b""
    command.succeed("rm", "--", *ODD_NAMES)
    assert session.listdir() == []


@pytest.mark.parametrize("name", ["--help", "new\nline"])
def test_odd_names_in_every_command(command: CommandLine, session: dax_mp.Session, name: str) -> None:
    command.succeed("put", "--", "-", name, data=b"content")
    assert command.succeed("get", "--", name, "-") == b"content"
    assert json.loads(command.succeed("stat", "--json", "--", name))["name"] == name
    command.succeed("truncate", "--", name, "1")
    command.succeed("mv", "--", name, "plain")
    command.succeed("cp", "--", "plain", name)
    assert session.listdir() == sorted(["plain", name])


NO_NAMES: Final = ("", ".", "..", "a/b", "/", "n" * 256, os.fsdecode(b"\xff"))


def test_what_is_no_name_is_refused(command: CommandLine, session: dax_mp.Session) -> None:
    code, output, errors = command.run("touch", *NO_NAMES, "there")
    assert (code, output, errors.count("\n")) == (1, b"", len(NO_NAMES))
    assert session.listdir() == ["there"]
    code, output, errors = command.run("rm", *NO_NAMES)
    assert (code, output, errors.count("\n")) == (1, b"", len(NO_NAMES))


@pytest.mark.parametrize("name", ["", "a/b", os.fsdecode(b"\xff")], ids=ascii)
def test_what_is_no_name_is_refused_by_every_command(command: CommandLine, session: dax_mp.Session, name: str) -> None:
    make(session, "there")
    for arguments in (
        *(
            ["put", "/dev/null", name],
            ["get", name],
            ["cat", name],
            ["maps", name],
            ["truncate", "--create", name, "1"],
        ),
        *(["fallocate", "--create", name, "0", "1"], ["mv", "there", name], ["cp", "there", name], ["ls", name]),
    ):
        code, output, errors = command.run(*arguments)
        assert (code in (1, 2), output) == (True, b""), arguments
        assert errors.startswith("dax-mp: ")
        assert errors.count("\n") == 1
    assert session.listdir() == ["there"]
