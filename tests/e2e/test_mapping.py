"""Mapping: a file as memory, and an exception where Linux sends SIGBUS. (Beside mmap.mmap: test_mmap_interface.py.)"""

import concurrent.futures
import ctypes
import errno
import gc
import os
import pickle
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from script_process import Script

PAGE: Final = os.sysconf("SC_PAGESIZE")

Array = np.ndarray[Any, Any]


def as_array(buffer: Any, dtype: str = "u1") -> Array:
    """numpy's types know a list of buffers where Python (before 3.12) has no type for them all."""
    return np.frombuffer(buffer, dtype=dtype)


@pytest.fixture
def file(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    """A file of two and a half pages."""
    with session.open("file", "w+") as file:
        file.write(random.Random(5).randbytes(2 * PAGE + PAGE // 2))
        yield file


@pytest.fixture
def sparse(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    """A file of 64 pages, all of it a hole."""
    with session.open("sparse", "w+") as file:
        file.truncate(64 * PAGE)
        yield file


def assert_past_end(error: dax_mp.BusError, name: str, offset_bytes: int) -> None:
    assert error.errno == errno.EFAULT
    assert error.filename == name
    assert error.offset_bytes == offset_bytes
    assert "past the end" in str(error)


# --- making one -------------------------------------------------------------------------------------------------------


def test_an_empty_file_is_not_mapped(session: dax_mp.Session) -> None:
    with session.open("empty", "w+") as file:
        with pytest.raises(ValueError, match="empty"):
            file.mmap()
        with pytest.raises(ValueError, match="empty"):
            file.mmap(past_eof=True)


@pytest.mark.parametrize(
    ("mode", "access", "allowed"),
    [
        ("r", dax_mp.ACCESS_READ, True),
        ("r", dax_mp.ACCESS_WRITE, False),
        ("r+", dax_mp.ACCESS_READ, True),
        ("r+", dax_mp.ACCESS_WRITE, True),
        ("a", dax_mp.ACCESS_READ, False),
        ("a", dax_mp.ACCESS_WRITE, False),
        ("a+", dax_mp.ACCESS_WRITE, True),
    ],
)
def test_the_files_mode_limits_the_access(
    session: dax_mp.Session, file: dax_mp.DaxFile, mode: str, access: int, allowed: bool
) -> None:
    with session.open("file", mode) as again:
        if allowed:
            again.mmap(access=access).close()
            return
        with pytest.raises(PermissionError) as raised:
            again.mmap(access=access)
        assert raised.value.errno == errno.EACCES
        assert raised.value.filename == "file"


def test_no_address_space(sparse: dax_mp.DaxFile) -> None:
    with pytest.raises(OSError) as raised:
        sparse.mmap(1 << 60, past_eof=True)
    assert raised.value.errno == errno.ENOMEM
    assert sparse.stat().mappers == []


# --- using one --------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_in_the_file(sparse: dax_mp.DaxFile) -> None:
    with sparse.mmap(2 * PAGE, offset=4 * PAGE) as mapping:
        mapping[PAGE - 2 : PAGE + 2] = b"data"
        assert mapping.offset_bytes == 4 * PAGE
        assert mapping.size() == 64 * PAGE
        mapping.flush()
    sparse.seek(0, dax_mp.SEEK_DATA)
    assert sparse.tell() == 4 * PAGE
    sparse.seek(5 * PAGE - 2)
    assert sparse.read(4) == b"data"
    assert sparse.stat().blocks == 2


def test_what_is_written_is_in_the_mapping(sparse: dax_mp.DaxFile) -> None:
    with sparse.mmap(access=dax_mp.ACCESS_READ) as mapping:
        assert mapping[PAGE : PAGE + 7] == bytes(7)  # the hole page is mapped now, and has to go
        sparse.seek(PAGE)
        sparse.write(b"written")
        assert mapping[PAGE : PAGE + 7] == b"written"


def test_buffer_users(sparse: dax_mp.DaxFile) -> None:
    with sparse.mmap() as mapping:
        array = as_array(mapping, "<u8")
        array[:] = np.arange(len(array))
        assert struct.unpack_from("<QQ", mapping, 8 * 1000) == (1000, 1001)
        struct.pack_into("<Q", mapping, 0, 77)
        assert array[0] == 77
        with memoryview(mapping) as view:
            assert (view.format, view.ndim, view.nbytes, view.readonly) == ("B", 1, 64 * PAGE, False)
            number = ctypes.c_uint64.from_buffer(mapping, 8)
            number.value = 78
            assert array[1] == 78
            del number
        del array


def test_read_only_mapping(file: dax_mp.DaxFile) -> None:
    with file.mmap(access=dax_mp.ACCESS_READ) as mapping:
        assert memoryview(mapping).readonly
        with pytest.raises(TypeError):
            mapping[0] = 1
        with pytest.raises(TypeError):
            mapping[0:2] = b"ab"


def test_a_file_is_read_into_its_own_mapping(file: dax_mp.DaxFile) -> None:
    """A request whose data lie in pages that are still to be faulted in."""
    with file.mmap() as mapping:
        file.seek(0)
        expected = file.read()
        file.seek(0)
        assert file.readinto(mapping) == len(expected)
        assert mapping[:] == expected
        file.seek(PAGE)
        with memoryview(mapping) as view:
            file.write(view[:PAGE])
        assert mapping[PAGE : 2 * PAGE] == expected[:PAGE]


def test_two_processes_see_each_others_stores(sparse: dax_mp.DaxFile, session: dax_mp.Session, script: Script) -> None:
    other = script(
        """
import dax_mp, sys
with dax_mp.connect(sys.argv[1]) as session, session.open("sparse", "r+") as file, file.mmap() as mapping:
    print(mapping[5], flush=True)
    input()
    print(mapping[5], flush=True)
    mapping[6] = 43
""",
        session.endpoint,
    )
    with sparse.mmap() as mapping:
        assert mapping[5] == 0
        assert other.line() == "0"
        mapping[5] = 42
        assert {vma.pid for vma in session.maps("sparse")} == {os.getpid(), other.pid}
        assert {mapper.pid for mapper in session.stat("sparse").mappers} == {os.getpid(), other.pid}
        other.go_on()
        assert other.line() == "42"
        assert other.end() == (0, "", "")
        assert mapping[6] == 43
        assert [vma.pid for vma in session.maps("sparse")] == [os.getpid()]


# --- past the end, and no space ---------------------------------------------------------------------------------------


def test_past_the_end(file: dax_mp.DaxFile) -> None:
    """The last page is whole, with zeros after the end; the next ones are a BusError until the file grows."""
    size = file.size
    with file.mmap(8 * PAGE, past_eof=True) as mapping:
        assert mapping[size - 1 : size + 10] == file_bytes(file)[-1:] + bytes(10)
        for access in (lambda: mapping[3 * PAGE], lambda: mapping.__setitem__(3 * PAGE, 1)):
            with pytest.raises(dax_mp.BusError) as raised:
                access()
            assert_past_end(raised.value, "file", 3 * PAGE)
        with pytest.raises(dax_mp.BusError) as raised:
            mapping[:]
        assert_past_end(raised.value, "file", 3 * PAGE)

        file.truncate(8 * PAGE)
        assert mapping[3 * PAGE :] == bytes(5 * PAGE)
        mapping[5 * PAGE] = 9

        file.truncate(size)
        with pytest.raises(dax_mp.BusError) as raised:
            mapping[5 * PAGE]
        assert_past_end(raised.value, "file", 5 * PAGE)
        file.truncate(8 * PAGE)
        assert mapping[5 * PAGE] == 0


def file_bytes(file: dax_mp.DaxFile) -> bytes:
    file.seek(0)
    return file.readall()


def test_offset_of_a_bus_error_counts_from_the_start_of_the_file(file: dax_mp.DaxFile) -> None:
    with file.mmap(8 * PAGE, offset=PAGE, past_eof=True) as mapping, pytest.raises(dax_mp.BusError) as raised:
        mapping[4 * PAGE + 9]
    assert_past_end(raised.value, "file", 5 * PAGE + 9)
    assert str(5 * PAGE + 9) in str(raised.value)


def nothing() -> None:
    """The interpreter looks for asynchronous exceptions where a function begins."""


def load(array: Array, index: int) -> int:
    number = int(array[index])
    nothing()
    return number


def store(array: Array, index: int) -> None:
    array[index] = 1
    nothing()


def test_past_the_end_through_raw_buffers(file: dax_mp.DaxFile) -> None:
    """The instruction ends on a scratch page, and the exception comes right after it, in the thread that did it."""
    array = as_array(file.mmap(8 * PAGE, past_eof=True))
    for access in (load, store, load):  # the store's scratch page is gone when the exception is there
        with pytest.raises(dax_mp.BusError) as raised:
            access(array, 4 * PAGE)
        assert raised.value.errno == errno.EFAULT
        assert raised.value.filename == "file"
    with pytest.raises(dax_mp.BusError):
        array.sum()
    file.truncate(8 * PAGE)
    assert array[4 * PAGE] == 0


def test_a_bus_error_is_not_lost_in_a_destructor(file: dax_mp.DaxFile) -> None:
    """A mapping that dies right after the access runs no Python code, in which it would be raised in vain."""

    def load_from_one_that_dies() -> None:
        memoryview(file.mmap(8 * PAGE, past_eof=True))[4 * PAGE]
        nothing()

    with pytest.raises(dax_mp.BusError):
        load_from_one_that_dies()


def test_a_bus_error_in_a_worker_thread_is_that_threads(file: dax_mp.DaxFile) -> None:
    mapping = file.mmap(8 * PAGE, past_eof=True)
    array = as_array(mapping)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert isinstance(threads.submit(load, array, 4 * PAGE).exception(), dax_mp.BusError)
        assert isinstance(threads.submit(mapping.__getitem__, 4 * PAGE).exception(), dax_mp.BusError)
        assert threads.submit(mapping.__getitem__, 0).result() == mapping[0]


def test_no_space_for_a_store() -> None:
    with (
        dax_mp.launch(16 * PAGE) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("big", "w+") as file,
    ):
        file.truncate(64 * PAGE)
        mapping = file.mmap()
        for page in range(16):
            mapping[page * PAGE] = page + 1
        with pytest.raises(dax_mp.BusError, match="no space") as raised:
            mapping[40 * PAGE + 3] = 1
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.offset_bytes == 40 * PAGE + 3
        with pytest.raises(dax_mp.BusError) as raised:
            store(as_array(mapping), 41 * PAGE)
        assert raised.value.errno == errno.ENOSPC
        assert [mapping[page * PAGE] for page in range(16)] == list(range(1, 17))
        file.punch_hole(0, PAGE)
        mapping[40 * PAGE + 3] = 1
        assert mapping[40 * PAGE + 3] == 1


def test_a_bus_error_is_pickled(file: dax_mp.DaxFile) -> None:
    with file.mmap(8 * PAGE, past_eof=True) as mapping, pytest.raises(dax_mp.BusError) as raised:
        mapping[4 * PAGE]
    copy = pickle.loads(pickle.dumps(raised.value))
    assert type(copy) is dax_mp.BusError
    assert_past_end(copy, "file", 4 * PAGE)
    assert str(copy) == str(raised.value)


def test_a_bus_error_without_an_access() -> None:
    """Nobody has a reason to make one by hand, but it must not crash."""
    assert isinstance(dax_mp.BusError(), OSError)


# --- the page table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["zero", "page-cache"])
def test_page_table(policy: str) -> None:
    """The kernel's own word for what is mapped, in agreement with the coordinator's rmap."""
    with (
        dax_mp.launch("8MiB", hole_policy=policy, debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("file", "w+") as file,
    ):
        file.truncate(32 * PAGE)
        with file.mmap(28 * PAGE, offset=4 * PAGE) as mapping:
            assert mapping.page_table() == []
            assert mapping[10 * PAGE] == 0
            hole = entry_of(mapping, 14)
            assert hole.target == ("zero" if policy == "zero" or session.faults == "userfaultfd" else "dram")
            assert not hole.writable

            mapping[2 * PAGE] = 1
            (extent,) = file.extents()
            assert extent.offset_bytes == 6 * PAGE
            (block,) = [entry for entry in mapping.page_table() if entry.target == "pmem"]
            assert block == (6, extent.length_bytes // PAGE, "pmem", extent.frame, True)
            assert 6 not in [entry.pgoff for entry in mapping.page_table() if entry.target != "pmem"]

            (vma,) = session.maps("file")
            assert (vma.pgoff, vma.length_pages, vma.evicted) == (4, 28, False)
            assert mapped_pages(mapping) <= {
                page for piece in vma.mapped for page in range(piece.pgoff, piece.pgoff + piece.length_pages)
            }

            file.truncate(5 * PAGE)
            assert all(page < 5 for page in mapped_pages(mapping))


def entry_of(mapping: dax_mp.Mapping, page: int) -> dax_mp.PageTableEntry:
    return next(entry for entry in mapping.page_table() if entry.pgoff <= page < entry.pgoff + entry.length_pages)


def mapped_pages(mapping: dax_mp.Mapping) -> set[int]:
    return {page for entry in mapping.page_table() for page in range(entry.pgoff, entry.pgoff + entry.length_pages)}


# --- the end of one ---------------------------------------------------------------------------------------------------


def test_it_outlives_its_file_object_and_name(session: dax_mp.Session) -> None:
    free = session.statfs().pages_free
    with session.open("file", "w+") as file:
        file.truncate(4 * PAGE)
        mapping = file.mmap()
    mapping[0] = 1
    session.unlink("file")
    mapping[PAGE] = 2
    assert (mapping[0], mapping[PAGE], mapping.size()) == (1, 2, 4 * PAGE)
    mapping.flush()
    assert session.listdir() == []
    assert session.statfs().pages_free < free
    mapping.close()
    assert session.statfs().pages_free == free


def test_closed(file: dax_mp.DaxFile) -> None:
    mapping = file.mmap()
    mapping.close()
    mapping.close()
    assert mapping.closed
    assert "closed" in repr(mapping)
    calls: list[Callable[[], Any]] = [
        lambda: mapping[0],
        lambda: mapping[0:5],
        lambda: mapping.__setitem__(0, 1),
        lambda: len(mapping),
        lambda: memoryview(mapping),
        mapping.__enter__,
        mapping.size,
        mapping.flush,
        mapping.page_table,
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()
    assert file.stat().mappers == []


def test_close_with_a_view_out(file: dax_mp.DaxFile) -> None:
    mapping = file.mmap()
    view = memoryview(mapping)
    with pytest.raises(BufferError):
        mapping.close()
    first = view[0]
    view.release()
    assert mapping[0] == first
    mapping.close()


def test_a_forgotten_mapping_is_unmapped(file: dax_mp.DaxFile) -> None:
    """At once in this process, and by the next request at the coordinator."""
    mapping = file.mmap()
    assert mapping[0] == file_bytes(file)[0]
    assert len(file.stat().mappers) == 1
    del mapping
    gc.collect()
    assert file.stat().mappers == []


def test_an_array_keeps_its_mapping(file: dax_mp.DaxFile) -> None:
    array = as_array(file.mmap())
    gc.collect()
    assert array[:100].tobytes() == file_bytes(file)[:100]
    del array
    gc.collect()
    assert file.stat().mappers == []


def test_a_mapping_in_a_cycle_with_its_own_view(file: dax_mp.DaxFile) -> None:
    mapping = file.mmap()
    mapping.own = memoryview(mapping)  # type: ignore[attr-defined]
    del mapping
    gc.collect()
    assert file.stat().size_bytes == file.size


def test_closed_session_leaves_arrays_that_raise(daemon: dax_mp.Daemon) -> None:
    session = dax_mp.connect(daemon.endpoint)
    with session.open("arrays", "w+") as file:
        file.truncate(4 * PAGE)
        mapping = file.mmap()
    array = as_array(mapping)
    array[0] = 5
    session.close()
    with pytest.raises(dax_mp.BusError) as raised:
        array.sum()
    assert raised.value.errno == errno.ESTALE
    with pytest.raises(dax_mp.BusError) as raised:
        _ = mapping[0]
    assert raised.value.errno == errno.ESTALE
    assert raised.value.filename == "arrays"
    with pytest.raises(ValueError):
        mapping.size()
    del array
    mapping.close()


def test_dead_coordinator_makes_accesses_raise() -> None:
    """What is mapped stays usable; what would have to be asked for is an error."""
    with dax_mp.launch("4MiB") as daemon, dax_mp.connect(daemon.endpoint) as session:
        file = session.open("file", "w+")
        file.truncate(1 << 30)
        mapping = file.mmap()
        mapping[0] = 1
        os.kill(daemon.pid, signal.SIGKILL)
        with pytest.raises(dax_mp.BusError) as raised:
            mapping[512 << 20]
        assert raised.value.errno == errno.EIO
        assert mapping[0] == 1
        with pytest.raises(ConnectionError):
            mapping.size()
        mapping.close()


# --- faulthandler -----------------------------------------------------------------------------------------------------

FAULTHANDLER: Final = """
import faulthandler, os, sys
import dax_mp
before, after = sys.argv[2:]

def switch(how):
    for word in how.split("+"):
        if word != "nothing":
            getattr(faulthandler, word)()

switch(before)
with dax_mp.connect(sys.argv[1]) as session, session.open("fh", "w+") as file:
    file.truncate(1 << 20)
    mapping = file.mmap()
    mapping[0] = 1
    switch(after)
    mapping[100000] = 2
    print(mapping[0] + mapping[100000], flush=True)
    try:
        int(memoryview(file.mmap(2 << 20, past_eof=True))[1 << 20])
    except dax_mp.BusError:
        print("BusError", flush=True)
    if faulthandler.is_enabled():
        import ctypes
        ctypes.string_at(8)
"""


@pytest.mark.parametrize("before", ["nothing", "enable", "disable"])
@pytest.mark.parametrize("after", ["nothing", "enable", "disable", "enable+disable", "disable+enable", "enable+enable"])
def test_faulthandler(session: dax_mp.Session, script: Script, before: str, after: str) -> None:
    """Faults are served whatever faulthandler is told and when; and a real crash is still its own."""
    process = script(FAULTHANDLER, session.endpoint, before, after)
    code, output, errors = process.end()
    session.unlink("fh")
    assert output == "3\nBusError\n"
    enabled = (after if after != "nothing" else before if before != "nothing" else "enable").endswith("enable")
    if enabled:  # -X dev enables it from the start
        assert code == -signal.SIGSEGV
        assert errors.count("Fatal Python error: Segmentation fault") == 1
    else:
        assert (code, errors) == (0, "")


def test_a_sequence_of_stores_takes_few_faults(session: dax_mp.Session) -> None:
    """Neither of ours, nor of the kernel's: what is mapped ahead is in the page tables too."""
    pages = 4096
    with session.open("file", "w+") as file:
        file.fallocate(0, pages * session.page_size)
        with file.mmap() as mapping:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, session.counters()["faults"]
            for page in range(pages):
                mapping[page * session.page_size] = 1
            after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, session.counters()["faults"]
    assert after[0] - before[0] < pages / 4
    assert after[1] - before[1] < pages / 64
