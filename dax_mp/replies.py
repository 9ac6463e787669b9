"""What the reply to each request must be: the coordinator's side of the schema.

A Reply does not say what it answers, so `schema.decode` takes any value in it. Who has sent the request knows:
`misfit` looks at the value before anybody takes it apart. Each check has the request's fields (without its id) beside
the value: data is not longer than was asked for, and a list that is asked for piece by piece goes on after the last
piece, so that asking ends.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

from dax_mp import messages, schema
from dax_mp.limits import XATTR_BYTES_MAX
from dax_mp.messages import Access, Target

Fields = Sequence[Any]
Check = Callable[[Any, Fields], bool]


def _number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= schema.UINT


def _numbers(value: Any, width: int = 1) -> bool:
    return type(value) is list and len(value) % width == 0 and all(map(_number, value))


def _nothing(value: Any, _fields: Fields) -> bool:
    return value is None


def _one_number(value: Any, _fields: Fields) -> bool:
    return _number(value)


def _data(value: Any, fields: Fields) -> bool:
    return type(value) is bytes and len(value) <= fields[-1]


def _count(value: Any, fields: Fields) -> bool:
    return _number(value) and bool(value <= fields[-1])


def _opened(value: Any, _fields: Fields) -> bool:
    return _numbers(value) and len(value) == 3


def _has(value: Any, shape: dict[str, Callable[[Any], bool]]) -> bool:
    """Is it a mapping with these keys at least, and are their values as the functions have it?"""
    return type(value) is dict and all(key in value and check(value[key]) for key, check in shape.items())


def _is_truth(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_mapper(value: Any) -> bool:
    return _has(value, {"pid": _number, "vmas": _number})


_STAT: Final[dict[str, Callable[[Any], bool]]] = {
    "ino": _number,
    "name": lambda value: value is None or schema.name(value),
    "size_bytes": _number,
    "blocks": _number,
    "nlink": _number,
    "atime_ns": _number,
    "mtime_ns": _number,
    "ctime_ns": _number,
    "mappers": lambda value: type(value) is list and all(map(_is_mapper, value)),
}


def _stat(value: Any, _fields: Fields) -> bool:
    return _has(value, _STAT)


def _files(value: Any, fields: Fields) -> bool:
    """By name, after the one that was asked for."""
    if type(value) is not list or not all(_has(item, _STAT) and item["name"] for item in value):
        return False
    return all(before < name for before, name in pairwise([fields[0], *(item["name"] for item in value)]))


def _extents(value: Any, fields: Fields) -> bool:
    """By offset; none is empty, none ends before the page that was asked for."""
    if not _numbers(value, 3):
        return False
    return _goes_on(value[::3], value[1::3], fields[1])


def _goes_on(starts: list[int], lengths: list[int], after: int) -> bool:
    for start, length in zip(starts, lengths, strict=True):
        if not length or start + length <= after:
            return False
        after = start + length
    return True


def _is_piece(target: int, access: int) -> bool:
    return target <= max(Target) and access <= Access.READ | Access.WRITE


_VMA: Final[dict[str, Callable[[Any], bool]]] = {
    "pid": _number,
    "evicted": _is_truth,
    "vma_id": _number,
    "pgoff": _number,
    "length_pages": _number,
    "access": lambda value: _number(value) and _is_piece(0, value),
    "private": _is_truth,
    "mapped": lambda value: _numbers(value, 5) and all(map(_is_piece, value[2::5], value[4::5])),
}


def _vmas(value: Any, fields: Fields) -> bool:
    """By id, from the one that was asked for on; of that, what is mapped from the page on that was asked for."""
    if type(value) is not list or not all(_has(item, _VMA) for item in value):
        return False
    _name, vma_id, pgoff = fields
    for item in value:
        after = pgoff if item["vma_id"] == vma_id else 0
        if item["vma_id"] < vma_id or not _goes_on(item["mapped"][::5], item["mapped"][1::5], after):
            return False
        vma_id, pgoff = item["vma_id"] + 1, 0
    return True


_STATFS: Final[dict[str, Callable[[Any], bool]]] = {
    "page_size": _number,
    "hole_policy": _is_text,
    "pages": _number,
    "pages_free": _number,
    "pages_quarantined": _number,
    "dram_pages": _number,
    "dram_pages_free": _number,
    "files": _number,
    "sessions": _number,
    "vmas": _number,
    "counters": lambda value: type(value) is dict and all(map(_is_text, value)) and all(map(_number, value.values())),
}


def _statfs(value: Any, _fields: Fields) -> bool:
    return _has(value, _STATFS)


def _is_region_name(value: Any) -> bool:
    return schema.name(value) and value[0] == "/" and value.count("/") == 1 and "\0" not in value


_WELCOME: Final[dict[str, Callable[[Any], bool]]] = {
    "page_size": _number,
    "hole_policy": _is_text,
    "pmem_name": _is_region_name,
    "pmem_pages": _number,
    "dram_name": lambda value: value is None or _is_region_name(value),
    "dram_pages": _number,
    "uuid": lambda value: type(value) is bytes,
    "ack_timeout_s": lambda value: type(value) in (int, float) and 0 <= value <= schema.U32,
}


def _welcome(value: Any, _fields: Fields) -> bool:
    return _has(value, _WELCOME)


def _lent(value: Any, length_bytes: int) -> bool:
    return _numbers(value, 2) and sum(value[1::2]) <= length_bytes


def _lent_to_read(value: Any, fields: Fields) -> bool:
    return type(value) is list and len(value) == 2 and _number(value[0]) and _lent(value[1], fields[-1])


def _lent_to_write(value: Any, fields: Fields) -> bool:
    if type(value) is not list or len(value) != 4:
        return False
    io_id, offset_bytes, changes_file, flat = value
    return _number(io_id) and _number(offset_bytes) and type(changes_file) in (bool, int) and _lent(flat, fields[-1])


def _names(value: Any, _fields: Fields) -> bool:
    return type(value) is list and all(map(schema.name, value))


def _xattr(value: Any, _fields: Fields) -> bool:
    return type(value) is bytes and len(value) <= XATTR_BYTES_MAX


def _pairs(value: Any, _fields: Fields) -> bool:
    return _numbers(value, 2)


def _triples(value: Any, _fields: Fields) -> bool:
    return _numbers(value, 3)


REPLIES: Final[dict[Any, Check]] = {
    messages.Hello: _welcome,
    messages.Bye: _nothing,
    messages.Open: _opened,
    messages.Close: _nothing,
    messages.Stat: _stat,
    messages.Fstat: _stat,
    messages.List: _files,
    messages.Unlink: _nothing,
    messages.Rename: _nothing,
    messages.Link: _nothing,
    messages.Truncate: _nothing,
    messages.Fallocate: _nothing,
    messages.Read: _data,
    messages.Write: _one_number,
    messages.Seek: _one_number,
    messages.Extents: _extents,
    messages.Fsync: _nothing,
    messages.Maps: _vmas,
    messages.Statfs: _statfs,
    messages.CopyRange: _count,
    messages.BeginWrite: _lent_to_write,
    messages.BeginRead: _lent_to_read,
    messages.EndIo: _nothing,
    messages.Utime: _nothing,
    messages.Setxattr: _nothing,
    messages.Getxattr: _xattr,
    messages.Listxattr: _names,
    messages.Removexattr: _nothing,
    messages.Mmap: _one_number,
    messages.Msync: _nothing,
    messages.Munmap: _nothing,
    messages.Mremap: _nothing,
    messages.MunmapRange: _nothing,
    messages.Pin: _one_number,
    messages.Unpin: _nothing,
    messages.Adopt: _pairs,
    messages.Cuts: _triples,
    messages.Cancel: _nothing,
}


def misfit(request: Any, fields: Fields, value: Any) -> str | None:
    """What is wrong with the value of the reply to a request of this class, None where it fits.

    fields: the request's, all but its id.
    """
    if REPLIES[request](value, fields):
        return None
    return f"the coordinator's reply to {request.__name__} is not as the protocol has it"
