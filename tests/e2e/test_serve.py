"""The coordinator's start and end: what it makes, refuses, finds, and removes."""

import errno
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator_process import CoordinatorProcess, Serve, serve_command, wait_until
from dax_mp.daemons.region import PAGE_SIZE_BYTES
from dax_mp.daemons.start import PAGE_CACHE_PAGES_MIN
from dax_mp.delays import STEPS
from dax_mp.endpoint import Record
from dax_mp.messages import PROTOCOL_VERSION, Fstat, Hello, Open, OpenFlag, Truncate, Write, encode
from dax_mp.superblock import Superblock
from raw_peer import RawPeer

TIMEOUT_S = 60


def sweep(endpoint: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "dax_mp.daemons.sweep", endpoint]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)


def run_serve(*options: str, python_options: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    """A coordinator that ends by itself."""
    program, *rest = serve_command(*options)
    command = [program, *python_options, *rest]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)


def assert_refused(coordinator: CoordinatorProcess, code: int, *words: str) -> None:
    """It has not started, for this reason and in these words, with exit code 1 and no more than a line."""
    assert coordinator.wait() == 1
    assert coordinator.stderr == ""
    assert coordinator.error is not None
    text = coordinator.error["error"]
    assert coordinator.error["errno"] == code, text
    assert "\n" not in text
    for word in words:
        assert word in text


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hole_policy", ["zero", "page-cache"])
def test_a_signal_ends_it_and_nothing_is_left(serve: Serve, number: int, hole_policy: str) -> None:
    coordinator = serve("--hole-policy", hole_policy)
    regions = coordinator.region_names
    assert len(regions) == (1 if hole_policy == "zero" else 2)
    assert all(os.path.exists(region) for region in regions)
    with RawPeer(coordinator.endpoint) as peer:
        peer.hello()
        assert coordinator.end(number) == 0
    assert coordinator.stderr == ""
    assert not os.path.exists(coordinator.endpoint)
    assert not any(os.path.exists(region) for region in regions)


def test_a_directory_that_was_there_stays(serve: Serve, endpoint: str) -> None:
    os.mkdir(endpoint, 0o700)
    Path(endpoint, "notes").write_text("mine")
    assert serve().end() == 0
    assert os.listdir(endpoint) == ["notes"]


def test_sighup_ends_nothing_under_nohup(endpoint: str) -> None:
    script = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-P", "-c", script, *serve_command("--endpoint", endpoint, "--size", "4MiB")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert f"serving 4MiB at {endpoint} (pid {process.pid})" in process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        with RawPeer(endpoint) as peer:
            assert peer.hello()["pid"] == process.pid
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0


def test_it_ends_with_its_launcher(endpoint: str) -> None:
    script = (
        "import os, subprocess, sys\n"
        "subprocess.Popen([*sys.argv[1:], '--exit-with', str(os.getpid())], stdout=1)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-P", "-c", script, *serve_command("--endpoint", endpoint, "--size", "4MiB")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline().split("(pid ")[1].split(")")[0])
        pidfd = os.pidfd_open(pid)
        launcher.kill()
    try:
        ended, _, _ = select.select([pidfd], [], [], TIMEOUT_S)
    finally:
        os.close(pidfd)
    assert ended, f"coordinator {pid} outlives its launcher"
    assert not os.path.exists(endpoint)


def test_a_launcher_that_is_not_the_parent_is_refused(serve: Serve) -> None:
    assert_refused(serve("--exit-with", "1"), errno.ESRCH, "--exit-with 1")


def test_a_bug_is_shown_and_leaves_nothing(endpoint: str) -> None:
    """A core that breaks an assertion: exit code 70, the traceback, and no file."""
    script = (
        "import sys\n"
        "from dax_mp.coordinator import Coordinator\n"
        "from dax_mp.daemons.serve import main\n"
        "def session_opened(self, token, pid): raise AssertionError(f'seen: process {pid}')\n"
        "Coordinator.session_opened = session_opened\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-P", "-c", script, "--endpoint", endpoint, "--size", "4MiB"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        with RawPeer(endpoint) as peer:
            peer.control.send(encode(Hello(1, PROTOCOL_VERSION)))
            try:
                assert process.wait(TIMEOUT_S) == 70
            finally:
                process.kill()
            assert peer.process is not None
            assert f"AssertionError: seen: process {peer.process.pid}" in process.stderr.read()
    assert not os.path.exists(endpoint)


# --- what it makes ----------------------------------------------------------------------------------------------------


def test_what_it_makes_is_its_user_s_alone(serve: Serve) -> None:
    mask = os.umask(0)
    try:
        coordinator = serve("--hole-policy", "page-cache")
    finally:
        os.umask(mask)
    paths = [coordinator.endpoint, *map(str, Path(coordinator.endpoint).iterdir()), *coordinator.region_names]
    for path in paths:
        status = os.stat(path)
        assert status.st_uid == os.geteuid(), path
        assert stat.S_IMODE(status.st_mode) & 0o077 == 0, path


def test_the_regions_are_reserved_and_say_what_they_are(serve: Serve) -> None:
    coordinator = serve("--hole-policy", "page-cache", size="8MiB")
    with RawPeer(coordinator.endpoint) as peer:
        welcome = peer.hello()
    pages = {"pmem": (8 << 20) // PAGE_SIZE_BYTES, "dram": max((1 << 20) // PAGE_SIZE_BYTES, PAGE_CACHE_PAGES_MIN)}
    for kind, path in zip(("pmem", "dram"), coordinator.region_names, strict=True):
        assert welcome[f"{kind}_pages"] == pages[kind]
        assert "/dev/shm" + welcome[f"{kind}_name"] == path
        superblock = Superblock.unpack(Path(path).read_bytes()[:PAGE_SIZE_BYTES])
        assert superblock == Superblock(kind, PAGE_SIZE_BYTES, pages[kind], welcome["uuid"])
        status = os.stat(path)
        assert status.st_size == superblock.length_bytes
        assert status.st_blocks * 512 >= status.st_size


def test_a_region_larger_than_dev_shm_is_refused_and_possible_without_reserve(serve: Serve) -> None:
    file_system = os.statvfs("/dev/shm")
    size = str(2 * file_system.f_frsize * max(file_system.f_blocks, 1 << 20))
    assert_refused(serve(size=size), errno.ENOSPC, "/dev/shm has", "--no-reserve", "--shm-size", "--size")
    coordinator = serve("--no-reserve", size=size)
    assert coordinator.error is None
    assert os.stat(coordinator.region_names[0]).st_blocks * 512 < 1 << 20


def test_it_is_small_when_idle(serve: Serve) -> None:
    coordinator = serve("--hole-policy", "page-cache", size="64MiB")
    status = Path(f"/proc/{coordinator.pid}/status").read_text()
    resident_kib = int(status.split("VmRSS:")[1].split()[0])
    assert resident_kib <= 64 << 10


# --- what it finds ----------------------------------------------------------------------------------------------------


def test_a_second_one_at_the_same_endpoint_is_refused(serve: Serve, endpoint: str) -> None:
    first = serve()
    assert_refused(serve(), errno.EADDRINUSE, f"a coordinator (pid {first.pid}) serves at {endpoint}")
    refused_sweep = sweep(endpoint)
    assert refused_sweep.returncode == 1
    assert f"(pid {first.pid})" in refused_sweep.stderr
    with RawPeer(endpoint) as peer:
        assert peer.hello()["pid"] == first.pid


def test_of_many_that_start_at_once_one_serves(endpoint: str) -> None:
    coordinators = [CoordinatorProcess(endpoint, "--size", "4MiB") for _ in range(5)]
    try:
        for coordinator in coordinators:
            coordinator.wait_ready()
        (server,) = [coordinator for coordinator in coordinators if coordinator.error is None]
        for coordinator in coordinators:
            if coordinator is not server:
                assert_refused(coordinator, errno.EADDRINUSE, f"(pid {server.pid})")
    finally:
        for coordinator in coordinators:
            coordinator.close()
    assert not os.path.exists(endpoint)


def test_what_a_killed_one_left_is_removed_by_the_next(serve: Serve, endpoint: str) -> None:
    killed = serve("--hole-policy", "page-cache")
    left = killed.region_names
    with RawPeer(endpoint) as peer:
        peer.hello()
        killed.end(signal.SIGKILL)
        assert all(os.path.exists(path) for path in [*left, peer.session_path])
        successor = serve()
        assert not any(os.path.exists(path) for path in [*left, peer.session_path])
    with RawPeer(endpoint) as peer:
        assert peer.hello()["pid"] == successor.pid
    assert successor.end() == 0
    assert not os.path.exists(endpoint), "the directory was a coordinator's, if not this one's"


def test_what_a_killed_one_left_can_be_swept(serve: Serve, endpoint: str) -> None:
    assert sweep(endpoint).returncode == 0, "there is nothing to sweep, and that is no error"
    killed = serve("--hole-policy", "page-cache")
    left = killed.region_names
    killed.end(signal.SIGKILL)
    done = sweep(endpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(os.path.exists(path) for path in [*left, endpoint])


def test_stale_sockets_are_no_obstacle(serve: Serve, endpoint: str) -> None:
    os.mkdir(endpoint, 0o700)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{endpoint}/pager.sock")
    Path(endpoint, "control.sock").write_text("not even a socket")
    with RawPeer(serve().endpoint) as peer:
        peer.hello()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\xff"])
def test_a_broken_lock_file_is_no_obstacle(serve: Serve, endpoint: str, text: str) -> None:
    os.mkdir(endpoint, 0o700)
    Path(endpoint, "coordinator.lock").write_text(text, encoding="latin-1")
    with RawPeer(serve().endpoint) as peer:
        peer.hello()


def test_only_regions_are_removed(serve: Serve, endpoint: str) -> None:
    """Whatever a lock file says."""
    os.mkdir(endpoint, 0o700)
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="not-a-region-") as other:
        name = "/" + os.path.basename(other.name)
        Path(endpoint, "coordinator.lock").write_bytes(Record(1, (name,)).encode())
        assert serve().error is None
        assert os.path.exists(other.name)


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_a_directory_that_others_can_enter_is_refused(serve: Serve, endpoint: str) -> None:
    os.mkdir(endpoint)
    os.chmod(endpoint, 0o750)
    assert_refused(serve(), errno.EPERM, "0750", "chmod", endpoint)
    assert os.listdir(endpoint) == []


def test_someone_else_s_directory_is_refused(serve: Serve, endpoint: str) -> None:
    other = "/"  # root's
    if os.geteuid() == 0:
        os.mkdir(endpoint, 0o700)
        os.chown(endpoint, 65534, 65534)
        other = endpoint
    assert_refused(serve(endpoint=other), errno.EPERM, "belongs to user")


def test_a_symbolic_link_is_refused(serve: Serve, endpoint: str) -> None:
    target = endpoint + ".target"
    os.mkdir(target, 0o700)
    os.symlink(target, endpoint)
    assert_refused(serve(), errno.ELOOP, "symbolic link", endpoint)
    assert os.listdir(target) == []


def test_a_file_is_refused(serve: Serve, endpoint: str) -> None:
    Path(endpoint).touch()
    assert_refused(serve(), errno.ENOTDIR, "not a directory", endpoint)


def test_a_missing_parent_is_refused(serve: Serve, endpoint: str) -> None:
    assert_refused(serve(endpoint=f"{endpoint}/below"), errno.ENOENT, "parent", endpoint)


def test_the_longest_path_serves_and_a_longer_one_is_refused(serve: Serve, endpoint: str) -> None:
    longest = endpoint.ljust(107 - len("/control.sock"), "x")
    with RawPeer(serve(endpoint=longest).endpoint) as peer:
        peer.hello()
    assert_refused(serve(endpoint=longest + "x"), errno.ENAMETOOLONG, "at most 94 bytes", longest)


def test_the_refusal_is_one_line_on_stderr(endpoint: str) -> None:
    refused = run_serve("--endpoint", f"{endpoint}/below")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"dax-mp serve: the endpoint's parent directory is not there: {endpoint}\n"


@pytest.mark.parametrize(
    "options",
    [
        ("--size", "lots"),
        ("--size", "0"),
        ("--size", "9EiB"),
        ("--ack-timeout", "0"),
        ("--ack-timeout", "nan"),
        ("--hole-policy", "both"),
        ("--page-cache-size", "-1"),
        ("--delay", "truncate.unmapped"),
        ("--delay", "truncate.unmapped=0"),
        ("--delay", "truncate.unmapped=soon"),
        ("stray",),
    ],
)
def test_wrong_usage(endpoint: str, options: tuple[str, ...]) -> None:
    refused = run_serve("--endpoint", endpoint, *options)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert options[0] in refused.stderr
    assert not os.path.exists(endpoint)


def test_a_delay_at_no_step_is_refused_with_the_steps_that_there_are(endpoint: str) -> None:
    refused = run_serve("--endpoint", endpoint, "--delay", "truncate=1")
    assert refused.returncode == 2
    for step in STEPS:
        assert step in refused.stderr


# --- delays -----------------------------------------------------------------------------------------------------------


def test_a_step_is_delayed_and_nobody_but_who_is_there(serve: Serve) -> None:
    """A write waits at its step; its session and others are served meanwhile. A shorter delay ends by the clock."""
    coordinator = serve("--delay", "write.before_copy=3600", "--delay", "truncate.size_set=0.01")
    with RawPeer(coordinator.endpoint) as writer, RawPeer(coordinator.endpoint) as other:
        for peer in (writer, other):
            peer.hello()
        handle, _, _ = writer.request(Open(1, "delayed", OpenFlag.CREATE))
        writer.send(Write(2, handle, 0, 0, b"data"))
        assert writer.request(Fstat(3, handle))["size_bytes"] == 0  # comes after the write, and is answered before
        handle, _, _ = other.request(Open(1, "other", OpenFlag.CREATE))
        for size_bytes in (PAGE_SIZE_BYTES, 0):
            assert other.request(Truncate(2, handle, size_bytes)) is None
        assert writer.request(Fstat(4, 1))["blocks"] == 1  # a step further, the block is there and the data not


def test_a_page_cache_without_its_policy_is_refused(serve: Serve) -> None:
    assert_refused(serve("--page-cache-size", "1MiB"), errno.EINVAL, "--hole-policy page-cache")


def test_python_without_assertions_is_refused(endpoint: str) -> None:
    refused = run_serve("--endpoint", endpoint, python_options=("-O",))
    assert refused.returncode == 1
    assert "without -O" in refused.stderr


# --- interrupted while it starts --------------------------------------------------------------------------------------


MOMENTS: dict[str, Callable[[int, str], bool]] = {
    "it runs": lambda *_: True,
    "its directory is there": lambda _, endpoint: os.path.exists(endpoint),
    "its lock is there": lambda _, endpoint: os.path.exists(f"{endpoint}/coordinator.lock"),
    "its record is there": lambda _, endpoint: os.path.getsize(f"{endpoint}/coordinator.lock") > 0,
    "its first region is there": lambda pid, _: len(open_regions(pid)) >= 1,
    "its second region is there": lambda pid, _: len(open_regions(pid)) == 2,
    "its sessions are there": lambda _, endpoint: os.path.exists(f"{endpoint}/sessions"),
    "its first socket is there": lambda _, endpoint: os.path.exists(f"{endpoint}/pager.sock"),
    "its second socket is there": lambda _, endpoint: os.path.exists(f"{endpoint}/control.sock"),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whenever_its_start_is_interrupted_nothing_is_left(endpoint: str, moment: str, number: int) -> None:
    """SIGINT ends it in order; what SIGKILL leaves, a sweep finds."""
    coordinator = CoordinatorProcess(endpoint, "--hole-policy", "page-cache", "--size", "64MiB")
    try:
        wait_until(lambda: reached(moment, coordinator))
        regions = open_regions(coordinator.pid)
        code = coordinator.end(number)
    finally:
        coordinator.close()
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0) or moment == "it runs"
    if number == signal.SIGKILL:
        assert sweep(endpoint).returncode == 0
    assert not any(os.path.exists(path) for path in [*regions, endpoint])


def reached(moment: str, coordinator: CoordinatorProcess) -> bool:
    try:
        return MOMENTS[moment](coordinator.pid, coordinator.endpoint)
    except FileNotFoundError:
        return False


def open_regions(pid: int) -> set[str]:
    """The paths of the regions that the process has open."""
    links = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.add(os.readlink(fd))
        except FileNotFoundError:  # closed since
            continue
    return {link for link in links if link.startswith("/dev/shm/dax-mp-")}
