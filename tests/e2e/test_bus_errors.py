"""Every method of a mapping raises BusError at the very access that has nothing to map, and says why."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from coordinator_process import Serve, wait_until
from script_process import Script

PAGE: Final = os.sysconf("SC_PAGESIZE")
HERE: Final = 3 * PAGE + 9
"""Where the accesses go, in a mapping of 8 pages whose first 2 pages are there."""

Access = Callable[[dax_mp.Mapping], Any]


def at(method: str, *args: Any) -> Access:
    """A method that uses the position."""

    def access(mapping: dax_mp.Mapping) -> None:
        mapping.seek(HERE)
        try:
            getattr(mapping, method)(*args)
        finally:
            assert mapping.tell() == HERE  # what was not done has not moved it

    return access


def iterate(mapping: dax_mp.Mapping) -> None:
    seen = 0
    try:
        for _ in mapping:
            seen += 1
    finally:
        assert seen == 2 * PAGE


LOADS: Final[dict[str, tuple[Access, int]]] = {
    "index": (lambda mapping: mapping[HERE], HERE),
    "negative index": (lambda mapping: mapping[HERE - 8 * PAGE], HERE),
    "slice": (lambda mapping: mapping[HERE : HERE + 5], HERE),
    "slice across": (lambda mapping: mapping[PAGE : 3 * PAGE], 2 * PAGE),
    "slice with a step": (lambda mapping: mapping[9 :: 3 * PAGE], HERE),
    "slice backwards": (lambda mapping: mapping[HERE :: -(3 * PAGE)], HERE),
    "read": (at("read", 5), HERE),
    "read all": (at("read"), HERE),
    "read_byte": (at("read_byte"), HERE),
    "readline": (at("readline"), HERE),
    "find": (at("find", b"x"), HERE),
    "find from the start": (lambda mapping: mapping.find(b"x", 0), 2 * PAGE),
    "rfind": (lambda mapping: mapping.rfind(b"x", 0, HERE), 2 * PAGE),
    "move from": (lambda mapping: mapping.move(0, HERE, 5), HERE),
    "iteration": (iterate, 2 * PAGE),
    "in": (lambda mapping: b"x" in mapping, 2 * PAGE),
    "populate": (lambda mapping: mapping.populate(PAGE, 3 * PAGE), 2 * PAGE),
    "populate all": (lambda mapping: mapping.populate(), 2 * PAGE),
}

STORES: Final[dict[str, tuple[Access, int]]] = {
    "set index": (lambda mapping: mapping.__setitem__(HERE, 1), HERE),
    "set slice": (lambda mapping: mapping.__setitem__(slice(HERE, HERE + 5), b"12345"), HERE),
    "set slice across": (lambda mapping: mapping.__setitem__(slice(PAGE, 3 * PAGE), bytes(2 * PAGE)), 2 * PAGE),
    "set slice with a step": (lambda mapping: mapping.__setitem__(slice(9, None, 3 * PAGE), b"123"), HERE),
    "write": (at("write", b"12345"), HERE),
    "write_byte": (at("write_byte", 1), HERE),
    "move to": (lambda mapping: mapping.move(HERE, 0, 5), HERE),
    "populate for stores": (lambda mapping: mapping.populate(PAGE, 3 * PAGE, write=True), 2 * PAGE),
}


def raw(access: Callable[[Any], Any]) -> Access:
    def use(mapping: dax_mp.Mapping) -> None:
        buffer: Any = mapping
        access(np.frombuffer(buffer, "u1"))

    return use


def store_and_go_on(array: Any) -> None:
    array[HERE] = 1
    nothing()


def nothing() -> None:
    """The interpreter looks for asynchronous exceptions where a function begins."""


RAW_LOADS: Final[dict[str, Access]] = {
    "array.sum": raw(lambda array: array.sum()),
    "array.tobytes": raw(lambda array: array.tobytes()),
    "bytes": lambda mapping: bytes(memoryview(mapping)),
    "array == 1": raw(lambda array: (array == 1).all()),
    "an array's byte": raw(lambda array: int(array[HERE])),
}
RAW_STORES: Final[dict[str, Access]] = {
    "array.fill": raw(lambda array: array.fill(1)),
    "an array's byte": raw(store_and_go_on),
    "np.copyto": raw(lambda array: np.copyto(array[HERE : HERE + 9], 7)),
}


class raises:
    """`with raises(number, offset_bytes)`: BusError with this errno, at this offset of the file `file`.

    No reference to what was accessed is kept, as pytest.raises does, and contextlib's cycles from Python 3.12 on.
    """

    def __init__(self, number: int, offset_bytes: int | None) -> None:
        self.number, self.offset_bytes = number, offset_bytes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, dax_mp.BusError):
            assert error is not None, "no BusError"
            return False
        assert (errno.errorcode[error.errno or 0], error.filename) == (errno.errorcode[self.number], "file")
        assert self.offset_bytes in (None, error.offset_bytes)
        return True


def contents(file: dax_mp.DaxFile) -> bytes:
    return file.pread(8 * PAGE, 0)


# --- past the end -----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    with session.open("file", "x+") as file:
        file.write(b"." * (2 * PAGE))
        yield file


@pytest.mark.parametrize("name", [*LOADS, *STORES])
@pytest.mark.parametrize("access", [dax_mp.ACCESS_WRITE, dax_mp.ACCESS_COPY])
def test_past_the_end(file: dax_mp.DaxFile, name: str, access: int) -> None:
    do, offset_bytes = (LOADS | STORES)[name]
    with file.mmap(8 * PAGE, access=access, past_eof=True) as mapping:
        for _ in range(2):
            with raises(errno.EFAULT, offset_bytes):
                do(mapping)
        assert file.size == 2 * PAGE
        file.truncate(8 * PAGE)
        do_what_is_there(mapping)


def do_what_is_there(mapping: dax_mp.Mapping) -> None:
    """Once there is something, all of it goes well."""
    for name, (do, _) in (LOADS | STORES).items():
        if not name.startswith(("read", "find", "write", "iteration")):  # those check what they leave undone
            do(mapping)


@pytest.mark.parametrize("name", [name for name in LOADS if name != "move from"])
def test_past_the_end_read_only(file: dax_mp.DaxFile, name: str) -> None:
    do, offset_bytes = LOADS[name]
    with file.mmap(8 * PAGE, access=dax_mp.ACCESS_READ, past_eof=True) as mapping, raises(errno.EFAULT, offset_bytes):
        do(mapping)


@pytest.mark.parametrize("do", [*RAW_LOADS.values(), *RAW_STORES.values()], ids=[*RAW_LOADS, *RAW_STORES])
def test_past_the_end_through_a_buffer(file: dax_mp.DaxFile, do: Access) -> None:
    with file.mmap(8 * PAGE, past_eof=True) as mapping:
        for _ in range(2):
            with raises(errno.EFAULT, None):
                do(mapping)


def test_in_the_middle_of_a_store(file: dax_mp.DaxFile) -> None:
    """What comes before the end of the file is stored, as far as it is, and the rest is told."""
    with file.mmap(8 * PAGE, past_eof=True) as mapping, raises(errno.EFAULT, 2 * PAGE):
        mapping[2 * PAGE - 4 : 2 * PAGE + 4] = b"abcdefgh"
    assert set(file.pread(4, 2 * PAGE - 4)) <= set(b".abcd")
    assert file.size == 2 * PAGE


def test_a_thread_is_told_of_its_own(file: dax_mp.DaxFile) -> None:
    """Each has a mapping of its own: a scratch page is there for all threads."""
    told: list[tuple[int, int | None]] = []

    def work(number: int) -> None:
        page = number % 6 + 2
        with file.mmap(8 * PAGE, past_eof=True) as mapping:
            for do in (raw(lambda array: int(array[page * PAGE])), lambda mapping: mapping[page * PAGE]):
                try:
                    do(mapping)
                except dax_mp.BusError as error:
                    told.append((page * PAGE, error.offset_bytes))

    threads = [threading.Thread(target=work, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 24
    assert all(place_bytes == found_bytes for place_bytes, found_bytes in told)


# --- no space ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> Iterator[tuple[dax_mp.Session, dax_mp.DaxFile]]:
    """A file of 8 pages of which two have blocks, on a device that has no more."""
    with (
        dax_mp.launch(size=64 * PAGE, debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("rest", "x+") as rest,
        session.open("file", "x+") as file,
    ):
        file.write(b"." * (2 * PAGE))
        file.truncate(8 * PAGE)
        rest.fallocate(0, session.statfs().pages_free * PAGE)
        yield session, file


@pytest.mark.parametrize("name", STORES)
def test_no_space(full: Any, name: str) -> None:
    """For the hole; loads from it are zeroes."""
    _, file = full
    do, offset_bytes = STORES[name]
    with file.mmap() as mapping:
        assert mapping[HERE] == 0
        with raises(errno.ENOSPC, offset_bytes):
            do(mapping)
        assert mapping[2 * PAGE :] == contents(file)[2 * PAGE :] == bytes(6 * PAGE)
        mapping[0] = 7
        with raises(errno.ENOSPC, 5 * PAGE):
            mapping[5 * PAGE] = 1
        assert file.stat().blocks == 2


@pytest.mark.parametrize("do", RAW_STORES.values(), ids=RAW_STORES)
def test_no_space_through_a_buffer(full: Any, do: Access) -> None:
    _, file = full
    with file.mmap() as mapping:
        with raises(errno.ENOSPC, None):
            do(mapping)
        assert mapping[2 * PAGE :] == contents(file)[2 * PAGE :] == bytes(6 * PAGE)


def test_no_space_for_a_pin_or_a_resize(full: Any) -> None:
    session, file = full
    with file.mmap() as mapping:
        with pytest.raises(OSError) as raised, mapping.pin():
            pass
        assert raised.value.errno == errno.ENOSPC
        mapping.resize(20 * PAGE)  # a hole takes no space
        with raises(errno.ENOSPC, 19 * PAGE):
            mapping[19 * PAGE] = 1
        mapping.resize(8 * PAGE)
    assert session.statfs().pages_free == 0


# --- nobody to ask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LOADS, *STORES])
def test_session_closed(daemon: dax_mp.Daemon, session: dax_mp.Session, name: str) -> None:
    """Of a mapping that has a view out, so that it is still there."""
    with session.open("file", "x") as file:
        file.truncate(8 * PAGE)
    with dax_mp.connect(daemon.endpoint) as other:
        with other.open("file", "r+") as file:
            mapping = file.mmap()
        view = memoryview(mapping)
        mapping[0] = 7
    do = (LOADS | STORES)[name][0]
    if name == "iteration":
        do = iter_once
    with raises(errno.ESTALE, None):
        do(mapping)
    for call in (mapping.size, mapping.flush, lambda: mapping.resize(PAGE), lambda: mapping.unmap(0, PAGE)):
        with pytest.raises(ValueError):
            call()
    view.release()
    mapping.close()


def iter_once(mapping: dax_mp.Mapping) -> None:
    next(iter(mapping))


def test_coordinator_gone(serve: Serve) -> None:
    """What is mapped goes on; what would have to be asked for is EIO."""
    coordinator = serve()
    with dax_mp.connect(coordinator.endpoint) as session:
        file = session.open("file", "x+")
        file.write(b"." * (2 * PAGE))
        mapping = file.mmap(8 * PAGE, past_eof=True)
        array = np.frombuffer(memoryview(mapping), "u1")
        private = file.mmap(access=dax_mp.ACCESS_COPY)
        private[5] = 5
        mapping[0] = 7
        assert mapping[PAGE] == ord(".")
        coordinator.end(signal.SIGKILL)
        for name, (do, offset_bytes) in (LOADS | STORES).items():
            with raises(errno.EIO, offset_bytes if name != "iteration" else None):
                do(mapping)
        for do in (*RAW_LOADS.values(), *RAW_STORES.values()):
            with raises(errno.EIO, None):
                do(mapping)
        assert (mapping[0], mapping[2 * PAGE - 1], int(array[1])) == (1, 1, 1)  # of array.fill
        assert (private[5], private[6]) == (5, ord("."))
        requests: list[Callable[[], Any]] = [
            mapping.size,
            mapping.flush,
            lambda: mapping.resize(PAGE),
            lambda: mapping.unmap(0, PAGE),
            file.stat,
            file.mmap,
            lambda: file.pread(1, 0),
            session.listdir,
        ]
        for request in requests:
            with pytest.raises(ConnectionError):
                request()
        private.close()
        del array
        mapping.close()
        file.close()
    serve()  # and it sweeps up what that one has left


EVICTED: Final = """
import errno, os, sys
import numpy as np
import dax_mp
session = dax_mp.connect(sys.argv[1])
with session.open("file", "r+") as file:
    mapping, private = file.mmap(), file.mmap(access=dax_mp.ACCESS_COPY)
array = np.frombuffer(mapping, "u1")
mapping[0] = private[0] = 7
print("mapped", flush=True)
input()
try:
    while True:  # the pager has to read that it is over
        mapping[0]
except dax_mp.BusError:
    pass
for access in (lambda: mapping[0], lambda: mapping.find(b"x"), lambda: mapping.__setitem__(5, 1), array.sum,
               lambda: private[1 << 12], mapping.size, session.listdir):
    try:
        print("no error:", access())
    except OSError as error:
        print(type(error).__name__, errno.errorcode[error.errno])
print(private[0])
del array
private.close()
mapping.close()
session.close()
"""


def test_evicted(serve: Serve, script: Script) -> None:
    """A process that did not answer in time finds its shared pages gone, and keeps its own copies."""
    coordinator = serve("--ack-timeout", "0.2")
    with dax_mp.connect(coordinator.endpoint) as session, session.open("file", "x+") as file:
        file.write(b"." * (8 * PAGE))
        process = script(EVICTED.replace("1 << 12", str(PAGE)), session.endpoint)
        assert process.line() == "mapped"
        process.stop()
        file.punch_hole(0, 8 * PAGE)
        process.resume()
        process.go_on()
        code, output, errors = process.end()
        assert (code, errors) == (0, "")
        assert output.splitlines() == ["BusError ESTALE"] * 5 + ["OSError ESTALE"] * 2 + ["7"]
        wait_until(lambda: session.statfs().sessions == 1)


SUBINTERPRETER: Final = """
import sys
import dax_mp
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
TEXT = "try: import dax_mp.mmu\\nexcept ImportError: print('it cannot be imported', flush=True)"
with dax_mp.connect(sys.argv[1]) as session, session.open("file", "x+") as file:
    file.truncate(4096)
    mapping = file.mmap(8192, past_eof=True)
    view = memoryview(mapping)
    interpreter = interpreters.create()
    interpreters.run_string(interpreter, TEXT)
    interpreters.destroy(interpreter)
    for access in (lambda: mapping[5000], lambda: bytes(view[5000:5001])):
        try:
            access()
        except OSError as error:
            print(type(error).__name__, error.filename, flush=True)
    session.unlink("file")
    view.release()
    mapping.close()
"""


def test_a_failed_import_in_a_subinterpreter_leaves_bus_errors_as_they_are(
    session: dax_mp.Session, script: Script
) -> None:
    code, output, errors = script(SUBINTERPRETER, session.endpoint).end()
    assert (code, errors) == (0, "")
    assert output.splitlines() == ["it cannot be imported", *["BusError file"] * 2]
