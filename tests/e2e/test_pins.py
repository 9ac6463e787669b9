"""Pages that are pinned: their memory is good for system calls, and stays the file's for as long as it is."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from coordinator_process import Serve
from script_process import Script, ScriptProcess

PAGE: Final = os.sysconf("SC_PAGESIZE")
PAGES: Final = 8


@pytest.fixture
def file(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    with session.open("file", "x+") as file:
        file.truncate(PAGES * PAGE)
        yield file


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_system_calls(file: dax_mp.DaxFile, pipe: tuple[int, int], tmp_path: Any) -> None:
    reader, writer = pipe
    (tmp_path / "other").write_bytes(b"contents of another file")
    other = os.open(tmp_path / "other", os.O_RDWR)
    with file.mmap() as mapping:
        with mapping.pin(PAGE + 10, 2 * PAGE) as view:
            assert (len(view), view.format, view.readonly) == (2 * PAGE, "B", False)
            assert os.preadv(other, [view], 12) == 12
            assert os.write(writer, view[:12]) == 12
            assert os.readv(reader, [view[PAGE : PAGE + 12]]) == 12
            assert os.pwritev(other, [view[:3], view[PAGE : PAGE + 12]], 0) == 15
        with pytest.raises(ValueError):
            view[0]
        assert mapping[PAGE + 10 : PAGE + 22] == mapping[2 * PAGE + 10 : 2 * PAGE + 22] == b"another file"
        assert file.pread(12, PAGE + 10) == b"another file"
    os.close(other)
    assert (tmp_path / "other").read_bytes() == b"anoanother filether file"[:15] + b"ther file"


def test_holes_get_blocks(file: dax_mp.DaxFile) -> None:
    with file.mmap(offset=PAGE) as mapping, mapping.pin(start=PAGE, length=1) as view:
        assert file.stat().blocks == 1
        assert file.seek(0, dax_mp.SEEK_DATA) == 2 * PAGE
        view[0] = 7
        with mapping.pin(PAGE, PAGE) as again:  # as often as one likes
            assert again[0] == 7


def test_a_pin_for_loads(file: dax_mp.DaxFile, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    file.pwrite(b"data", 0)
    with file.mmap(access=dax_mp.ACCESS_READ) as mapping, mapping.pin() as view:
        assert (len(view), view.readonly) == (PAGES * PAGE, True)
        os.writev(writer, [view[:4], view[7 * PAGE : 7 * PAGE + 1]])
        assert os.read(reader, 9) == b"data\0"


def test_a_private_pin(file: dax_mp.DaxFile, pipe: tuple[int, int]) -> None:
    """What comes in is this process's alone."""
    reader, writer = pipe
    os.write(writer, b"data")
    with file.mmap(access=dax_mp.ACCESS_COPY) as mapping:
        with mapping.pin(0, PAGE) as view:
            assert os.readv(reader, [view[:4]]) == 4
        assert mapping[:5] == b"data\0"
    assert file.pread(4, 0) == bytes(4)


def test_what_cannot_be_pinned(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    def error_of(mapping: dax_mp.Mapping, *args: Any) -> Any:
        with pytest.raises((OSError, ValueError, TypeError, OverflowError)) as raised, mapping.pin(*args):
            pass
        return getattr(raised.value, "errno", None) or raised.type

    with file.mmap(2 * PAGES * PAGE, past_eof=True) as mapping:
        for start, length in ((-1, 1), (0, 0), (0, -1), (0, 2 * PAGES * PAGE + 1), (2 * PAGES * PAGE, 1)):
            assert error_of(mapping, start, length) is ValueError
        assert error_of(mapping, "0", 1) is TypeError
        assert error_of(mapping, 0, 1 << 63) is OverflowError
        assert error_of(mapping) == errno.EFAULT  # it reaches past the end of the file
        assert error_of(mapping, PAGES * PAGE, 1) == errno.EFAULT
        mapping.unmap(PAGE, PAGE)
        assert error_of(mapping, 0, 2 * PAGE) == errno.EFAULT
        free = session.statfs().pages_free
        file.truncate((free + 5) * PAGE)
        with file.mmap() as whole:
            assert error_of(whole) == errno.ENOSPC
        assert session.statfs().pages_free == free
    assert error_of(mapping) is ValueError


def test_an_array_that_stays(file: dax_mp.DaxFile) -> None:
    """It is one of the mapping from then on: the pin is over."""
    file.pwrite(b"data", 0)
    mapping = file.mmap()
    with mapping.pin(0, PAGE) as view:
        array = np.frombuffer(view, "u1")
    assert bytes(array[:4]) == b"data"
    with pytest.raises(BufferError):
        mapping.close()
    file.truncate(0)
    with pytest.raises(dax_mp.BusError):
        array.tobytes()
    file.truncate(PAGE)
    assert bytes(array[:4]) == bytes(4)
    del array
    mapping.close()


def test_a_pinned_mapping_is_not_closed(file: dax_mp.DaxFile) -> None:
    with file.mmap() as mapping, mapping.pin(0, PAGE) as view:
        with pytest.raises(BufferError):
            mapping.close()
        with pytest.raises(OSError) as raised:
            mapping.unmap(0, PAGE)
        assert raised.value.errno == errno.EBUSY
        view[0] = 1
        mapping.unmap(PAGE, PAGE)


# --- beside others ----------------------------------------------------------------------------------------------------

CHANGER: Final = """
import errno, sys, time
import dax_mp
with dax_mp.connect(sys.argv[1]) as session, session.open("file", "r+") as file:
    print("ready", flush=True)
    input()
    try:
        print(eval(sys.argv[2]), flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
    print(time.monotonic_ns(), file.size)
"""

PINNER: Final = """
import sys
import dax_mp
with dax_mp.connect(sys.argv[1]) as session, session.open("file", "r+") as file, file.mmap() as mapping:
    with mapping.pin(0, 100) as view:
        print("pinned", flush=True)
        input()
"""


@pytest.fixture
def served(serve: Serve) -> Iterator[Callable[[float], tuple[dax_mp.Session, dax_mp.DaxFile]]]:
    """A function that serves a full file, with this ack timeout in seconds."""
    with ExitStack() as stack:

        def start(ack_timeout_s: float) -> tuple[dax_mp.Session, dax_mp.DaxFile]:
            coordinator = serve("--ack-timeout", str(ack_timeout_s))
            session = stack.enter_context(dax_mp.connect(coordinator.endpoint))
            file = stack.enter_context(session.open("file", "x+"))
            file.write(b"x" * (PAGES * PAGE))
            return session, file

        yield start


def changer(script: Script, session: dax_mp.Session, change: str) -> ScriptProcess:
    """Another process that is about to do this to the file."""
    process = script(CHANGER, session.endpoint, change)
    assert process.line() == "ready"
    return process


TAKING: Final = [
    "file.truncate(0)",
    f"file.punch_hole({PAGE}, {PAGE})",
    f"file.zero_range({PAGE}, {PAGE})",
    f"file.collapse_range(0, {PAGE})",
    f"file.insert_range(0, {PAGE})",
]


@pytest.mark.parametrize("change", TAKING)
def test_who_would_take_the_pages_waits(served: Any, script: Script, change: str) -> None:
    session, file = served(60)
    process = changer(script, session, change)
    with file.mmap() as mapping, mapping.pin(PAGE, PAGE) as view:
        process.go_on()
        for turn in range(50):  # what does not wait has been done by then
            assert bytes(view) == bytes([turn or ord("x")]) * PAGE
            view[:] = bytes([turn + 1]) * PAGE
            assert file.stat().size_bytes == PAGES * PAGE
        before_ns = time.monotonic_ns()
    code, output, errors = process.end()
    assert (code, errors) == (0, "")
    done, after = output.splitlines()
    assert done in ("None", "0")
    assert int(after.split()[0]) > before_ns


@pytest.mark.parametrize("change", TAKING)
def test_a_pin_its_holders_pwrite_and_anothers_truncate_do_not_stand_still(
    served: Any, script: Script, change: str
) -> None:
    """README's example: were the pwrite to wait for the truncate, that would wait for the pin until its deadline."""
    session, file = served(30)
    process = changer(script, session, change)
    with file.mmap() as mapping, mapping.pin(PAGE, PAGE) as view:
        process.go_on()
        for _ in range(50):  # the other waits by then
            assert file.pwrite(view, 2 * PAGE) == PAGE
            assert file.pread(PAGE, 2 * PAGE) == bytes(view)
    assert process.line() in ("None", "0"), "it has waited for the pin in vain"


WRITER: Final = """
import sys
import dax_mp
page, pages = map(int, sys.argv[2:])
with dax_mp.connect(sys.argv[1]) as session, session.open("file", "r+") as file, file.mmap() as mapping:
    print("ready", flush=True)
    input()
    for index in range(pages):
        if index % 2:
            mapping[index * page] = 7
        else:
            file.pwrite(b"\\7", index * page)
    print("done", flush=True)
"""


def test_a_pin_of_a_read_only_mapping_allocates_no_hole_and_no_system_call_fails(
    session: dax_mp.Session, script: Script
) -> None:
    """Not while another process fills the holes either: the blocks come in the place of the hole pages."""
    pages = 1000
    memory = os.memfd_create("copy")
    with session.open("file", "x+") as file:
        file.truncate(pages * PAGE)
        process = script(WRITER, session.endpoint, str(PAGE), str(pages))
        assert process.line() == "ready"
        with file.mmap(access=dax_mp.ACCESS_READ) as mapping, mapping.pin() as view:
            assert file.stat().blocks == 0
            process.go_on()
            calls = 0
            while file.stat().blocks < pages:
                assert os.pwrite(memory, view, 0) == pages * PAGE, "a page was missing"
                calls += 1
            assert process.line() == "done"
            assert os.pwrite(memory, view, 0) == pages * PAGE
            assert os.pread(memory, pages * PAGE, 0)[::PAGE] == b"\7" * pages
        assert calls > 1
    os.close(memory)
    assert process.end()[0] == 0


def test_a_pin_of_a_large_sparse_range_is_refused_at_once(session: dax_mp.Session) -> None:
    """64 GiB of a file on a device of 64 MiB; nobody else waits for it, and the coordinator does not grow."""
    before_kb = resident_kb(session.coordinator_pid)
    with session.open("file", "x+") as file:
        file.truncate(64 << 30)
        with file.mmap() as mapping:
            with pytest.raises(OSError) as raised, mapping.pin():
                pass
            assert raised.value.errno == errno.ENOSPC
        assert file.stat().blocks == 0
    assert resident_kb(session.coordinator_pid) < before_kb + (50 << 10)


def resident_kb(pid: int) -> int:
    """The most memory that the process has had."""
    with open(f"/proc/{pid}/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1])


@pytest.mark.parametrize("change", TAKING)
def test_who_waits_for_too_long_gets_ebusy(served: Any, script: Script, change: str) -> None:
    session, file = served(0.2)
    process = changer(script, session, change)
    with file.mmap() as mapping, mapping.pin(PAGE, PAGE) as view:
        process.go_on()
        assert process.line() == "EBUSY"
        assert bytes(view) == b"x" * PAGE
        assert file.pread(10 * PAGE, 0) == b"x" * (PAGES * PAGE)
    file.truncate(0)


def test_what_leaves_the_pages_alone_does_not_wait(served: Any, script: Script) -> None:
    session, file = served(60)
    with file.mmap() as mapping, mapping.pin(PAGE, PAGE):
        for change in (f"file.truncate({2 * PAGE})", f"file.punch_hole(0, {PAGE})", f"file.pwrite(b'w', {PAGE})"):
            process = changer(script, session, change)
            process.go_on()
            assert process.end()[0] == 0
        assert mapping[PAGE] == ord("w")


def test_a_killed_process_has_no_pins(served: Any, script: Script) -> None:
    """Who waits for them goes on then, long before the deadline."""
    session, file = served(3600)
    pinner = script(PINNER, session.endpoint)
    assert pinner.line() == "pinned"
    process = changer(script, session, "file.truncate(0)")
    process.go_on()
    os.kill(pinner.pid, signal.SIGKILL)
    assert process.line() == "0"
    assert file.size == 0


@pytest.mark.forks
def test_a_child_has_no_pins(served: Any, script: Script) -> None:
    """A fork copies the view, and not what holds the pages."""
    session, file = served(3600)
    process = script(
        """
import os, sys, warnings
import dax_mp
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
with dax_mp.connect(sys.argv[1]) as session, session.open("file", "r+") as file, file.mmap() as mapping:
    with mapping.pin(0, 100) as view:
        if not (pid := os.fork()):
            os.write(1, bytes(view[:3]) + b"\\n")
            input()
            try:
                bytes(view)
            except dax_mp.BusError as error:
                print(error.strerror, flush=True)
            os._exit(0)
    os.write(1, b"parent\\n")
    os.waitpid(pid, 0)
""",
        session.endpoint,
    )
    assert {process.line(), process.line()} == {"xxx", "parent"}
    file.truncate(0)
    process.go_on()
    assert process.end() == (0, "access past the end of the file (at offset 0)\n", "")


def test_a_pin_whose_coordinator_ends(serve: Serve) -> None:
    """The memory is there until the end of it; that it is over cannot be said any more."""
    coordinator = serve()
    with dax_mp.connect(coordinator.endpoint) as session, session.open("file", "x+") as file:
        file.write(b"x" * PAGE)
        mapping = file.mmap()

        def store() -> None:
            with mapping.pin() as view:
                coordinator.end(signal.SIGKILL)
                view[0] = 7
                assert bytes(view) == b"\7" + b"x" * (PAGE - 1)

        with pytest.raises(ConnectionError):
            store()
        with pytest.raises(ConnectionError), mapping.pin():
            pass
        mapping.close()
    serve()  # and it sweeps up what that one has left
