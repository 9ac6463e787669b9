"""Limits: more scattered pages than the kernel gives a process mappings, numbers at and past 2^63, zero lengths."""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import pytest

import dax_mp

PAGE: Final = os.sysconf("SC_PAGESIZE")
STRIDE: Final = 2
"""Every second page: none of them can share a VMA with another."""
FEW_MAPPINGS_MAX: Final = 1 << 17
"""With a higher vm.max_map_count, to go past it takes minutes."""
HAS_GUARDS: Final = tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 15)
"""Without guard regions each private copy is a VMA, and they run out."""
SOAK: Final = bool(os.environ.get("DAX_MP_SOAK"))

Bytes = npt.NDArray[np.uint8]


def mappings_max() -> int:
    with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
        return int(file.read())


def mappings() -> int:
    with open("/proc/self/maps", "rb") as maps:
        return sum(1 for _ in maps)


def bytes_of(mapping: dax_mp.Mapping) -> Bytes:
    return np.frombuffer(cast(Any, mapping), dtype=np.uint8)


def contents(count: int) -> Bytes:
    """A byte for each of so many pages, none of them zero."""
    return (np.arange(count) % 251 + 1).astype(np.uint8)


@contextmanager
def scattered(count: int) -> Iterator[tuple[dax_mp.Session, dax_mp.DaxFile]]:
    """A file that is to get that many single pages, and a device on which they have room."""
    with (
        dax_mp.launch(size=(count + count // 8 + 4096) * PAGE) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("scattered", "w+") as file,
    ):
        file.truncate(count * STRIDE * PAGE)
        yield session, file


def check_file(file: dax_mp.DaxFile, count: int) -> None:
    """By read(), for some of them, and by a mapping that has seen none of the stores, for all."""
    for index in range(0, count, 997):
        assert file.pread(2, index * STRIDE * PAGE) == bytes([index % 251 + 1, 0])
    with file.mmap() as other:
        array = bytes_of(other)
        assert np.array_equal(array[:: STRIDE * PAGE], contents(count))
        del array


def copy_all(file: dax_mp.DaxFile, count: int) -> None:
    """Make a private copy of each of the pages."""
    with file.mmap(access=dax_mp.ACCESS_COPY) as mapping:
        array = bytes_of(mapping)
        array[1 :: STRIDE * PAGE] = contents(count)
        for offset in (0, 1):
            assert np.array_equal(array[offset :: STRIDE * PAGE], contents(count))
        assert not array[2 :: STRIDE * PAGE].any()
        del array


def touch_all(count: int) -> None:
    with scattered(count) as (session, file), file.mmap() as mapping:
        with mapping.pin(100 * STRIDE * PAGE, PAGE) as pinned:
            array = bytes_of(mapping)
            array[:: STRIDE * PAGE] = contents(count)
            assert np.array_equal(array[:: STRIDE * PAGE], contents(count))
            reader, writer = os.pipe()
            os.write(writer, b"pinned")
            faults = session.counters()["faults"]
            assert os.readv(reader, [pinned[1:7]]) == 6
            assert session.counters()["faults"] == faults, "the page has stayed mapped"
            os.close(reader)
            os.close(writer)
            assert bytes(pinned[1:7]) == b"pinned"
            pinned[1:7] = bytes(6)
        assert session.counters()["drops"] > 0
        assert mappings() < mappings_max()
        del array
        check_file(file, count)
        if HAS_GUARDS:
            copy_all(file, count)
            check_file(file, count)
        assert session.counters()["bus_errors"] == 0


@pytest.mark.skipif(mappings_max() > FEW_MAPPINGS_MAX, reason="vm.max_map_count is too high to go past it here")
def test_more_scattered_pages_than_mappings() -> None:
    touch_all(mappings_max() + 500)


@pytest.mark.skipif(not SOAK, reason="takes minutes: DAX_MP_SOAK=1")
def test_a_million_scattered_pages() -> None:
    touch_all(1_000_000)


# --- numbers ----------------------------------------------------------------------------------------------------------

PAST: Final = (1 << 63, (1 << 63) + 1, 1 << 64, (1 << 64) + 1, 1 << 100, -(1 << 63) - 1, -(1 << 100))
"""No off_t, nor a Py_ssize_t."""
LARGEST: Final = (1 << 63) - 1


@pytest.fixture
def file(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    with session.open("limits", "w+") as file:
        file.write(b"x" * (2 * PAGE + 5))
        yield file
    session.unlink("limits")


FILE_CALLS: Final[dict[str, Callable[[dax_mp.DaxFile, int], object]]] = {
    "truncate": lambda file, number: file.truncate(number),
    "seek": lambda file, number: file.seek(number),
    "pread a length": lambda file, number: file.pread(number, 0),
    "pread an offset": lambda file, number: file.pread(1, number),
    "pwrite": lambda file, number: file.pwrite(b"x", number),
    "preadv": lambda file, number: file.preadv([bytearray(1)], number),
    "pwritev": lambda file, number: file.pwritev([b"x"], number),
    "fallocate an offset": lambda file, number: file.fallocate(number, 1),
    "fallocate a length": lambda file, number: file.fallocate(0, number),
    "punch_hole an offset": lambda file, number: file.punch_hole(number, 1),
    "punch_hole a length": lambda file, number: file.punch_hole(0, number),
    "zero_range": lambda file, number: file.zero_range(number, 1),
    "collapse_range": lambda file, number: file.collapse_range(0, number),
    "insert_range": lambda file, number: file.insert_range(0, number),
    "copy_range an offset": lambda file, number: file.copy_range(number, file, 0, 1),
    "copy_range a length": lambda file, number: file.copy_range(0, file, PAGE, number),
    "mmap a length": lambda file, number: file.mmap(number),
    "mmap an offset": lambda file, number: file.mmap(1, number),
}


@pytest.mark.parametrize("call", FILE_CALLS.values(), ids=FILE_CALLS)
@pytest.mark.parametrize("number", PAST, ids=hex)
def test_a_number_that_is_no_offset(
    file: dax_mp.DaxFile, call: Callable[[dax_mp.DaxFile, int], object], number: int
) -> None:
    with pytest.raises((OverflowError, ValueError)):
        call(file, number)
    assert file.pread(3 * PAGE, 0) == b"x" * (2 * PAGE + 5)


LARGEST_CALLS: Final[dict[str, tuple[Callable[[dax_mp.DaxFile], object], int | None]]] = {
    "pwrite": (lambda file: file.pwrite(b"x", LARGEST), errno.EFBIG),
    "pwritev": (lambda file: file.pwritev([b"x"], LARGEST), errno.EFBIG),
    "fallocate": (lambda file: file.fallocate(1, LARGEST), errno.EFBIG),
    "punch_hole past the largest offset": (lambda file: file.punch_hole(LARGEST, LARGEST), errno.EFBIG),
    "insert_range": (lambda file: file.insert_range(0, LARGEST - LARGEST % PAGE), errno.EFBIG),
    "fallocate all there is": (lambda file: file.fallocate(0, LARGEST), errno.ENOSPC),
}


@pytest.mark.parametrize(("call", "code"), LARGEST_CALLS.values(), ids=LARGEST_CALLS)
def test_past_the_largest_file(file: dax_mp.DaxFile, call: Callable[[dax_mp.DaxFile], object], code: int) -> None:
    with pytest.raises(OSError) as raised:
        call(file)
    assert raised.value.errno == code
    assert file.pread(3 * PAGE, 0) == b"x" * (2 * PAGE + 5)


def test_the_largest_file(file: dax_mp.DaxFile) -> None:
    """It can be as long as an off_t says; what is at its end can be written, read and mapped."""
    file.truncate(LARGEST)
    assert file.stat().size_bytes == LARGEST
    assert file.pwrite(b"end", LARGEST - 3) == 3
    assert file.pread(10, LARGEST - 3) == b"end"
    assert file.pread(10, LARGEST) == b""
    file.punch_hole(PAGE, LARGEST - PAGE)
    assert file.pread(10, LARGEST - 3) == bytes(3)
    last_page = LARGEST - LARGEST % PAGE
    with pytest.raises(OSError) as raised:
        file.mmap(PAGE - 1, last_page)
    assert raised.value.errno == errno.EOVERFLOW, "as mmap(2): its end is no off_t"
    with file.mmap(PAGE, last_page - PAGE) as mapping:
        mapping[PAGE - 1] = 7
        assert file.pread(2, last_page - 1) == b"\7\0"
        with pytest.raises(ValueError, match="out of range"):
            mapping.resize(LARGEST)
        for number in PAST:
            with pytest.raises(OverflowError):
                mapping.resize(number)
    with pytest.raises((OverflowError, ValueError)):
        file.mmap(PAGE, last_page)
    file.truncate(0)


def test_zero_lengths(file: dax_mp.DaxFile) -> None:
    assert file.pread(0, 0) == b""
    assert file.pwrite(b"", LARGEST) == 0
    assert file.preadv([], 0) == 0
    assert file.pwritev([bytearray(), b""], 1 << 40) == 0
    assert file.readinto(bytearray()) == 0
    assert file.copy_range(0, file, PAGE, 0) == 0
    for space in (file.fallocate, file.punch_hole, file.zero_range, file.collapse_range, file.insert_range):
        with pytest.raises(OSError) as raised:
            space(0, 0)
        assert raised.value.errno == errno.EINVAL
    assert file.stat().size_bytes == 2 * PAGE + 5
    with file.mmap() as mapping:
        assert mapping[5:5] == b""
        mapping[5:5] = b""
        mapping.move(0, len(mapping), 0)
        mapping.populate(len(mapping), 0)
        mapping.flush(0, 0)
        with pytest.raises(OSError):
            mapping.resize(0)
        with pytest.raises(OSError):
            mapping.unmap(0, 0)
        with pytest.raises(ValueError), mapping.pin(0, 0):
            pass


MAPPING_CALLS: Final[dict[str, Callable[[dax_mp.Mapping, int], object]]] = {
    "populate": lambda mapping, number: mapping.populate(number, 1),
    "populate a length": lambda mapping, number: mapping.populate(0, number),
    "pin": lambda mapping, number: mapping.pin(number, 1).__enter__(),
    "pin a length": lambda mapping, number: mapping.pin(0, number).__enter__(),
    "unmap": lambda mapping, number: mapping.unmap(number * PAGE, PAGE),
    "unmap a length": lambda mapping, number: mapping.unmap(0, number * PAGE),
    "move": lambda mapping, number: mapping.move(number, 0, 1),
    "move a count": lambda mapping, number: mapping.move(0, 0, number),
    "madvise": lambda mapping, number: mapping.madvise(0, number * PAGE, PAGE),
    "flush": lambda mapping, number: mapping.flush(number * PAGE, PAGE),
    "seek": lambda mapping, number: mapping.seek(number),
    "an index": lambda mapping, number: mapping[number],
    "a store": lambda mapping, number: mapping.__setitem__(number, 1),
}


@pytest.mark.parametrize("call", MAPPING_CALLS.values(), ids=MAPPING_CALLS)
def test_a_number_that_is_not_in_the_mapping(
    file: dax_mp.DaxFile, call: Callable[[dax_mp.Mapping, int], object]
) -> None:
    with file.mmap() as mapping:
        for number in (*PAST, LARGEST, LARGEST - 1, -LARGEST, 2 * PAGE + 6, -2 * PAGE - 6):
            with pytest.raises((OverflowError, ValueError, IndexError, OSError)):
                call(mapping, number)
        assert mapping[:] == b"x" * (2 * PAGE + 5)


MMAP_CALLS: Final[dict[str, Callable[[Any, int], object]]] = {
    "resize": lambda mapping, number: mapping.resize(number),
    "flush an offset": lambda mapping, number: mapping.flush(number),
    "flush a size": lambda mapping, number: mapping.flush(0, number),
    "madvise a start": lambda mapping, number: mapping.madvise(0, number),
    "madvise a length": lambda mapping, number: mapping.madvise(0, 0, number),
    "move": lambda mapping, number: mapping.move(0, number, 1),
    "seek": lambda mapping, number: mapping.seek(number),
    "find": lambda mapping, number: mapping.find(b"y", number),
    "read": lambda mapping, number: mapping.read(number),
    "an index": lambda mapping, number: mapping[number],
}


@pytest.mark.parametrize("call", MMAP_CALLS.values(), ids=MMAP_CALLS)
@pytest.mark.parametrize("number", PAST, ids=hex)
def test_numbers_too_large_raise_what_mmap_raises(
    file: dax_mp.DaxFile, call: Callable[[Any, int], object], number: int
) -> None:
    with mmap.mmap(-1, 2 * PAGE) as theirs, pytest.raises((OverflowError, IndexError, ValueError)) as expected:
        call(theirs, number)
    with file.mmap() as ours, pytest.raises(expected.type):
        call(ours, number)
