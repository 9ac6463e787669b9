"""The wire: what is encoded is decoded, each limit holds, and garbage is a ProtocolError and nothing else."""

import typing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dax_mp import messages
from dax_mp.errors import ProtocolError
from dax_mp.limits import (
    IO_CHUNK_BYTES_MAX,
    IO_LEASE_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    NAME_BYTES_MAX,
    OFFSET_BYTES_MAX,
    SEGMENTS_MAX,
    XATTR_BYTES_MAX,
)
from dax_mp.messages import CODES, Map, Open, Read, Reply, Unmap, Write, decode, encode
from interrupts import interrupt

U32_MAX = (1 << 32) - 1
checked = settings(database=None, deadline=None, max_examples=300)


class Field(typing.NamedTuple):
    """values: some that the field takes, its limits among them. refused: some that it does not."""

    values: list[Any]
    refused: list[Any]


NO_INTEGER = [-1, 1.0, "1", b"1", None, True, [1]]


def integer(maximum: int) -> Field:
    return Field([0, maximum], [maximum + 1, *NO_INTEGER])


def data(length_max: int) -> Field:
    return Field([b"", b"\x00\xff", bytes(length_max)], [bytes(length_max + 1), "", 1, None, [b""]])


def tuples(width: int) -> Field:
    most = [OFFSET_BYTES_MAX] * width * SEGMENTS_MAX
    wrong_items = [[*([0] * (width - 1)), item] for item in (-1, OFFSET_BYTES_MAX + 1, "", None)]
    too_many = most + [0] * width
    return Field([[], [0] * width, most], [too_many, most[1:], [0] * (width + 1), None, 1, b"", {}, *wrong_items])


NAME = Field(["a", "ü" * 127 + "a", "x" * NAME_BYTES_MAX], ["", "x" * (NAME_BYTES_MAX + 1), "ü" * 128, b"a", 1, None])
TEXT = Field(["", "x" * 4096, "ü" * 4096], ["x" * 4097, b"", 1, None])
UINT, U32 = integer(OFFSET_BYTES_MAX), integer(U32_MAX)
CHUNK = integer(IO_CHUNK_BYTES_MAX)
LEASE = integer(IO_LEASE_BYTES_MAX)

SCHEMA: dict[str, list[Field]] = {
    "PagerHello": [U32],
    "Fault": [UINT, UINT, UINT, integer(1)],
    "UnmapAck": [UINT],
    "Dropped": [],
    "PagerReady": [U32],
    "Map": [UINT, UINT, tuples(5)],
    "FaultError": [UINT, UINT, UINT, UINT, U32],
    "Unmap": [UINT, integer(1), tuples(3)],
    "Evict": [U32],
    "Hello": [U32, U32],
    "Bye": [U32],
    "Open": [U32, NAME, integer(31)],
    "Close": [U32, UINT],
    "Stat": [U32, NAME],
    "Fstat": [U32, UINT],
    "List": [U32, TEXT],
    "Unlink": [U32, NAME],
    "Rename": [U32, NAME, NAME, integer(1)],
    "Link": [U32, UINT, NAME, integer(1)],
    "Truncate": [U32, UINT, UINT],
    "Fallocate": [U32, UINT, integer(63), UINT, UINT],
    "CopyRange": [U32, UINT, UINT, UINT, UINT, CHUNK],
    "BeginWrite": [U32, UINT, UINT, integer(1), LEASE],
    "BeginRead": [U32, UINT, UINT, LEASE],
    "EndIo": [U32, UINT, LEASE],
    "Pin": [U32, UINT, UINT, UINT],
    "Unpin": [U32, UINT],
    "Mremap": [U32, UINT, UINT],
    "MunmapRange": [U32, UINT, UINT, UINT],
    "Adopt": [U32, data(16), UINT],
    "Cuts": [U32],
    "Setxattr": [U32, UINT, NAME, data(XATTR_BYTES_MAX)],
    "Getxattr": [U32, UINT, NAME],
    "Listxattr": [U32, UINT],
    "Removexattr": [U32, UINT, NAME],
    "Cancel": [U32, U32],
    "Read": [U32, UINT, UINT, CHUNK],
    "Write": [U32, UINT, UINT, integer(1), data(IO_CHUNK_BYTES_MAX)],
    "Seek": [U32, UINT, UINT, integer(4)],
    "Extents": [U32, UINT, UINT, integer(1)],
    "Utime": [U32, UINT, integer(1), UINT, UINT],
    "Msync": [U32, UINT],
    "Mmap": [U32, UINT, UINT, UINT, integer(3), integer(1)],
    "Munmap": [U32, UINT],
    "Fsync": [U32, UINT],
    "Maps": [U32, NAME, UINT, UINT],
    "Statfs": [U32],
    "Reply": [U32, Field([None, 5, b"x", [1, {"a": [b""]}]], [])],
    "Error": [U32, U32, TEXT],
}

CLASSES = {cls.__name__: cls for cls in CODES}
FIELDS = [(name, index) for name, fields in SCHEMA.items() for index in range(len(fields))]


def test_every_message_is_in_the_schema_here() -> None:
    assert {name: len(cls._fields) for name, cls in CLASSES.items()} == {n: len(fields) for n, fields in SCHEMA.items()}
    unions = (messages.PagerRequest, messages.PagerOrder, messages.ControlRequest, messages.ControlAnswer)
    assert {cls for union in unions for cls in typing.get_args(union)} == set(CODES)
    assert len(set(CODES.values())) == len(CODES)


@pytest.mark.parametrize("name", SCHEMA)
def test_round_trip(name: str) -> None:
    fields = SCHEMA[name]
    for chosen in range(max((len(field.values) for field in fields), default=1)):
        message = CLASSES[name](*(field.values[min(chosen, len(field.values) - 1)] for field in fields))
        decoded = decode(encode(message))
        assert decoded == message and type(decoded) is type(message)


def packed(name: str, fields: list[Any]) -> bytes:
    data: bytes = msgpack.packb([CODES[CLASSES[name]], *fields])
    return data


@pytest.mark.parametrize(("name", "index"), FIELDS)
def test_each_field_at_and_past_its_limits(name: str, index: int) -> None:
    good = [field.values[0] for field in SCHEMA[name]]
    for value in SCHEMA[name][index].values:
        assert decode(packed(name, [*good[:index], value, *good[index + 1 :]]))[index] == value
    for value in SCHEMA[name][index].refused:
        with pytest.raises(ProtocolError, match=name):
            decode(packed(name, [*good[:index], value, *good[index + 1 :]]))


@pytest.mark.parametrize("name", SCHEMA)
def test_a_field_too_many_or_too_few(name: str) -> None:
    good = [field.values[0] for field in SCHEMA[name]]
    with pytest.raises(ProtocolError, match=f"{name} with {len(good) + 1} fields"):
        decode(packed(name, [*good, 0]))
    if good:
        with pytest.raises(ProtocolError, match=f"{name} with {len(good) - 1} fields"):
            decode(packed(name, good[:-1]))


def test_the_largest_messages_fit() -> None:
    write = Write(U32_MAX, OFFSET_BYTES_MAX, OFFSET_BYTES_MAX, 1, bytes(IO_CHUNK_BYTES_MAX))
    assert len(encode(write)) <= MESSAGE_BYTES_MAX
    assert len(encode(Reply(U32_MAX, bytes(IO_CHUNK_BYTES_MAX)))) <= MESSAGE_BYTES_MAX
    assert len(encode(Map(OFFSET_BYTES_MAX, OFFSET_BYTES_MAX, [OFFSET_BYTES_MAX] * 5 * SEGMENTS_MAX))) <= 4096


def test_a_message_that_is_too_long_is_not_looked_at() -> None:
    message = encode(Reply(1, bytes(MESSAGE_BYTES_MAX)))
    with pytest.raises(ProtocolError, match=f"a message of {len(message)} bytes"):
        decode(message)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xc1",
        b"\x91" * 2000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        msgpack.packb({1: 2}),
        msgpack.packb([]),
        msgpack.packb(["Open"]),
        msgpack.packb([True, 1]),
        msgpack.packb([999]),
        msgpack.packb([[1], 1]),
        msgpack.packb([34, 1, msgpack.ExtType(5, b"x"), 0]),
        msgpack.packb([34, 1, msgpack.Timestamp(1), 0]),
        msgpack.packb([34, 1, b"\xff\xfe", 0]),
        b"\x94\x22\x01\xa2\xff\xfe\x00",  # a name that is not UTF-8
        b"\x94\x22\x01\xa3\xed\xa0\x80\x00",  # one with a lone surrogate
        encode(Open(1, "a", 0)) + b"\x00",
    ],
)
def test_garbage(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(garbage)


@pytest.mark.parametrize("data", [encode(Open(1, "a", 0)), b"\xc1"])
def test_the_exception_of_a_signal_handler_in_decode_is_no_protocol_error(data: bytes) -> None:
    """Before whichever bytecode it comes, it is what the caller gets.

    In a thread of its own: what CPython 3.11 is handling when a trace function raises, it may take itself to be
    handling from then on, in that thread.
    """
    with ThreadPoolExecutor(1) as thread:
        at, raised = thread.submit(interrupted_everywhere, data).result()
    assert type(raised) is (ProtocolError if data == b"\xc1" else type(None))
    assert at > 20


def interrupted_everywhere(data: bytes) -> tuple[int, Exception | None]:
    """How many bytecodes it has, and what it raises when nothing comes."""
    for at in range(1, 10_000):
        error = ValueError("of a handler")
        raised = raised_by(partial(interrupt, partial(decode, data), at, error, "dax_mp.schema"))
        if raised is not error:
            break
    return at, raised


def raised_by(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def decode_or_refuse(data: bytes) -> None:
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert type(message) in CODES
    decode(encode(message))  # what was taken for a message is one


@checked
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    decode_or_refuse(data)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(database=None, deadline=None, max_examples=100)
@given(st.sampled_from(sorted(CODES.values())) | values, st.lists(values, max_size=6))
@example(34, [1, "a", 0])
def test_no_fields_raise_anything_else(code: Any, fields: list[Any]) -> None:
    decode_or_refuse(msgpack.packb([code, *fields]))


@checked
@given(st.sampled_from(sorted(SCHEMA)), st.integers(0, 60), st.integers(0, 255), st.integers(0, 60))
def test_no_damage_raises_anything_else(name: str, at: int, byte: int, cut: int) -> None:
    data = bytearray(packed(name, [field.values[0] for field in SCHEMA[name]]))
    data[at % len(data)] = byte
    decode_or_refuse(bytes(data))
    decode_or_refuse(bytes(data[: cut % (len(data) + 1)]))


def test_unmaps_and_maps_keep_to_the_native_buffers() -> None:
    """The C side reads at most SEGMENTS_MAX; decode refuses what it would not take."""
    assert decode(encode(Unmap(1, 0, [0] * 3 * SEGMENTS_MAX))).ranges == [0] * 3 * SEGMENTS_MAX
    assert Read(1, 1, 0, IO_CHUNK_BYTES_MAX) == decode(encode(Read(1, 1, 0, IO_CHUNK_BYTES_MAX)))
