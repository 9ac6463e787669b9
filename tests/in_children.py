"""What tests have done in processes of multiprocessing: in a module that those can import, as they cannot the tests."""

import os
from typing import Any

import dax_mp


def write_pid(file: dax_mp.DaxFile, index: int) -> int:
    with file:
        file.pwrite(bytes([index + 1]), index)
    return os.getpid()


def square(attach: Any, index: int) -> int:
    """In an array; returns its length."""
    array = attach()
    array[index] = index * index
    return len(array)


def set_all(array: Any, value: Any) -> bool:
    """Whether it is a file's memory."""
    array[...] = value
    return array.mapping is not None


def use_shared(shared: dax_mp.SharedMemory, place: int) -> tuple[int, int, int]:
    """Its size here, the length of its memory, and a byte; the next byte is set."""
    found = shared.size, len(shared.buf), shared.buf[place]
    shared.buf[place + 1] = place
    shared.close()
    return found


def square_in_list(numbers: "dax_mp.ShareableList[int]", index: int) -> int:
    """Returns its length."""
    numbers[index] = index * index
    length = len(numbers)
    numbers.shm.close()
    return length


class Counter(dax_mp.SharedMemory):
    """A subclass of a user's."""

    def add(self) -> int:
        self.buf[0] += 1
        return self.buf[0]


def add(counter: Counter) -> int:
    return counter.add()
