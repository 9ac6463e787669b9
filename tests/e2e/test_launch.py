"""launch(): a coordinator of one's own, and that nothing of it is left however the two processes end."""

import errno
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import dax_mp
from coordinator_process import Serve
from dax_mp.endpoint import Record, lock_path
from script_process import Script

TIMEOUT_S: Final = 60

LAUNCHER: Final = """
import dax_mp, sys
daemon = dax_mp.launch("4MiB")
session = dax_mp.connect(daemon.endpoint)
file = session.open("file", "w+")
file.truncate(1 << 20)
mapping = file.mmap()
mapping[0] = 1
print(daemon.pid, daemon.endpoint, flush=True)
input()
"""


def regions_at(endpoint: str) -> list[str]:
    """The paths of the shared-memory objects of the coordinator that serves there, as its lock file has them."""
    with open(lock_path(endpoint), "rb") as lock:
        record = Record.decode(lock.read())
    assert record is not None
    paths = [f"/dev/shm{name}" for name in record.region_names]
    assert all(map(os.path.exists, paths))
    return paths


def wait_for_end(pidfd: int) -> None:
    ended, _, _ = select.select([pidfd], [], [], TIMEOUT_S)
    assert ended, "the coordinator is still there"


@pytest.fixture
def parent() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="l-") as directory:
        yield directory


def test_close_ends_the_process_and_removes_everything() -> None:
    with dax_mp.launch("4MiB") as daemon:
        regions = regions_at(daemon.endpoint)
        assert len(regions) == 1
        assert os.stat(daemon.endpoint).st_mode & 0o777 == 0o700
        assert os.path.dirname(daemon.endpoint) == os.environ["XDG_RUNTIME_DIR"]
        pidfd = os.pidfd_open(daemon.pid)
    try:
        wait_for_end(pidfd)
    finally:
        os.close(pidfd)
    assert not os.path.exists(daemon.endpoint)
    assert not os.path.exists(regions[0])
    assert "closed" in repr(daemon)
    daemon.close()


def test_arguments_reach_the_coordinator(parent: str) -> None:
    endpoint = Path(parent) / "here"
    with (
        dax_mp.launch(
            size=8 << 20, hole_policy="page-cache", page_cache_size="1MiB", reserve=False, endpoint=endpoint,
            ack_timeout=7.5, debug=True,
        ) as daemon,
        dax_mp.connect(endpoint) as session,
    ):  # fmt: skip
        assert daemon.endpoint == str(endpoint)
        device = session.statfs()
        assert device.hole_policy == session.hole_policy == "page-cache"
        assert device.pages * device.page_size == 8 << 20
        assert device.dram_pages * device.page_size == 1 << 20
        pmem, dram = (os.stat(path) for path in sorted(regions_at(daemon.endpoint), reverse=True))
        assert pmem.st_blocks * 512 <= 16 * device.page_size, "memory was reserved"
        assert dram.st_size == (1 << 20) + device.page_size
    assert not endpoint.exists()


@pytest.mark.parametrize("size", [0, -5, "much", "1.5B", ""])
def test_bad_sizes(size: int | str) -> None:
    with pytest.raises(ValueError):
        dax_mp.launch(size)


def test_bad_hole_policy() -> None:
    with pytest.raises(ValueError, match="zero and page-cache"):
        dax_mp.launch(hole_policy="none")


def test_the_coordinators_own_words(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    """Why it cannot serve is the exception's text, and nothing goes to stderr."""
    coordinator = serve()
    with pytest.raises(OSError, match="serves at") as raised:
        dax_mp.launch("4MiB", endpoint=coordinator.endpoint)
    assert raised.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError) as raised:
        dax_mp.launch("1PiB")
    assert raised.value.errno == errno.ENOSPC
    assert capfd.readouterr().err == ""


def test_a_coordinator_that_ends_without_a_word(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    """An exception that says so; and what lies at the endpoint from one that was killed is removed."""
    killed = serve()
    (region,) = regions_at(killed.endpoint)
    killed.end(signal.SIGKILL)
    with pytest.raises(OSError, match="exit code 2 before it served") as raised:
        dax_mp.launch("4MiB", endpoint=killed.endpoint, ack_timeout=-1)
    assert raised.value.filename == killed.endpoint
    assert "--ack-timeout" in capfd.readouterr().err
    assert not os.path.exists(killed.endpoint)
    assert not os.path.exists(region)


def test_a_deep_runtime_directory_is_passed_over(monkeypatch: pytest.MonkeyPatch, parent: str) -> None:
    """A socket's path has 107 bytes at most."""
    deep = os.path.join(parent, "d" * 90)
    os.mkdir(deep)
    monkeypatch.setenv("XDG_RUNTIME_DIR", deep)
    with dax_mp.launch("4MiB") as daemon, dax_mp.connect(daemon.endpoint):
        assert not daemon.endpoint.startswith(deep)


def test_killed_coordinator_is_swept_up() -> None:
    with dax_mp.launch("4MiB") as daemon:
        (region,) = regions_at(daemon.endpoint)
        session = dax_mp.connect(daemon.endpoint)
        os.kill(daemon.pid, signal.SIGKILL)
        session.close()
    assert not os.path.exists(daemon.endpoint)
    assert not os.path.exists(region)


def test_stopped_coordinator_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dax_mp.clients.launch.STOP_TIMEOUT_S", 0.2)
    with dax_mp.launch("4MiB") as daemon:
        (region,) = regions_at(daemon.endpoint)
        os.kill(daemon.pid, signal.SIGSTOP)
    assert not os.path.exists(daemon.endpoint)
    assert not os.path.exists(region)


@pytest.mark.parametrize("how", ["exit", "exception", "SIGTERM", "SIGKILL", "SIGINT"])
def test_it_ends_with_its_launcher(script: Script, how: str) -> None:
    """Whether the launcher closes nothing, is interrupted, or is killed."""
    last = {"exit": "sys.exit(3)", "exception": "1 / 0"}.get(how, "pass")
    launcher = script(LAUNCHER + last)
    pid, endpoint = launcher.line().split(maxsplit=1)
    pidfd = os.pidfd_open(int(pid))
    try:
        (region,) = regions_at(endpoint)
        if how in ("exit", "exception"):
            launcher.go_on()
        else:
            launcher.process.send_signal(getattr(signal, how))
        code, _, errors = launcher.end()
        wait_for_end(pidfd)
    finally:
        os.close(pidfd)
    expected = {"exit": 3, "exception": 1, "SIGTERM": -signal.SIGTERM, "SIGKILL": -signal.SIGKILL}
    assert code == expected.get(how, -signal.SIGINT), errors
    assert not os.path.exists(endpoint)
    assert not os.path.exists(region)


@pytest.mark.forks
def test_close_in_a_forked_child_is_not_the_parents(script: Script) -> None:
    process = script(
        """
import dax_mp, os, warnings
with dax_mp.launch("4MiB") as daemon:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        daemon.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    with dax_mp.connect(daemon.endpoint) as session:
        print(session.listdir())
"""
    )
    assert process.end() == (0, "[]\n", "")


def test_package_is_found_from_anywhere(tmp_path: Path) -> None:
    """The coordinator runs from this very package, and no module of the current directory gets in its way."""
    (tmp_path / "zmq.py").write_text("raise SystemExit('the wrong zmq')")
    text = f"import os, dax_mp; os.chdir({str(tmp_path)!r}); dax_mp.launch('4MiB').close()"
    package = os.path.dirname(os.path.dirname(dax_mp.__file__))
    command = [os.path.realpath("/proc/self/exe"), "-P", "-c", f"import sys; sys.path.insert(0, {package!r}); {text}"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(pytest.__file__))  # where the dependencies are
    result = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (result.returncode, result.stderr) == (0, "")
