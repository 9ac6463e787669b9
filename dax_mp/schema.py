"""How a message becomes bytes, and bytes a message that can be trusted.

A message is one msgpack array whose first element is its type. Each message class is registered with its type and what
each of its fields must be. `decode` checks the type, the number of fields, and the type and range of each, and raises
ProtocolError, so that what reaches the state machine is well formed.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgpack

from dax_mp.errors import ProtocolError
from dax_mp.limits import MESSAGE_BYTES_MAX, NAME_BYTES_MAX, OFFSET_BYTES_MAX

Check = int | Callable[[Any], bool]
"""What a field must be: an unsigned integer up to that, or what the function accepts."""


def data(length_max: int) -> Check:
    return lambda value: type(value) is bytes and len(value) <= length_max


def tuples(width: int, length_max: int) -> Check:
    """A flat array of unsigned integers, `width` of them to an entry."""

    def check(value: Any) -> bool:
        if type(value) is not list or len(value) % width or len(value) > width * length_max:
            return False
        return all(type(item) is int and 0 <= item <= OFFSET_BYTES_MAX for item in value)

    return check


def name(value: Any) -> bool:
    return type(value) is str and 0 < len(value.encode("utf-8", "surrogatepass")) <= NAME_BYTES_MAX


def text(value: Any) -> bool:
    return type(value) is str and len(value) <= 4096


def anything(_value: Any) -> bool:
    return True  # the client reads it; the coordinator never decodes one


UINT: Final = OFFSET_BYTES_MAX
U32: Final = (1 << 32) - 1

_types: dict[int, tuple[type[Any], tuple[Check, ...]]] = {}
CODES: Final[dict[type[Any], int]] = {}
"""The type of each message, by its class."""

M = TypeVar("M", bound=type[Any])


def register(code: int, *checks: Check) -> Callable[[M], M]:
    def add(cls: M) -> M:
        assert code not in _types, f"two messages of type {code}"
        CODES[cls] = code
        _types[code] = (cls, checks)
        return cls

    return add


def encode(message: tuple[Any, ...]) -> bytes:
    """The message as bytes. Precondition: its fields keep to the schema (they are not checked again)."""
    packed: bytes = msgpack.packb((CODES[type(message)], *message))
    return packed


def _is_of_msgpack(error: Exception) -> bool:
    """Has no other Python code than msgpack's run between the function that has caught it and where it was raised?"""
    traceback = error.__traceback__
    while traceback is not None and (traceback := traceback.tb_next) is not None:
        if not traceback.tb_frame.f_globals.get("__name__", "").startswith("msgpack"):
            return False
    return True


def decode(data: bytes) -> Any:
    """The message in `data`, of the class that its type names.

    Raises ProtocolError when it is not msgpack, not an array, of no known type, or when a field is missing, too many,
    of another type or out of range.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"a message of {len(data)} bytes")
    try:
        fields = msgpack.unpackb(data)
    except Exception as error:  # msgpack documents no closed list of what unpackb may raise on garbage
        if not _is_of_msgpack(error):
            raise  # by a signal handler, which runs where it likes
        raise ProtocolError(f"not a msgpack message: {type(error).__name__}") from error
    if type(fields) is not list or not fields or type(fields[0]) is not int or fields[0] not in _types:
        raise ProtocolError("not a message of this protocol")
    cls, checks = _types[fields[0]]
    if len(fields) != len(checks) + 1:
        raise ProtocolError(f"{cls.__name__} with {len(fields) - 1} fields, not {len(checks)}")
    for index, check in enumerate(checks, 1):
        field = fields[index]
        if not (type(field) is int and 0 <= field <= check if isinstance(check, int) else check(field)):
            raise ProtocolError(f"{cls.__name__}: field {index} is not as the schema has it")
    return cls(*fields[1:])
