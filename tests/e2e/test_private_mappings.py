"""Mappings of all kinds: private ones, several of one file, parts of one, and ones that grow and shrink."""

import errno
import mmap
import os
import pickle
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from script_process import Script

PAGE: Final = os.sysconf("SC_PAGESIZE")
PAGES: Final = 8

Array = np.ndarray[Any, Any]


@pytest.fixture
def file(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    """Page n is full of the byte n + 1."""
    with session.open("file", "x+") as file:
        file.write(contents())
        yield file


def contents() -> bytes:
    return b"".join(bytes([page + 1]) * PAGE for page in range(PAGES))


@pytest.fixture
def sparse(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    with session.open("sparse", "x+") as file:
        file.truncate(PAGES * PAGE)
        yield file


def array_of(mapping: dax_mp.Mapping) -> Array:
    buffer: Any = mapping
    return np.frombuffer(buffer, "u1")


def firsts(mapping: dax_mp.Mapping) -> list[int | None]:
    """The first byte of each page; None: there is no page."""
    found: list[int | None] = []
    for offset_bytes in range(0, len(mapping), PAGE):
        try:
            found.append(mapping[offset_bytes])
        except dax_mp.BusError as error:
            reason, place_bytes = error.errno, error.offset_bytes
            assert (reason, place_bytes) == (errno.EFAULT, mapping.offset_bytes + offset_bytes)
            found.append(None)
    return found


def mapped(mapping: dax_mp.Mapping) -> set[int]:
    """Which pages of the file this process has mapped."""
    return {page for entry in mapping.page_table() for page in range(entry.pgoff, entry.pgoff + entry.length_pages)}


# --- private ----------------------------------------------------------------------------------------------------------


def test_stores_are_seen_by_this_mapping_alone(file: dax_mp.DaxFile) -> None:
    with file.mmap(access=dax_mp.ACCESS_COPY) as mapping, file.mmap(access=dax_mp.ACCESS_COPY) as other:
        shared = file.mmap()
        mapping[PAGE - 2 : PAGE + 2] = b"copy"
        other[PAGE] = 99
        array_of(mapping)[3 * PAGE] = 98
        assert mapping[PAGE - 3 : PAGE + 3] == b"\1copy\2"
        assert (mapping[3 * PAGE], other[3 * PAGE], other[PAGE], other[PAGE - 2]) == (98, 4, 99, 1)
        assert shared[:] == file.pread(PAGES * PAGE, 0) == contents()
        shared.close()


def test_what_others_store_is_seen_until_a_page_is_copied(file: dax_mp.DaxFile) -> None:
    with file.mmap(access=dax_mp.ACCESS_COPY) as mapping:
        assert firsts(mapping) == [1, 2, 3, 4, 5, 6, 7, 8]
        mapping[PAGE + 1] = 0
        file.pwrite(b"A" * (3 * PAGE), 0)
        assert firsts(mapping)[:3] == [ord("A"), 2, ord("A")]
        with file.mmap() as shared:
            shared[2 * PAGE] = ord("B")
        assert firsts(mapping)[:3] == [ord("A"), 2, ord("B")]


def test_truncate_drops_copies_and_punch_and_write_leave_them(file: dax_mp.DaxFile) -> None:
    """even_cows of unmap_mapping_range(): only where the file ends there are no pages to be copies of."""
    with file.mmap(access=dax_mp.ACCESS_COPY) as mapping:
        for page in (1, 3, 5):
            mapping[page * PAGE] = 90 + page
        file.punch_hole(0, 3 * PAGE)
        file.zero_range(3 * PAGE, PAGE)
        file.pwrite(b"w" * PAGE, PAGE)
        assert firsts(mapping) == [0, 91, 0, 93, 5, 95, 7, 8]
        file.truncate(4 * PAGE)
        assert firsts(mapping) == [0, 91, 0, 93, None, None, None, None]
        file.truncate(PAGES * PAGE)
        assert firsts(mapping) == [0, 91, 0, 93, 0, 0, 0, 0]
        file.truncate(PAGE + 1)  # the page with the last byte stays
        assert firsts(mapping)[:3] == [0, 91, None]
        file.truncate(0)
        file.pwrite(b"new" * (2 * PAGE), 0)
        assert firsts(mapping)[:2] == [ord("n"), ord("e")]


def test_ranges_that_move_leave_copies(file: dax_mp.DaxFile) -> None:
    """A copy belongs to its place in the mapping, as for ext4 and xfs, which unmap without even_cows there."""
    with file.mmap(access=dax_mp.ACCESS_COPY) as mapping:
        assert firsts(mapping) == [1, 2, 3, 4, 5, 6, 7, 8]
        mapping[2 * PAGE] = 99
        file.insert_range(0, PAGE)
        assert firsts(mapping) == [0, 1, 99, 3, 4, 5, 6, 7]
        file.collapse_range(0, 2 * PAGE)
        assert firsts(mapping) == [2, 3, 99, 5, 6, 7, 8, None]


def test_holes_are_copied_too(sparse: dax_mp.DaxFile) -> None:
    with sparse.mmap(access=dax_mp.ACCESS_COPY) as mapping:
        assert mapping[:] == bytes(PAGES * PAGE)
        mapping[5 * PAGE] = 1
        mapping[7 * PAGE - 1] = 2
        assert sparse.stat().blocks == 0
        sparse.pwrite(b"x" * (PAGES * PAGE), 0)
        assert firsts(mapping) == [120, 120, 120, 120, 120, 1, 0, 120]


def test_a_private_store_needs_no_space() -> None:
    with (
        dax_mp.launch(8 * PAGE) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("full", "x+") as file,
    ):
        file.fallocate(0, session.statfs().pages_free * PAGE)
        file.truncate(64 * PAGE)
        with file.mmap(access=dax_mp.ACCESS_COPY) as mapping:
            mapping[40 * PAGE] = 7
            assert mapping[40 * PAGE] == 7
            assert session.statfs().pages_free == 0


def test_a_read_only_file_is_mapped_privately(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    with session.open("file") as reader, reader.mmap(access=dax_mp.ACCESS_COPY) as mapping:
        mapping[0:5] = b"hello"
        mapping.flush()
        assert mapping[:5] == b"hello"
        with pytest.raises(TypeError):
            mapping.resize(PAGE)
    assert file.pread(5, 0) == bytes([1] * 5)


@pytest.mark.forks
def test_a_fork_has_the_copies(file: dax_mp.DaxFile, session: dax_mp.Session, script: Script) -> None:
    process = script(
        """
import os, sys, warnings
import dax_mp
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
session = dax_mp.connect(sys.argv[1])
with session.open("file") as file:
    mapping = file.mmap(access=dax_mp.ACCESS_COPY)
mapping[0] = 50
mapping[4096] = 51
if not (pid := os.fork()):
    mapping[4096] = 60
    print(mapping[0], mapping[4096], mapping[2 * os.sysconf("SC_PAGESIZE")], flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(mapping[0], mapping[4096], flush=True)
mapping.close()
session.close()
""".replace("4096", str(PAGE)),
        session.endpoint,
    )
    assert process.end() == (0, "50 60 3\n50 51\n", "")
    assert file.pread(PAGES * PAGE, 0) == contents()


# --- a part of one is unmapped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", [dax_mp.ACCESS_READ, dax_mp.ACCESS_WRITE, dax_mp.ACCESS_COPY])
def test_a_part_is_unmapped(session: dax_mp.Session, file: dax_mp.DaxFile, access: int) -> None:
    with file.mmap(access=access, offset=PAGE) as mapping, file.mmap() as other:
        if access == dax_mp.ACCESS_COPY:
            mapping[3 * PAGE] = 99
        array = array_of(mapping)
        assert int(array.max()) >= 8
        mapping.unmap(2 * PAGE, 2 * PAGE)
        assert firsts(mapping) == [2, 3, None, None, 6, 7, 8]
        assert len(mapping) == len(array) == (PAGES - 1) * PAGE
        assert mapped(mapping) & {3, 4} == set()
        with pytest.raises(dax_mp.BusError):
            array.sum()
        mapping.unmap(0, PAGE)
        mapping.unmap(length=PAGE, start=6 * PAGE)
        mapping.unmap(2 * PAGE, PAGE)  # there is nothing there: no mistake, as for munmap(2)
        assert firsts(mapping) == [None, 3, None, None, 6, 7, None]
        assert firsts(other) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert {vma.vma_id for vma in session.maps("file")} == {mapping.vma_id, other.vma_id}
        del array
    assert file.stat().mappers == []


def test_what_cannot_be_unmapped(file: dax_mp.DaxFile) -> None:
    file.truncate(3 * PAGE + 10)
    with file.mmap() as mapping:
        size = len(mapping)
        for start, length in (
            (1, PAGE),
            (0, 1),
            (0, 0),
            (0, -PAGE),
            (-PAGE, PAGE),
            (0, 5 * PAGE),
            (size, 1),
            (0, PAGE + 1),
        ):
            with pytest.raises(OSError) as raised:
                mapping.unmap(start, length)
            assert raised.value.errno == errno.EINVAL
        with pytest.raises(TypeError):
            mapping.unmap("0", 1)  # type: ignore[arg-type]
        with pytest.raises(OverflowError):
            mapping.unmap(0, 1 << 63)
        assert firsts(mapping) == [1, 2, 3, 4]
        mapping.unmap(3 * PAGE, 10)  # the last page, as far as the mapping goes
        assert firsts(mapping) == [1, 2, 3, None]
        mapping.unmap(0, size)
        assert firsts(mapping) == [None] * 4
    with pytest.raises(ValueError):
        mapping.unmap(0, PAGE)


# --- several of one file ----------------------------------------------------------------------------------------------


def test_several_mappings_of_one_file(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    with session.open("file") as again:
        whole, part, reader = file.mmap(), file.mmap(2 * PAGE, offset=3 * PAGE), again.mmap(access=dax_mp.ACCESS_READ)
        private = again.mmap(access=dax_mp.ACCESS_COPY)
        assert [mapper.vmas for mapper in file.stat().mappers] == [4]
        part[PAGE] = 44
        whole[3 * PAGE] = 33
        assert [mapping[4 * PAGE] for mapping in (whole, reader, private)] == [44] * 3
        assert (part[0], reader[3 * PAGE], private[3 * PAGE]) == (33, 33, 33)
        file.punch_hole(4 * PAGE, PAGE)
        assert [mapping[4 * PAGE] for mapping in (whole, reader, private)] == [0] * 3
        assert part[PAGE] == 0
        whole.close()
        part[PAGE] = 45
        assert (reader[4 * PAGE], private[4 * PAGE]) == (45, 45)
        for mapping in (part, reader, private):
            mapping.close()
    assert file.stat().mappers == []


# --- longer and shorter -----------------------------------------------------------------------------------------------


def test_views_stay_when_it_grows(file: dax_mp.DaxFile) -> None:
    with file.mmap() as mapping, file.mmap() as other:
        view, array, address = memoryview(mapping), array_of(mapping), mapping.address
        for pages in (9, 1000, 1 << 18, 20):
            mapping.resize(pages * PAGE)
            assert (len(mapping), file.size, mapping.address) == (pages * PAGE, pages * PAGE, address)
            mapping[-1] = 5
            assert (mapping[-1], mapping[8 * PAGE]) == (5, 0)
        assert (len(view), view[0], int(array[-1]), len(other)) == (PAGES * PAGE, 1, 8, PAGES * PAGE)
        view[5] = 55
        assert (mapping[5], other[5]) == (55, 55)
        mapping.resize(2 * PAGE + 1)
        assert (int(array[2 * PAGE]), int(view[PAGE])) == (3, 2)
        with pytest.raises(dax_mp.BusError) as raised:
            array.sum()
        assert raised.value.errno == errno.EFAULT
        assert firsts(other)[:4] == [1, 2, 3, None]
        with pytest.raises(BufferError):
            mapping.close()
        mapping.resize(PAGES * PAGE)
        assert int(array.sum()) == sum(other[:])
        del view, array, raised


def test_a_view_sees_what_the_file_has_grown_by(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    """Of a mapping that is longer than its file, and of one that is resized past it by another process."""
    with file.mmap(20 * PAGE, past_eof=True) as mapping:
        array = array_of(mapping)
        file.truncate(20 * PAGE)
        file.pwrite(b"grown", 18 * PAGE)
        assert bytes(array[18 * PAGE : 18 * PAGE + 5]) == b"grown"
        del array


def test_an_empty_file_that_grows(session: dax_mp.Session) -> None:
    with session.open("empty", "x+") as file, file.mmap(4 * PAGE, past_eof=True) as mapping:
        for access in (dax_mp.ACCESS_READ, dax_mp.ACCESS_COPY):
            with file.mmap(PAGE, access=access, past_eof=True) as other:
                assert firsts(other) == [None]
        assert firsts(mapping) == [None] * 4
        assert mapping.size() == 0
        with pytest.raises(dax_mp.BusError) as raised:
            mapping[2 * PAGE + 5] = 1
        assert (raised.value.errno, raised.value.offset_bytes) == (errno.EFAULT, 2 * PAGE + 5)
        file.write(b"x")
        assert (mapping[0], mapping[1], mapping[PAGE - 1]) == (ord("x"), 0, 0)
        file.truncate(4 * PAGE)
        mapping[2 * PAGE + 5] = 1
        assert file.pread(1, 2 * PAGE + 5) == b"\1"
        file.truncate(0)
        assert firsts(mapping) == [None] * 4


@pytest.mark.parametrize("access", [dax_mp.ACCESS_READ, dax_mp.ACCESS_WRITE, dax_mp.ACCESS_COPY])
def test_a_remap_leaves_the_file(file: dax_mp.DaxFile, access: int) -> None:
    """mremap(2): the mapping alone becomes longer or shorter."""
    with file.mmap(2 * PAGE, offset=PAGE, access=access) as mapping:
        if access == dax_mp.ACCESS_COPY:
            mapping[PAGE] = 33
        second = 33 if access == dax_mp.ACCESS_COPY else 3
        view = memoryview(mapping)
        mapping.remap(4 * PAGE)
        assert firsts(mapping) == [2, second, 4, 5]
        mapping.remap(8 * PAGE + 1)
        assert firsts(mapping) == [2, second, 4, 5, 6, 7, 8, None, None]
        file.truncate(9 * PAGE)
        assert firsts(mapping)[6:] == [8, 0, None]
        mapping.remap(PAGE)
        assert (len(mapping), firsts(mapping), mapping.size()) == (PAGE, [2], 9 * PAGE)
        with pytest.raises(dax_mp.BusError):
            bytes(view)
        mapping.remap(2 * PAGE)
        assert firsts(mapping) == [2, 3]  # a copy that was cut off is gone
        for length in (0, -1, (1 << 63) - 1):
            with pytest.raises(ValueError):
                mapping.remap(length)
        view.release()
    with pytest.raises(ValueError):
        mapping.remap(PAGE)


def test_a_resize_that_cannot_be(file: dax_mp.DaxFile) -> None:
    """Nothing is changed: not the mapping, not the file."""
    with file.mmap() as mapping, memoryview(mapping):
        for size, error in ((1 << 60, BufferError), (1 << 46, BufferError), (0, OSError), (-1, ValueError)):
            with pytest.raises(error):
                mapping.resize(size)
            assert (len(mapping), file.size) == (PAGES * PAGE, PAGES * PAGE)
            assert firsts(mapping) == [1, 2, 3, 4, 5, 6, 7, 8]
    with file.mmap() as mapping:
        with pytest.raises(OSError) as raised:
            mapping.resize(1 << 60)
        assert raised.value.errno == errno.ENOMEM
        assert (len(mapping), file.size) == (PAGES * PAGE, PAGES * PAGE)


# --- ahead of accesses ------------------------------------------------------------------------------------------------


def test_willneed_maps_the_blocks_that_are_there(sparse: dax_mp.DaxFile) -> None:
    sparse.pwrite(b"x" * (2 * PAGE), 3 * PAGE)
    with sparse.mmap() as mapping:
        mapping.madvise(mmap.MADV_WILLNEED, 4 * PAGE)
        assert 4 in mapped(mapping)
        mapping.madvise(mmap.MADV_WILLNEED)
        assert {3, 4} <= mapped(mapping)
        sparse.truncate(0)
        mapping.madvise(mmap.MADV_WILLNEED)  # there is nothing: no mistake
        assert mapped(mapping) == set()
    with sparse.mmap(1 << 40, past_eof=True) as mapping:
        sparse.truncate(1 << 40)
        mapping.madvise(mmap.MADV_WILLNEED)  # a TiB of nothing takes no time
        assert sparse.stat().blocks == 0


def test_dontneed_drops_what_is_mapped(file: dax_mp.DaxFile) -> None:
    with file.mmap() as mapping, file.mmap(access=dax_mp.ACCESS_COPY) as private:
        mapping[0] = private[PAGE] = 77
        assert (firsts(mapping)[0], firsts(private)[1]) == (77, 77)
        mapping.madvise(mmap.MADV_DONTNEED, PAGE, PAGE)
        assert 1 not in mapped(mapping)
        assert 0 in mapped(mapping)
        mapping.madvise(mmap.MADV_DONTNEED)
        assert mapped(mapping) == set()
        private.madvise(mmap.MADV_DONTNEED)
        assert firsts(mapping) == firsts(private) == [77, 2, 3, 4, 5, 6, 7, 8]


def test_populate(session: dax_mp.Session, sparse: dax_mp.DaxFile) -> None:
    with sparse.mmap() as mapping:
        mapping.populate(PAGE, 2 * PAGE)
        assert {1, 2} <= mapped(mapping)
        assert sparse.stat().blocks == 0
        mapping.populate(start=2 * PAGE + 1, length=PAGE, write=True)  # a part of a page is all of it
        assert sparse.seek(0, dax_mp.SEEK_DATA) == 2 * PAGE
        assert sparse.seek(3 * PAGE, dax_mp.SEEK_DATA) == 3 * PAGE
        faults = session.counters()["faults"]
        mapping[2 * PAGE : 4 * PAGE] = b"x" * (2 * PAGE)
        assert session.counters()["faults"] == faults
        mapping.populate(write=True)
        assert sparse.stat().blocks == PAGES
        assert mapped(mapping) == set(range(PAGES))
        for start, length in ((-1, 1), (0, -1), (0, PAGES * PAGE + 1), (PAGES * PAGE + 1, None)):
            with pytest.raises(ValueError):
                mapping.populate(start, length)
        sparse.truncate(2 * PAGE)
        with pytest.raises(dax_mp.BusError) as raised:
            mapping.populate()
        assert (raised.value.errno, raised.value.offset_bytes) == (errno.EFAULT, 2 * PAGE)
    with pytest.raises(ValueError):
        mapping.populate()
    with sparse.mmap(access=dax_mp.ACCESS_READ) as mapping:
        mapping.populate()
        with pytest.raises(TypeError):
            mapping.populate(write=True)
    with sparse.mmap(access=dax_mp.ACCESS_COPY) as mapping:
        mapping.populate(write=True)  # copies all of it
        sparse.pwrite(b"y" * PAGE, 0)
        assert mapping[0] == 0


def test_map_populate(file: dax_mp.DaxFile) -> None:
    with file.mmap(flags=mmap.MAP_SHARED | mmap.MAP_POPULATE) as mapping:
        assert mapped(mapping) == set(range(PAGES))


# --- pickled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", [dax_mp.ACCESS_READ, dax_mp.ACCESS_WRITE, dax_mp.ACCESS_COPY])
def test_pickled(session: dax_mp.Session, file: dax_mp.DaxFile, access: int) -> None:
    with file.mmap(2 * PAGE, offset=PAGE, access=access) as mapping:
        session.rename("file", "renamed")
        pickled = pickle.dumps(mapping)
        with pickle.loads(pickled) as again:
            assert (again.offset_bytes, len(again), again.access, again.name) == (PAGE, 2 * PAGE, access, "renamed")
            assert again[0] == 2
        session.unlink("renamed")
        with session.open("renamed", "x"), pytest.raises(FileNotFoundError):  # another file
            pickle.loads(pickled)
        with pytest.raises(FileNotFoundError):
            pickle.loads(pickle.dumps(mapping))
    with pytest.raises(ValueError):
        pickle.dumps(mapping)
