"""The coordinator's log, and serving behind the command that started it."""

import errno
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

import dax_mp
from coordinator_process import Serve, serve_command, wait_until
from dax_mp import messages
from raw_peer import RawPeer
from script_process import Script

TIMEOUT_S: Final = 60


@pytest.fixture
def log(endpoint: str) -> Path:
    """The path of a log, beside the endpoint."""
    return Path(endpoint).parent / "log"


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def events_of(log: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in events(log) if event["event"] == name]


def test_a_line_for_the_start_each_session_and_the_stop(serve: Serve, log: Path) -> None:
    coordinator = serve("--log", str(log), "--log-level", "debug")
    dax_mp.connect(coordinator.endpoint).close()
    with dax_mp.connect(coordinator.endpoint):
        assert coordinator.end() == 0
    levels, texts = zip(*(line.split(" ", 2)[2].split(": ", 1) for line in log.read_text().splitlines()), strict=True)
    me = Path("/proc/self/comm").read_text().strip()
    assert texts == (
        f"serving 4MiB at {coordinator.endpoint} (pid {coordinator.pid})",
        f"session of {me} (pid {os.getpid()}) began",
        f"session of pid {os.getpid()} ended",
        f"session of {me} (pid {os.getpid()}) began",
        "stopped by SIGTERM; 1 sessions were there",
    )
    assert set(levels) == {"info", "debug"}
    assert log.stat().st_mode & 0o077 == 0


def test_a_line_for_each_eviction_quarantine_and_refusal(serve: Serve, log: Path) -> None:
    coordinator = serve("--log", str(log), "--log-json", "--ack-timeout", "0.2")
    with RawPeer(coordinator.endpoint) as holder, RawPeer(coordinator.endpoint, locked=False) as other:
        holder.hello()
        holder.open_pager()
        handle = holder.map_page("file", 1)
        holder.send(messages.Truncate(7, handle, 0))  # waits for the acknowledgement that it does not give
        wait_until(lambda: len(events_of(log, "quarantine")) == 1)
        assert other.hello().errno == errno.EACCES
        assert holder.process is not None
        (eviction,) = events_of(log, "eviction")
        assert eviction["pid"] == holder.process.pid
        assert "python" in eviction["message"]
        assert "--ack-timeout" in eviction["message"]
        (refusal,) = events_of(log, "refusal")
        assert (refusal["pid"], refusal["errno"], refusal["level"]) == (os.getpid(), errno.EACCES, "warning")
        assert "no session: No such file" in refusal["message"]
        holder.kill()
        wait_until(lambda: len(events_of(log, "quarantine")) == 2)
        assert [event["pages"] for event in events_of(log, "quarantine")] == [1, 0]
    assert coordinator.end() == 0
    names = [event["event"] for event in events(log)]
    assert (names[0], names[-1]) == ("start", "stop")


def test_sighup_ends_nothing_and_opens_the_log_again(serve: Serve, log: Path) -> None:
    """As logrotate has it; also where the directory is gone meanwhile."""
    directory = log.parent / "logs"
    directory.mkdir()
    path = directory / "log"
    coordinator = serve("--log", str(path), "--log-level", "debug")
    path.rename(log)
    coordinator.process.send_signal(signal.SIGHUP)
    wait_until(path.exists)
    dax_mp.connect(coordinator.endpoint).close()
    assert "began" in path.read_text()
    assert "began" not in log.read_text()
    path.unlink()
    directory.rmdir()
    coordinator.process.send_signal(signal.SIGHUP)
    dax_mp.connect(coordinator.endpoint).close()
    assert coordinator.end() == 0
    assert coordinator.stderr == ""


def test_warnings_go_to_stderr_by_default(endpoint: str) -> None:
    command = serve_command("--endpoint", endpoint, "--size", "4MiB")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "serving" in process.stdout.readline()
        with RawPeer(endpoint, locked=False) as peer:
            assert peer.hello().errno == errno.EACCES
        process.terminate()
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert said.count("\n") == 1
    assert "warning: refused " in said


def test_a_coordinator_that_a_launcher_started_is_quiet(serve: Serve) -> None:
    coordinator = serve()
    with RawPeer(coordinator.endpoint, locked=False) as peer:
        assert peer.hello().errno == errno.EACCES
    assert coordinator.end() == 0
    assert coordinator.stderr == ""


def test_a_log_that_nobody_reads_holds_nothing_up(endpoint: str) -> None:
    """A full pipe: lines are lost, and the next one that is not says how many."""
    command = serve_command("--endpoint", endpoint, "--size", "4MiB", "--log-level", "debug")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        assert "serving" in process.stdout.readline()
        for _ in range(60):
            dax_mp.connect(endpoint).close()
        os.read(process.stderr.fileno(), 4096)
        dax_mp.connect(endpoint).close()
        process.terminate()
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert "lines are missing before this one] session of" in said


def test_a_process_cannot_write_lines_of_its_own_into_the_log(serve: Serve, script: Script, log: Path) -> None:
    coordinator = serve("--log", str(log), "--log-level", "debug")
    process = script(
        "import dax_mp, sys\n"
        "open('/proc/self/comm', 'w').write('a\\n\\x1b[2J b')\n"
        "dax_mp.connect(sys.argv[1]).close()\n",
        coordinator.endpoint,
    )
    assert process.end()[0] == 0
    assert coordinator.end() == 0
    assert len(log.read_text().splitlines()) == 4
    assert "session of a\\x0a\\x1b[2J b (pid" in log.read_text()


@pytest.mark.parametrize("what", ["missing directory", "fifo", "directory"])
def test_a_log_that_cannot_be_opened_is_one_line(endpoint: str, log: Path, what: str) -> None:
    if what == "fifo":
        os.mkfifo(log)
    elif what == "directory":
        log.mkdir()
    path = log / "below" if what == "missing directory" else log
    command = serve_command("--endpoint", endpoint, "--size", "4MiB", "--log", str(path))
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert done.stderr.startswith("dax-mp serve: cannot open the log: ")
    assert done.stderr.count("\n") == 1
    assert not os.path.exists(endpoint)


# --- behind the command -----------------------------------------------------------------------------------------------


def test_daemonize_returns_when_it_serves(endpoint: str, log: Path) -> None:
    """With paths relative to where it was started; in a session of its own, without terminal and directory."""
    parent = os.path.dirname(endpoint)
    command = serve_command("--daemonize", "--size", "4MiB", "--endpoint", "endpoint", "--log", "log")
    done = subprocess.run(command, cwd=parent, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    with dax_mp.connect(endpoint) as session:
        pid = session.coordinator_pid
        assert done.stdout == f"serving at {endpoint} (pid {pid})\n"
        assert done.stderr == ""
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {os.devnull}
        second = subprocess.run(command, cwd=parent, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert (second.returncode, second.stdout, second.stderr.count("\n")) == (1, "", 1)
        assert f"(pid {pid}) serves at" in second.stderr
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    assert select.select([pidfd], [], [], TIMEOUT_S)[0]
    os.close(pidfd)
    assert not os.path.exists(endpoint)
    assert "stopped by SIGTERM" in log.read_text()


@pytest.mark.parametrize("option", [("--log", "-"), ("--exit-with", "1"), ("--ready-fd", "1")])
def test_daemonize_has_no_stderr_and_no_launcher(endpoint: str, option: tuple[str, str]) -> None:
    command = serve_command("--daemonize", "--endpoint", endpoint, *option)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert "--daemonize" in done.stderr
    assert not os.path.exists(endpoint)


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_told_when_it_serves(serve: Serve, log: Path, abstract: bool) -> None:
    """Type=notify of systemd."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"{log}.notify"
        manager.bind("\0" + name if abstract else name)
        manager.settimeout(TIMEOUT_S)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
            coordinator = serve()
        assert coordinator.error is None
        assert manager.recv(100) == b"READY=1"
