"""Whose endpoint it is: clients and coordinators use nothing that another user can have made or can change."""

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import dax_mp
from coordinator_process import CoordinatorProcess, Serve
from namespaces import UID, has_namespaces, in_namespace

OTHER_UID: Final = 65534
TIMEOUT_S: Final = 60

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to another user")


def assert_refused(endpoint: str, code: int, *words: str) -> None:
    """connect() fails, at once and in these words, and has left nothing."""
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(OSError) as raised:
        dax_mp.connect(endpoint)
    assert raised.value.errno == code, raised.value
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def assert_serve_refused(coordinator: CoordinatorProcess, code: int, *words: str) -> None:
    assert coordinator.error is not None
    assert coordinator.error["errno"] == code, coordinator.error
    for word in words:
        assert word in coordinator.error["error"]
    assert coordinator.wait() == 1
    assert coordinator.stderr == ""


# --- the directory ----------------------------------------------------------------------------------------------------


_SERVE_AS: Final = """
import os, sys
import encodings.ascii
import dax_mp.daemons.start  # while what is imported can still be read
from dax_mp.daemons.serve import _parser, main
uid = int(sys.argv.pop(1))
_parser().parse_args()
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
sys.exit(main())
"""


@pytest.fixture
def public() -> Iterator[str]:
    """A directory like /tmp: everybody may make something in it."""
    with tempfile.TemporaryDirectory(prefix="dax-mp-public-", dir="/tmp") as directory:
        os.chmod(directory, 0o1777)
        yield directory


@as_root
def test_clients_do_not_use_an_endpoint_that_another_user_made_first(public: str) -> None:
    """With a coordinator of that user's in it, and for root too."""
    endpoint = os.path.join(public, "endpoint")
    options = [str(OTHER_UID), "--endpoint", endpoint, "--size", "4MiB"]
    command = [sys.executable, "-P", "-c", _SERVE_AS, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as squatter:
        assert squatter.stdout is not None
        assert "serving" in squatter.stdout.readline()
        assert_refused(endpoint, errno.EPERM, f"belongs to user {OTHER_UID}, not to 0", f"sudo -u '#{OTHER_UID}'")
        squatter.terminate()
    assert squatter.returncode == 0


def test_someone_elses_directory_is_refused_by_clients(endpoint: str) -> None:
    if os.geteuid() == 0:
        os.mkdir(endpoint, 0o700)
        os.chown(endpoint, OTHER_UID, OTHER_UID)
    assert_refused(endpoint if os.geteuid() == 0 else "/dev", errno.EPERM, f"not to {os.geteuid()}")


def test_a_directory_that_others_can_enter_is_refused_by_clients(serve: Serve) -> None:
    coordinator = serve()
    os.chmod(coordinator.endpoint, 0o711)
    assert_refused(coordinator.endpoint, errno.EPERM, "0711", "chmod it to 0700")
    os.chmod(coordinator.endpoint, 0o1700)
    dax_mp.connect(coordinator.endpoint).close()


def test_a_link_to_an_endpoint_is_refused_by_clients(serve: Serve) -> None:
    coordinator = serve()
    link = coordinator.endpoint + ".link"
    os.symlink(coordinator.endpoint, link)
    for path in (link, link + "/"):
        assert_refused(path, errno.ELOOP, "symbolic link")


def test_a_fifo_as_the_endpoint_hangs_nobody(serve: Serve, endpoint: str) -> None:
    os.mkfifo(endpoint, 0o600)
    assert_refused(endpoint, errno.ENOTDIR, "not a directory")
    assert_serve_refused(serve(), errno.ENOTDIR, "not a directory")


# --- the lock file ----------------------------------------------------------------------------------------------------


@pytest.fixture
def lock(endpoint: str) -> Path:
    """Where the lock file is to be, in a directory of ours."""
    os.mkdir(endpoint, 0o700)
    return Path(endpoint, "coordinator.lock")


def test_a_fifo_named_coordinator_lock_hangs_nobody(serve: Serve, lock: Path) -> None:
    os.mkfifo(lock, 0o600)
    assert_refused(str(lock.parent), errno.EPERM, "plain file", str(lock))
    assert_serve_refused(serve(), errno.EPERM, "plain file", str(lock))
    assert stat.S_ISFIFO(lock.lstat().st_mode)


def test_a_socket_or_directory_named_coordinator_lock_is_refused(serve: Serve, lock: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(lock))
    assert_refused(str(lock.parent), errno.ENXIO, str(lock))
    assert_serve_refused(serve(), errno.ENXIO, str(lock))
    lock.unlink()
    lock.mkdir()
    assert_refused(str(lock.parent), errno.EPERM, str(lock))
    assert_serve_refused(serve(), errno.EISDIR, str(lock))


def test_a_link_named_coordinator_lock_is_not_followed(serve: Serve, lock: Path) -> None:
    target = lock.parent / "target"
    target.write_text("precious")
    lock.symlink_to(target)
    assert_refused(str(lock.parent), errno.ELOOP, str(lock))
    assert_serve_refused(serve(), errno.ELOOP, str(lock))
    assert target.read_text() == "precious"


def test_a_hard_link_named_coordinator_lock_is_not_overwritten(serve: Serve, lock: Path) -> None:
    target = lock.parent / "target"
    target.write_text("precious")
    lock.hardlink_to(target)
    assert_refused(str(lock.parent), errno.EPERM, "hard link", str(lock))
    assert_serve_refused(serve(), errno.EPERM, "hard link", str(lock))
    assert target.read_text() == "precious"


@as_root
def test_another_users_lock_file_is_refused(serve: Serve, lock: Path) -> None:
    lock.touch()
    os.chown(lock, OTHER_UID, OTHER_UID)
    assert_refused(str(lock.parent), errno.EPERM, f"belongs to user {OTHER_UID}")
    assert_serve_refused(serve(), errno.EPERM, f"belongs to user {OTHER_UID}")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 5_000, b'{"region_names": [], "pid": 1e400, "version": 1}', bytes(range(256)) * 64, b"1" * (1 << 20),
        b'{"region_names": {"a": 1}, "pid": {}, "version": null}',
    ],
    ids=["nested", "1e400", "binary", "huge", "ill-typed"],
)  # fmt: skip
def test_a_malformed_lock_file_stops_no_coordinator(serve: Serve, lock: Path, content: bytes) -> None:
    lock.write_bytes(content)
    coordinator = serve()
    assert coordinator.error is None
    dax_mp.connect(coordinator.endpoint).close()


def test_a_lock_file_of_a_terabyte_is_not_read(serve: Serve, lock: Path) -> None:
    with lock.open("wb") as file:
        file.truncate(1 << 40)
    assert serve().error is None
    assert lock.stat().st_size < 1 << 16


def test_sessions_that_are_a_link_are_refused(serve: Serve, lock: Path) -> None:
    target = lock.parent.parent / "target"
    target.mkdir(0o700)
    (target / ("0" * 32)).touch()
    (lock.parent / "sessions").symlink_to(target)
    assert_serve_refused(serve(), errno.ELOOP)
    assert len(list(target.iterdir())) == 1


# --- sockets and regions ----------------------------------------------------------------------------------------------

_LISTENER: Final = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
os.setuid(int(sys.argv[2]))
listener.listen()
print("listening", flush=True)
connection, _ = listener.accept()
print(len(connection.recv(1 << 16)), flush=True)
"""


@as_root
@pytest.mark.parametrize("name", ["control.sock", "pager.sock"])
def test_nothing_is_sent_to_another_users_process(serve: Serve, name: str) -> None:
    """Even where it has got into our directory: the kernel says who listens."""
    coordinator = serve()
    path = f"{coordinator.endpoint}/{name}"
    os.unlink(path)
    command = [sys.executable, "-P", "-c", _LISTENER, path, str(OTHER_UID)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        with pytest.raises(PermissionError):
            dax_mp.connect(coordinator.endpoint)
        assert listener.stdout.readline() == "0\n"


def test_another_process_than_the_coordinator_is_not_spoken_to(serve: Serve) -> None:
    coordinator = serve()
    path = f"{coordinator.endpoint}/control.sock"
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        assert_refused(coordinator.endpoint, errno.ECONNREFUSED, f"(pid {coordinator.pid}) lives", "replaced")


@as_root
def test_another_users_region_is_not_mapped(serve: Serve) -> None:
    coordinator = serve()
    (region,) = coordinator.region_names
    os.chown(region, OTHER_UID, OTHER_UID)
    assert_refused(coordinator.endpoint, errno.EPERM, f"belongs to user {OTHER_UID}")


def test_sessions_begin_whatever_the_umask_is(serve: Serve) -> None:
    """The session's file can be opened by the coordinator, and the coordinator's by itself."""
    mask = os.umask(0o777)
    try:
        coordinator = serve()
        assert coordinator.error is None
        dax_mp.connect(coordinator.endpoint).close()
    finally:
        os.umask(mask)


# --- a directory that is replaced -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["renamed", "removed", "emptied"])
def test_a_coordinator_removes_nothing_of_its_successor(serve: Serve, endpoint: str, how: str) -> None:
    first = serve()
    regions = first.region_names
    with dax_mp.connect(endpoint) as session:
        session.open("kept", "x").close()
        if how == "renamed":
            os.rename(endpoint, endpoint + ".old")
        elif how == "removed":
            shutil.rmtree(endpoint)
        else:
            for path in Path(endpoint).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        successor = serve()
        assert successor.error is None
        assert session.listdir() == ["kept"], "sessions of the first go on"
        with dax_mp.connect(endpoint) as other:
            assert other.coordinator_pid == successor.pid
            assert first.end() == 0
            other.open("new", "x").close()
        assert not any(map(os.path.exists, regions))
        with dax_mp.connect(endpoint) as other:
            assert other.listdir() == ["new"]
    assert successor.end() == 0
    assert not os.path.exists(endpoint)
    if how == "renamed":
        assert os.listdir(endpoint + ".old") == []


def test_a_coordinator_whose_lock_file_was_removed_leaves_nothing(serve: Serve, endpoint: str) -> None:
    coordinator = serve()
    os.unlink(f"{endpoint}/coordinator.lock")
    assert coordinator.end() == 0
    assert not os.path.exists(endpoint)


def test_what_a_successor_left_is_not_lost_with_its_lock_file(serve: Serve, endpoint: str) -> None:
    """The successor was killed, and its regions are known from its lock file alone."""
    first = serve()
    os.unlink(f"{endpoint}/coordinator.lock")
    successor = serve()
    assert successor.error is None
    regions = successor.region_names
    successor.end(signal.SIGKILL)
    assert first.end() == 0
    assert all(map(os.path.exists, regions))
    assert serve().error is None
    assert not any(map(os.path.exists, regions))


# --- the default endpoint ---------------------------------------------------------------------------------------------


_CONNECT: Final = "$PYTHON -P -c 'import dax_mp; print(dax_mp.connect().endpoint)'"
_START: Final = (
    "$PYTHON -P -m dax_mp.daemons.serve --size 4MiB --no-reserve >/tmp/said & read line <<E\n"
    "$(until grep -qs serving /tmp/said || ! kill -0 $!; do sleep 0.05; done)\nE\n"
)


@has_namespaces
@pytest.mark.parametrize("runtime_directory", [True, False])
def test_cron_and_a_login_shell_meet_at_the_default_endpoint(runtime_directory: bool) -> None:
    """XDG_RUNTIME_DIR and TMPDIR, which the two set differently, make no difference."""
    make = "mkdir -p /run/user; mkdir -m 700 /run/user/$UID_;" if runtime_directory else ""
    script = (
        f"{make} mkdir -m 700 /tmp/other; unset DAX_MP_ENDPOINT\n"
        f"export XDG_RUNTIME_DIR=/run/user/$UID_ TMPDIR=/tmp\n{_START}"
        f"unset XDG_RUNTIME_DIR TMPDIR; {_CONNECT}; export XDG_RUNTIME_DIR=/tmp/other TMPDIR=/tmp/other; {_CONNECT}\n"
        "kill $!; wait $!"
    )
    done = in_namespace(script)
    expected = f"/run/user/{UID}/dax-mp" if runtime_directory else f"/tmp/dax-mp-{UID}"
    assert (done.returncode, done.stdout.split()) == (0, [expected, expected]), done.stderr


@has_namespaces
def test_a_coordinator_from_before_the_login_is_found_and_stays_the_only_one() -> None:
    """The user's runtime directory comes with the first login, and goes with the last."""
    script = (
        f"unset DAX_MP_ENDPOINT\n{_START}mkdir -p /run/user; mkdir -m 700 /run/user/$UID_; {_CONNECT}\n"
        "$PYTHON -P -m dax_mp.daemons.serve --size 4MiB 2>&1 || true; kill $!; wait $!"
    )
    done = in_namespace(script)
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()
    assert found == f"/tmp/dax-mp-{UID}"
    assert f"serves at {found} already" in refused


@has_namespaces
def test_the_message_says_where_it_looked() -> None:
    done = in_namespace(f"unset DAX_MP_ENDPOINT; mkdir -m 755 /tmp/dax-mp-$UID_; {_CONNECT} 2>&1 | tail -1")

    assert f"serves at /run/user/{UID}/dax-mp, nor at /tmp/dax-mp-{UID} (the endpoint's mode is 0755" in done.stdout
    assert "start one with: dax-mp serve: " in done.stdout
