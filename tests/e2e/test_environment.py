"""Machines on which something is missing, full or read-only: one line that says so, and nothing is left."""

import os
import subprocess
from typing import Final

import pytest

import dax_mp
from coordinator_process import serve_command, wait_until
from namespaces import has_namespaces, in_namespace

TIMEOUT_S: Final = 60

SERVE: Final = "$PYTHON -P -m dax_mp.daemons.serve --size 1MiB --endpoint /run/e"
NO_DEVICES: Final = "mount -t tmpfs tmpfs /dev; : >/dev/null; : >/dev/urandom"

CASES: Final = {
    "a read-only /dev/shm": ("mount -t tmpfs -o ro tmpfs /dev/shm", "cannot make a region: Read-only file system"),
    "a full /dev/shm": (
        "mount -t tmpfs -o size=8k tmpfs /dev/shm; head -c 8192 /dev/zero >/dev/shm/x", "a region: No space left",
    ),
    "a small /dev/shm": ("mount -t tmpfs -o size=64k tmpfs /dev/shm", "/dev/shm has 6"),
    "a /dev/shm without inodes": ("mount -t tmpfs -o nr_inodes=1 tmpfs /dev/shm", "a region: No space left"),
    "no /dev/shm": (NO_DEVICES, "this system has no /dev/shm"),
    "a read-only /run": ("mount -t tmpfs -o ro tmpfs /run", "directory: Read-only file system: /run/e"),
    "a /run without inodes": ("mount -t tmpfs -o nr_inodes=1 tmpfs /run", "directory: No space left on device: /run/e"),
    "no inode for the lock file": (
        "mount -t tmpfs -o nr_inodes=2 tmpfs /run; mkdir -m 700 /run/e", "lock file: No space left on device: /run/e/",
    ),
    "no block for the lock file": (
        "mount -t tmpfs -o size=4k tmpfs /run; head -c 4096 /dev/zero >/run/x",
        "cannot write the lock file: No space left on device: /run/e/coordinator.lock",
    ),
    "no /proc": ("umount -l /proc", "/proc"),
}  # fmt: skip


@has_namespaces
@pytest.mark.parametrize("case", CASES)
def test_what_a_coordinator_lacks_is_said_in_one_line(case: str) -> None:
    prepare, words = CASES[case]
    if case == "no /proc" and os.geteuid() != 0:
        pytest.skip("only root can unmount /proc")
    done = in_namespace(f'{prepare}; said=$({SERVE} 2>&1) || echo $?; echo "$said"; ls /run')
    code, line, *left = done.stdout.splitlines()
    assert (code, done.stderr) == ("1", ""), done
    assert line.startswith("dax-mp serve: ")
    assert words in line
    assert "e" not in left or case == "no inode for the lock file"  # that was there


def test_without_home_and_environment_a_coordinator_serves(endpoint: str) -> None:
    """And whatever descriptors its parent has closed: nothing that is written to stderr gets into a file of ours."""
    shell = ["sh", "-c", 'exec 0<&- 1>&- 2>&-; exec "$@"', "sh"]
    command = [*shell, *serve_command("--endpoint", endpoint, "--size", "4MiB", "--exit-with", str(os.getpid()))]
    environment = {name: value for name, value in os.environ.items() if name in ("PYTHONPATH", "DAX_MP_TEST_ROOT")}
    with subprocess.Popen(command, env=environment) as process:
        wait_until(lambda: os.path.exists(f"{endpoint}/control.sock"))
        with dax_mp.connect(endpoint) as session:
            assert session.listdir() == []
        links = [os.readlink(f"/proc/{process.pid}/fd/{descriptor}") for descriptor in (0, 1, 2)]
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
    assert links == [os.devnull] * 3
