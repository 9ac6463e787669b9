"""dax_mp/mmu/wire.c against messages.py: what one encodes the other decodes, and garbage is refused.

The C code is built here by itself, with a trap at undefined behaviour, and its input ends where the next page may not
be read: a read behind the data ends the process.
"""

import ctypes
import errno
import mmap
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dax_mp import messages
from dax_mp.limits import OFFSET_BYTES_MAX, SEGMENTS_MAX

SOURCE: Final = Path(__file__).parent.parent.parent / "dax_mp" / "mmu" / "wire.c"
FIELDS_MAX: Final = 5
ITEMS_MAX: Final = 5 * SEGMENTS_MAX
PROT_NONE: Final = 0


class Decoded(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_uint64),
        ("fields", ctypes.c_uint64 * FIELDS_MAX),
        ("items_count", ctypes.c_size_t),
        ("items", ctypes.c_uint64 * ITEMS_MAX),
        ("guard", ctypes.c_uint64),
    ]


class Wire:
    """wire.c, and two pages of which the second may not be read."""

    def __init__(self, library: Path) -> None:
        self.functions = ctypes.CDLL(str(library))
        self.functions.wire_encode.restype = ctypes.c_size_t
        self.pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        protect = ctypes.CDLL(None).mprotect
        assert protect(ctypes.c_void_p(self.base + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0

    def decode(self, data: bytes) -> Decoded | None:
        """None for EPROTO."""
        start = mmap.PAGESIZE - len(data)
        self.pages[start : mmap.PAGESIZE] = data
        decoded = Decoded(guard=0x5AFE)
        error = self.functions.wire_decode(
            ctypes.c_void_p(self.base + start), ctypes.c_size_t(len(data)), ctypes.byref(decoded)
        )
        assert error in (0, errno.EPROTO)
        assert decoded.guard == 0x5AFE
        return None if error else decoded

    def encode(self, message: messages.PagerRequest) -> bytes:
        fields = (ctypes.c_uint64 * len(message))(*message)
        buffer = ctypes.create_string_buffer(mmap.PAGESIZE)
        size = self.functions.wire_encode(buffer, messages.CODES[type(message)], fields, ctypes.c_size_t(len(message)))
        return buffer.raw[:size]


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    library = tmp_path_factory.mktemp("wire") / "wire.so"
    flags = ["-std=c11", "-O1", "-g", "-shared", "-fPIC", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    subprocess.run(["cc", *flags, "-o", library, SOURCE], check=True)
    yield Wire(library)
    library.unlink()


uints = st.integers(0, OFFSET_BYTES_MAX) | st.sampled_from([0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32])
u32s = st.integers(0, 2**32 - 1)


def flat(width: int) -> st.SearchStrategy[list[int]]:
    return st.integers(0, SEGMENTS_MAX).flatmap(lambda n: st.lists(uints, min_size=n * width, max_size=n * width))


orders: st.SearchStrategy[messages.PagerOrder] = st.one_of(
    st.builds(messages.PagerReady, u32s),
    st.builds(messages.Map, uints, uints, flat(5)),
    st.builds(messages.FaultError, uints, uints, uints, uints, u32s),
    st.builds(messages.Unmap, uints, st.integers(0, 1), flat(3)),
    st.builds(messages.Evict, u32s),
)
requests: st.SearchStrategy[messages.PagerRequest] = st.one_of(
    st.builds(messages.PagerHello, u32s),
    st.builds(messages.Fault, uints, uints, uints, st.integers(0, 1)),
    st.builds(messages.UnmapAck, uints),
    st.builds(messages.Dropped),
)


ORDERS: Final = {
    messages.CODES[cls]: cls
    for cls in (messages.PagerReady, messages.Map, messages.FaultError, messages.Unmap, messages.Evict)
}


def as_message(decoded: Decoded) -> object:
    cls: Any = ORDERS[decoded.type]
    fields: list[Any] = list(decoded.fields)
    if cls in (messages.Map, messages.Unmap):
        fields[len(cls._fields) - 1] = decoded.items[: decoded.items_count]
    return cls(*fields[: len(cls._fields)])


@given(message=requests)
def test_python_reads_what_c_writes(wire: Wire, message: messages.PagerRequest) -> None:
    assert wire.encode(message) == messages.encode(message)


@given(message=orders)
def test_c_reads_what_python_writes(wire: Wire, message: messages.PagerOrder) -> None:
    decoded = wire.decode(messages.encode(message))
    assert decoded is not None
    assert as_message(decoded) == message


@given(message=orders, cut=st.integers(0, 100))
def test_no_part_of_a_message_is_a_message(wire: Wire, message: messages.PagerOrder, cut: int) -> None:
    data = messages.encode(message)
    assert wire.decode(data[: cut % len(data)]) is None
    assert wire.decode(data + b"\0") is None


@given(data=st.binary(max_size=64))
def test_what_c_takes_python_takes(wire: Wire, data: bytes) -> None:
    check_agreement(wire, data)


@given(message=orders, changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_messages(wire: Wire, message: messages.PagerOrder, changes: list[tuple[int, int]]) -> None:
    data = bytearray(messages.encode(message))
    for position, value in changes:
        data[position % len(data)] = value
    check_agreement(wire, bytes(data))


def check_agreement(wire: Wire, data: bytes) -> None:
    """C takes nothing that Python refuses. Python takes more: msgpack has several ways to write a number."""
    decoded = wire.decode(data)
    if decoded is not None:
        assert messages.decode(data) == as_message(decoded)


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdc\xff\xff\x11",
        b"\x94\x11\x00\x00\xdd\xff\xff\xff\xfb" + b"\0" * 400,
        b"\x92\x14\xcf" + b"\xff" * 8,
        b"\x92\x14\xce\xff\xff\xff",
        b"\x92\x10\xcf\x00\x00\x00\x01\x00\x00\x00\x00",
    ],
)
def test_counts_and_numbers_that_are_too_large(wire: Wire, data: bytes) -> None:
    assert wire.decode(data) is None
