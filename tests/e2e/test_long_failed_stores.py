"""A store over a large range past the end, or on a full device: bounded memory, few round trips, and an error."""

import json
import os
from typing import Final

import pytest

import dax_mp
from script_process import Script

PAGE: Final = os.sysconf("SC_PAGESIZE")
MAPPED_BYTES: Final = 1 << 30

STORE: Final = """
import errno, json, resource, sys
import numpy as np
import dax_mp

endpoint, case, length = sys.argv[1], sys.argv[2], int(sys.argv[3])

def store(view):
    np.frombuffer(view, np.uint8)[:] = 1

def store_in_steps(view):
    np.frombuffer(view, np.uint8)[::4096] = 1

def add(view):
    array = np.frombuffer(view, np.uint8)
    array += 1

def resident():  # VmHWM: the peak
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

with dax_mp.connect(endpoint) as session, session.open("file", "r+") as file:
    access = dax_mp.ACCESS_COPY if case == "private" else dax_mp.ACCESS_WRITE
    with file.mmap(length, access=access, past_eof=True) as mapping:
        view = memoryview(mapping)
        if case == "closed":
            session.close()
        before, results = resident(), []
        # On a full device the loads of `add` are good: they find the hole, page by page.
        for access in (store, store_in_steps, store if case == "full" else add):
            faults = 0 if case == "closed" else session.counters()["faults"]
            try:
                access(view)
                int("5")
            except dax_mp.BusError as error:
                results.append(errno.errorcode[error.errno])
            if case != "closed":
                results.append(session.counters()["faults"] - faults)
        if case != "closed":
            try:
                mapping[length - 1] = 1
            except dax_mp.BusError as error:  # no scratch page is left
                results.append(errno.errorcode[error.errno])
        print(json.dumps([resident() - before, results]), flush=True)
        view.release()
"""


def run(script: Script, daemon: dax_mp.Daemon, case: str, length: int) -> tuple[int, list[str], list[int]]:
    """How much memory it took, the errors, and how many faults each store took."""
    process = script(STORE, daemon.endpoint, case, str(length))
    code, output, errors = process.end()
    assert (code, errors) == (0, "")
    resident_bytes, results = json.loads(output)
    return (
        resident_bytes,
        [result for result in results if isinstance(result, str)],
        [result for result in results if isinstance(result, int)],
    )


@pytest.mark.parametrize("case", ["shared", "private"])
def test_a_store_over_a_large_range_past_the_end(
    daemon: dax_mp.Daemon, session: dax_mp.Session, script: Script, case: str
) -> None:
    with session.open("file", "x+") as file:
        file.truncate(PAGE)
        resident_bytes, errors, faults = run(script, daemon, case, MAPPED_BYTES)
        assert errors == ["EFAULT"] * 4
        assert max(faults) < 3 * MAPPED_BYTES // (2 << 20)
        assert resident_bytes < 128 << 20
        assert file.pread(PAGE, 0) == (b"\2" if case == "shared" else b"\0") * PAGE
        assert file.size == PAGE
        session.unlink("file")


def test_a_store_over_a_large_range_on_a_full_device(script: Script) -> None:
    """Blocks that are there among the holes are stored to."""
    with (
        dax_mp.launch(size=256 * PAGE, debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("file", "x+") as file,
        session.open("rest", "x+") as rest,
    ):
        file.truncate(MAPPED_BYTES)
        for place in (0, MAPPED_BYTES // 2, MAPPED_BYTES - PAGE):
            file.pwrite(b"." * PAGE, place)
        file.fallocate(MAPPED_BYTES // 4, PAGE)
        rest.fallocate(0, session.statfs().pages_free * PAGE)
        resident_bytes, errors, faults = run(script, daemon, "full", MAPPED_BYTES)
        assert errors == ["ENOSPC"] * 3  # the last page has a block
        assert max(faults) < 4 * MAPPED_BYTES // (2 << 20)
        assert resident_bytes < 128 << 20
        assert file.pread(2, 5) == file.pread(2, MAPPED_BYTES // 2) == b"\1\1"
        assert file.pread(1, MAPPED_BYTES // 4 + 5) == b"\1"
        assert file.pread(PAGE, PAGE) == bytes(PAGE)


def test_a_store_over_a_large_range_of_a_session_that_is_closed(
    daemon: dax_mp.Daemon, session: dax_mp.Session, script: Script
) -> None:
    with session.open("file", "x+") as file:
        file.truncate(MAPPED_BYTES)
        resident_bytes, errors, _ = run(script, daemon, "closed", MAPPED_BYTES)
        assert errors == ["ESTALE"] * 3
        assert resident_bytes < 128 << 20
        assert file.stat().blocks == 0
        session.unlink("file")
