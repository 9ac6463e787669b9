"""What can be done to the file, and what that does to the model.

An operation is a tuple of plain numbers (`Operation`), whose meaning depends on the state it meets: an offset is taken
modulo what there is. So every part of a sequence is a sequence too, which is what shrinking needs.

Where tmpfs has no such operation (zero, collapse, insert range), or does not say what comes of it (stores past the end
of the file: whether a later growth shows them has changed over the years), it is done here alone, the model judges, and
the file of tmpfs is written over with what the model has.
"""

import random
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from exerciser.model import PAGES_MAX, Model

Command = tuple[Any, ...]
"""What a worker is told: see `worker.Worker`."""


class Operation(NamedTuple):
    """name: of a function below. process: who does it. a, b: any numbers. value: seeds the data."""

    name: str
    process: int
    a: int
    b: int
    value: int


class Step:
    """One operation meets a state: the numbers, made to fit."""

    def __init__(self, model: Model, operation: Operation) -> None:
        self.model = model
        self.page = model.page_size
        self.process = operation.process
        self.limit = PAGES_MAX * self.page
        self.offset = operation.a % self.limit
        self.length = 1 + operation.b % (3 * self.page)
        self.first = operation.a % PAGES_MAX
        self.count = 1 + operation.b % 3
        self.data = random.Random(operation.value).randbytes(self.length)
        self.keep_size = bool(operation.value % 2)

    def within(self) -> tuple[int, bytes] | None:
        """A part of the file that the mappings show, and data for it."""
        shown = min(len(self.model.data), self.limit)
        if not shown:
            return None
        offset = self.offset % shown
        return offset, self.data[: shown - offset]

    def write_kernel(self) -> list[Command]:
        """Bring the file of tmpfs to what the model has."""
        return [
            ("do", "kernel", "truncate", len(self.model.data)),
            ("do", "kernel", "pwrite", 0, bytes(self.model.data)),
        ]


def pwrite(step: Step) -> list[Command]:
    step.model.write(step.offset, step.data)
    return [("do", "both", "pwrite", step.offset, step.data)]


def pwritev(step: Step) -> list[Command]:
    step.model.write(step.offset, step.data)
    middle = step.length // 2
    return [("do", "both", "pwritev", step.offset, [step.data[:middle], b"", step.data[middle:]])]


def append(step: Step) -> list[Command]:
    if len(step.model.data) > step.limit:
        return []
    step.model.write(len(step.model.data), step.data)
    return [("do", "both", "append", step.data)]


def truncate(step: Step) -> list[Command]:
    step.model.truncate(step.offset)
    return [("do", "both", "truncate", step.offset)]


def fallocate(step: Step) -> list[Command]:
    if not step.keep_size:
        step.model.grow(step.offset + step.length)
    return [("do", "both", "fallocate", step.offset, step.length, step.keep_size)]


def punch(step: Step) -> list[Command]:
    step.model.zero(step.offset, step.length)
    return [("do", "both", "punch", step.offset, step.length)]


def zero(step: Step) -> list[Command]:
    if not step.keep_size:
        step.model.grow(step.offset + step.length)
    step.model.zero(step.offset, step.length)
    return [("here", "zero_range", step.offset, step.length, step.keep_size), *step.write_kernel()]


def collapse(step: Step) -> list[Command]:
    start, end = step.first * step.page, (step.first + step.count) * step.page
    if end >= len(step.model.data):
        return []
    del step.model.data[start:end]
    step.model.drop_copies_past_eof()
    return [("here", "collapse_range", start, end - start), *step.write_kernel()]


def insert(step: Step) -> list[Command]:
    start = step.first * step.page
    if not start < len(step.model.data) <= step.limit:
        return []
    step.model.data[start:start] = bytes(step.count * step.page)
    return [("here", "insert_range", start, step.count * step.page), *step.write_kernel()]


def copy(step: Step) -> list[Command]:
    source, target = step.offset, (step.offset + step.length + step.first * 7) % step.limit
    length = min(step.length, len(step.model.data) - source)
    if length <= 0 or abs(source - target) < step.length:
        return []
    step.model.write(target, bytes(step.model.data[source : source + length]))
    return [("do", "both", "copy", source, target, step.length)]


def store(step: Step) -> list[Command]:
    if (part := step.within()) is None:
        return []
    step.model.write(*part)
    return [("do", "both", "store", False, *part)]


def store_private(step: Step) -> list[Command]:
    if (part := step.within()) is None:
        return []
    step.model.store_private(step.process, *part)
    # A copy of the last page is one of what was stored past the end too, as in Linux; the model knows nothing of that.
    size = len(step.model.data)
    clean = [("do", "here", "store", False, size, bytes(-size % step.page))] if size < step.limit else []
    return [*clean, ("do", "both", "store", True, *part)]


def store_past_eof(step: Step) -> list[Command]:
    """Into the rest of the last page, which a mapping has and the file has not."""
    size = len(step.model.data)
    rest = -size % step.page
    if not rest or size > step.limit:
        return []
    return [("do", "here", "store", False, size, b"\xbb" * rest)]


def dont_need(step: Step) -> list[Command]:
    count = min(step.count, PAGES_MAX - step.first)
    if step.keep_size:
        for page in range(step.first, step.first + count):
            step.model.copies[step.process].pop(page, None)
    return [("do", "both", "dont_need", step.keep_size, step.first, count)]


def will_need(step: Step) -> list[Command]:
    return [("mapping", "madvise", 3, 0, step.limit)]


def populate(step: Step) -> list[Command]:
    if (part := step.within()) is None:
        return []
    return [("mapping", "populate", part[0], len(part[1]), step.keep_size)]


def remap(step: Step) -> list[Command]:
    if step.keep_size:
        step.model.copies[step.process].clear()
    return [("do", "both", "remap", step.keep_size)]


def unmap(step: Step) -> list[Command]:
    """A part of a mapping, and then it is mapped anew."""
    if step.keep_size:
        step.model.copies[step.process].clear()
    return [
        ("do", "here", "unmap", step.keep_size, step.first, min(step.count, PAGES_MAX - step.first)),
        ("do", "kernel", "remap", step.keep_size),
    ]


def resize(step: Step) -> list[Command]:
    """Of the shared mapping, and so of the file."""
    step.model.truncate(step.offset + 1)
    return [("do", "here", "resize", step.offset + 1), ("do", "kernel", "truncate", step.offset + 1)]


def read_into_memory(step: Step) -> list[Command]:
    """A system call stores into a pinned part of the shared mapping."""
    if (part := step.within()) is None:
        return []
    step.model.write(*part)
    return [("do", "both", "read_into_memory", *part)]


def pwrite_direct(step: Step) -> list[Command]:
    step.model.write(step.offset, step.data)
    return [
        ("do", "here", "pwrite_direct", step.offset, step.data),
        ("do", "kernel", "pwrite", step.offset, step.data),
    ]


def read(step: Step) -> list[Command]:
    """A direct read, a readv, and where the holes are."""
    if (part := step.within()) is None:
        return []
    offset, data = part[0], bytes(step.model.data[part[0] : part[0] + len(part[1])])
    third = len(data) // 3
    return [
        ("do", "here", "check_direct_read", offset, data),
        ("do", "both", "check_readv", offset, [data[:third], b"", data[third:]]),
        ("do", "here", "check_holes"),
    ]


OPERATIONS: Final[dict[str, Callable[[Step], list[Command]]]] = {
    function.__name__: function
    for function in (
        *(pwrite, pwritev, append, truncate, fallocate, punch, zero, collapse, insert, copy),
        *(store, store_private, store_past_eof, dont_need, will_need, populate, remap),
        *(unmap, resize, read_into_memory, pwrite_direct, read),
    )
}
WEIGHTS: Final = {"store": 4, "store_private": 4, "truncate": 3, "pwrite": 3, "punch": 2}
