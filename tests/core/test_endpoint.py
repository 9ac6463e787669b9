"""The names in an endpoint, and the bytes that say who holds it."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dax_mp.endpoint import (
    LOCK_QUERY,
    SOCKET_PATH_BYTES_MAX,
    Record,
    check_endpoint,
    control_address,
    control_path,
    default_endpoints,
    is_session_name,
    lock_holder,
    pager_address,
    region_name,
    session_path,
)
from dax_mp.errors import ProtocolError
from dax_mp.superblock import SUPERBLOCK_BYTES, Superblock


@pytest.mark.parametrize(
    ("environment", "endpoints"),
    [
        ({"DAX_MP_ENDPOINT": "/here", "XDG_RUNTIME_DIR": "/elsewhere"}, ("/here",)),
        ({"DAX_MP_ENDPOINT": "", "XDG_RUNTIME_DIR": ""}, ("/run/user/7/dax-mp", "/tmp/dax-mp-7")),
        ({"XDG_RUNTIME_DIR": "/elsewhere", "TMPDIR": "/var/tmp"}, ("/run/user/7/dax-mp", "/tmp/dax-mp-7")),
        ({}, ("/run/user/7/dax-mp", "/tmp/dax-mp-7")),
    ],
)
def test_the_endpoints_of_a_user_who_names_none(environment: dict[str, str], endpoints: tuple[str, ...]) -> None:
    assert default_endpoints(environment, 7) == endpoints


def test_names() -> None:
    token = bytes(range(16))
    assert session_path("/e", token) == "/e/sessions/000102030405060708090a0b0c0d0e0f"
    assert is_session_name(token.hex())
    assert not is_session_name(token.hex()[1:])
    assert not is_session_name("../coordinator.lock")
    assert (pager_address("/e"), control_address("/e")) == ("ipc:///e/pager.sock", "ipc:///e/control.sock")


def test_a_path_that_no_socket_can_have() -> None:
    """In bytes, whatever the characters."""
    for character in ("x", "\N{BLACK CHESS KNIGHT}"):
        endpoint = "/"
        while len(os.fsencode(control_path(endpoint + character))) <= SOCKET_PATH_BYTES_MAX:
            endpoint += character
        check_endpoint(endpoint)
        with pytest.raises(OSError, match="at most 94 bytes") as caught:
            check_endpoint(endpoint + character)
        assert caught.value.errno == errno.ENAMETOOLONG


def test_a_record_is_read_as_it_was_written() -> None:
    names = (region_name("0" * 16, "pmem"), region_name("f" * 16, "dram"))
    record = Record(12, names)
    assert Record.decode(record.encode()) == record


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff", b"[]", b"{}", b"null", b'{"pid": 1', b'{"pid": "x", "region_names": []}', b"[" * 5_000,
        b'{"region_names": [], "pid": 1e400, "version": 1}', b'{"region_names": [], "pid": NaN, "version": 1}',
        b'{"region_names": [[]], "pid": 1, "version": 1}', b"1" * 100_000, bytes(range(256)),
    ],
)  # fmt: skip
def test_a_record_that_is_none(data: bytes) -> None:
    assert Record.decode(data) is None


def test_a_record_names_regions_and_nothing_else() -> None:
    good = region_name("0" * 16, "pmem")
    names = ("/etc/passwd", "/dax-mp-../../etc", good + "x", good)
    record = Record.decode(Record(1, names).encode())
    assert record is not None
    assert record.region_names == (good,)


def test_the_kernel_says_who_holds_a_lock(tmp_path: Path) -> None:
    """struct flock is what this system has it to be."""
    path = tmp_path / "lock"
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with path.open("w") as file:
        assert lock_holder(fcntl.fcntl(file, fcntl.F_GETLK, LOCK_QUERY)) is None
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", script, str(path)], stdin=pipe, stdout=pipe) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            assert lock_holder(fcntl.fcntl(file, fcntl.F_GETLK, LOCK_QUERY)) == holder.pid
            holder.kill()
        assert lock_holder(fcntl.fcntl(file, fcntl.F_GETLK, LOCK_QUERY)) is None


def test_a_superblock_is_read_as_it_was_written() -> None:
    superblock = Superblock("pmem", 16384, 5, bytes(range(16)))
    assert superblock.length_bytes == 6 * 16384
    assert len(superblock.pack()) == SUPERBLOCK_BYTES
    assert Superblock.unpack(superblock.pack() + b"more") == superblock


@pytest.mark.parametrize("data", [b"", Superblock("dram", 4096, 1, bytes(16)).pack()[:-1], bytes(4096)])
def test_what_is_no_superblock_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a region"):
        Superblock.unpack(data)
