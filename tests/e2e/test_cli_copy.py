"""put, get, cat and cp: every byte, no hole filled, and nothing of others lost."""

import fcntl
import os
import random
import socket
from pathlib import Path
from typing import Final

import pytest

import dax_mp
from command_line import CommandLine
from dax_mp.clients import cli_copy

PAGE: Final = os.sysconf("SC_PAGESIZE")


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
    code, shown = command.on_a_terminal("put", str(tmp_path / "long"))
    assert code == 0
    assert "put" in shown
    assert "64" in shown
    assert command.run("put", str(tmp_path / "long"))[2] == ""


# --- a target that is no regular file, or that others have open ------------------------------------------------------


def store(session: dax_mp.Session, name: str, data: bytes) -> None:
    with session.open(name, "w") as file:
        file.write(data)


def test_get_to_a_process_substitution(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    store(session, "file", b"content")
    line = 'dax-mp get file >(cat > "$1/read"); code=$?; wait $!; exit $code'
    assert command.shell(line, str(tmp_path)) == (0, b"", "")
    assert (tmp_path / "read").read_bytes() == b"content"


@pytest.mark.parametrize("target", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_get_to_stdout_by_its_path_keeps_what_others_write_there(
    command: CommandLine, session: dax_mp.Session, tmp_path: Path, target: str
) -> None:
    store(session, "file", b"content\n")
    (tmp_path / "link").symlink_to("/dev/stdout")
    target = os.path.join(tmp_path, target)
    line = '{ echo before; dax-mp get file "$2"; echo after; } > "$1/log"'
    assert command.shell(line, str(tmp_path), target) == (0, b"", "")
    assert (tmp_path / "log").read_bytes() == b"before\ncontent\nafter\n"
    line = 'dax-mp get file "$2" >> "$1/log"'
    assert command.shell(line, str(tmp_path), target) == (0, b"", "")
    assert (tmp_path / "log").read_bytes() == b"before\ncontent\nafter\ncontent\n"
    assert command.shell('dax-mp get file "$1" | cat', target) == (0, b"content\n", "")
    assert (tmp_path / "link").is_symlink()


def test_get_to_a_descriptor_keeps_the_file_behind_it(
    command: CommandLine, session: dax_mp.Session, tmp_path: Path
) -> None:
    store(session, "file", b"content\n")
    line = 'exec 7>"$1/log"; echo before >&7; dax-mp get file /dev/fd/7; echo after >&7'
    assert command.shell(line, str(tmp_path)) == (0, b"", "")
    assert (tmp_path / "log").read_bytes() == b"before\ncontent\nafter\n"
    code, _, errors = command.shell('dax-mp get file /dev/fd/0 < "$1/log"', str(tmp_path))
    assert (code, errors) == (1, "dax-mp: /dev/fd/0: Bad file descriptor\n")
    assert (tmp_path / "log").read_bytes() == b"before\ncontent\nafter\n"


def test_get_to_a_descriptor_of_another_process_loses_nothing(
    command: CommandLine, session: dax_mp.Session, tmp_path: Path
) -> None:
    store(session, "file", b"content")
    with open(tmp_path / "log", "wb", buffering=0) as log:
        log.write(b"before ")
        command.succeed("get", "file", f"/proc/{os.getpid()}/fd/{log.fileno()}")
    assert (tmp_path / "log").read_bytes() == b"before content"


def test_get_to_a_device_and_to_a_socket(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    store(session, "file", b"content")
    command.succeed("get", "file", "/dev/null")
    assert Path("/dev/null").is_char_device()
    assert command.fail("get", "file", "/dev/full") == "dax-mp: /dev/full: No space left on device\n"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "socket: No such device or address" in command.fail("get", "file", str(tmp_path / "socket"))
    assert (tmp_path / "socket").is_socket()
    ours, theirs = socket.socketpair()
    with ours, theirs, command.start("get", "file", "/dev/stdout", stdout=theirs) as process:
        theirs.close()
        assert ours.recv(100) == b"content"
    assert process.returncode == 0


def test_get_to_a_pipe_that_does_not_block(command: CommandLine, session: dax_mp.Session) -> None:
    data = random.Random(4).randbytes(3 << 20)
    store(session, "file", data)
    reader, writer = os.pipe()
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    fcntl.fcntl(writer, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    with command.start("get", "file", "-", stdout=writer) as process, open(reader, "rb") as stream:
        os.close(writer)
        assert stream.read() == data
    assert process.returncode == 0


def test_get_follows_links_and_keeps_them(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    store(session, "file", b"content")
    (tmp_path / "directory").mkdir()
    (tmp_path / "to directory").symlink_to("directory")
    (tmp_path / "dangling").symlink_to("to directory/made")
    command.succeed("get", "file", str(tmp_path / "dangling"))
    assert (tmp_path / "directory" / "made").read_bytes() == b"content"
    assert (tmp_path / "dangling").is_symlink()
    command.succeed("get", "file", str(tmp_path / "to directory"))
    assert (tmp_path / "directory" / "file").read_bytes() == b"content"
    (tmp_path / "loop").symlink_to("loop")
    assert f"{tmp_path / 'loop'}: Too many levels of symbolic links" in command.fail("get", "file", f"{tmp_path}/loop")
    assert sorted(os.listdir(tmp_path / "directory")) == ["file", "made"]


def test_get_does_not_replace_what_the_user_may_not_write(
    command: CommandLine, session: dax_mp.Session, tmp_path: Path
) -> None:
    store(session, "file", b"content")
    target = tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o444)
    if os.geteuid() == 0:
        pytest.skip("root may write to any file")
    assert command.fail("get", "file", str(target)) == f"dax-mp: {target}: Permission denied\n"
    assert target.read_bytes() == b"old"


def test_messages_name_the_users_file(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    """And not the one that it is made under."""
    store(session, "file", b"content")
    missing = tmp_path / "missing" / "file"
    assert command.fail("get", "file", str(missing)) == f"dax-mp: {missing}: No such file or directory\n"
    assert command.fail("get", "file", "") == "dax-mp: '': No such file or directory\n"
    assert command.fail("put", "", "other") == "dax-mp: '': No such file or directory\n"
    assert command.fail("get", "file", "/proc/version") == "dax-mp: /proc/version: No such file or directory\n"
    assert command.fail("put", str(tmp_path)) == f"dax-mp: {tmp_path}: Is a directory\n"
    with dax_mp.launch("4MiB") as daemon:
        small = CommandLine(daemon.endpoint)
        (tmp_path / "large").write_bytes(bytes(5 << 20))
        assert small.fail("put", str(tmp_path / "large")) == "dax-mp: large: No space left on device\n"
        assert small.fail("put", str(tmp_path / "large"), "n" * 256).startswith("dax-mp: " + "n" * 256 + ": ")
        assert small.fail("put", "-", "streamed", data=bytes(5 << 20)) == "dax-mp: streamed: No space left on device\n"
        assert small.fail("cp", "nothing", "other") == "dax-mp: nothing: No such file or directory\n"


def test_get_that_is_killed_leaves_nothing(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    """It is stopped in the middle: its target is there without a name."""
    store(session, "file", bytes(48 << 20))
    with command.start("get", "file", str(tmp_path / "target")) as process:
        while not any_descriptor_below(process.pid, tmp_path):
            assert process.poll() is None
        process.kill()
    assert os.listdir(tmp_path) in ([], ["target"])  # it may have been done


def any_descriptor_below(pid: int, directory: Path) -> bool:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if entry.readlink().is_relative_to(directory):
                return True
        except FileNotFoundError:
            pass
    return False


def test_get_a_name_that_is_a_dash(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    store(session, "-", b"content")
    assert command.shell('cd "$1"; dax-mp get -- -; dax-mp put ./- other', str(tmp_path)) == (0, b"", "")
    assert (tmp_path / "-").read_bytes() == b"content"
    assert sorted(session.listdir()) == ["-", "other"]


# --- what changes meanwhile -------------------------------------------------------------------------------------------


class ChangingFile(cli_copy.RealFile):
    """A file whose size is set to another one after its first read."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        super().__init__(fd, "changing")
        self._fd = fd
        self._size_bytes: int | None = size_bytes

    def preadv(self, views: list[memoryview], offset: int) -> int:
        read_bytes = super().preadv(views, offset)
        if self._size_bytes is not None:
            os.ftruncate(self._fd, self._size_bytes)
            self._size_bytes = None
        return read_bytes


@pytest.mark.parametrize("size_bytes", [0, 1, (5 << 20) + 7, 20 << 20], ids=str)
def test_put_of_a_file_that_grows_or_shrinks_meanwhile(
    session: dax_mp.Session, tmp_path: Path, size_bytes: int
) -> None:
    """No byte is made up: what was read stays, what is added comes too."""
    data = random.Random(5).randbytes(10 << 20)
    (tmp_path / "file").write_bytes(data)
    with open(tmp_path / "file", "r+b", buffering=0) as stream, session.open("file", "w+") as target:
        cli_copy.copy_contents("put", ChangingFile(stream.fileno(), size_bytes), target)
        read_bytes = max(size_bytes, cli_copy.PIECE_BYTES)
        assert target.size == read_bytes
        assert target.pread(read_bytes, 0) == data[:read_bytes] + bytes(max(0, read_bytes - len(data)))


def test_put_of_a_file_that_is_shorter_than_it_says(command: CommandLine, session: dax_mp.Session) -> None:
    """Files of sysfs say 4096."""
    (path, *_) = [path for path in Path("/sys/kernel/mm").rglob("*") if path.is_file() and os.access(path, os.R_OK)]
    command.succeed("put", str(path), "file")
    with session.open("file") as file:
        assert file.readall() == path.read_bytes()


def test_put_from_a_pipe_that_comes_in_pieces(command: CommandLine, session: dax_mp.Session) -> None:
    assert command.shell("{ printf first; printf ' second'; } | dax-mp put - file") == (0, b"", "")
    assert command.shell("dax-mp put <(printf third) other") == (0, b"", "")
    with session.open("file") as file, session.open("other") as other:
        assert (file.readall(), other.readall()) == (b"first second", b"third")


# --- cat and cp -------------------------------------------------------------------------------------------------------


def test_cat(command: CommandLine, session: dax_mp.Session) -> None:
    store(session, "a.log", b"one\n")
    store(session, "b.log", random.Random(6).randbytes(5 << 20))
    with session.open("b.log") as file:
        assert command.succeed("cat", "a.log", "b.log", "a.log") == b"one\n" + file.readall() + b"one\n"
    code, output, errors = command.run("cat", "missing", "a.*")
    assert (code, output, errors) == (1, b"one\n", "dax-mp: missing: No such file or directory\n")


def test_cp_keeps_holes_and_attributes(command: CommandLine, session: dax_mp.Session, sparse_path: Path) -> None:
    command.succeed("put", str(sparse_path))
    with session.open("sparse", "r+") as file:
        file.setxattr("user.kind", b"\0\xff")
    store(session, "copy", b"old")
    command.succeed("cp", "sparse", "copy")
    assert session.stat("copy").blocks == session.stat("sparse").blocks
    with session.open("copy") as file:
        assert file.readall() == sparse_path.read_bytes()
        assert file.getxattr("user.kind") == b"\0\xff"
    assert session.listdir() == ["copy", "sparse"]
    assert "same file" in command.fail("cp", "copy", "copy")


def test_long_copies_go_past_the_coordinator(command: CommandLine, session: dax_mp.Session, tmp_path: Path) -> None:
    """By direct I/O: their bytes are not in messages. The coordinator reads none of them."""
    (tmp_path / "file").write_bytes(bytes(range(256)) * (32 << 12))
    io_of_coordinator = Path(f"/proc/{session.coordinator_pid}/io")

    def characters() -> int:
        fields = dict(line.split(": ") for line in io_of_coordinator.read_text().splitlines())
        return int(fields["rchar"]) + int(fields["wchar"])

    before = characters()
    command.succeed("put", str(tmp_path / "file"))
    command.succeed("cp", "file", "copy")
    command.succeed("get", "copy", str(tmp_path / "back"))
    assert characters() - before < 8 << 20
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
