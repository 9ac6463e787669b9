"""Threads of one process that fault, resize, close and truncate at once."""

import errno
import mmap
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from coordinator_process import Serve

PAGE: Final = os.sysconf("SC_PAGESIZE")
PAGES: Final = 16
TURNS: Final = 150

Work = Callable[[random.Random], Any]


def nothing() -> None:
    """The interpreter looks for asynchronous exceptions where a function begins."""


def run(works: list[Work], allowed: tuple[type[Exception], ...]) -> None:
    """Each in a thread of its own, TURNS times. What is raised must be allowed, and a BusError be of the file's end."""
    wrong: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def repeat(number: int) -> None:
        randomness = random.Random(number)
        begin.wait()
        for _ in range(TURNS):
            try:
                works[number](randomness)
                nothing()
            except dax_mp.BusError as error:
                if error.errno != errno.EFAULT:
                    wrong.append(error)
            except allowed:
                pass
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=repeat, args=[number]) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.parametrize("policy", ["zero", "page-cache"])
def test_everything_at_once_on_one_mapping(serve: Serve, policy: str) -> None:
    coordinator = serve("--hole-policy", policy)
    with dax_mp.connect(coordinator.endpoint) as session, session.open("file", "x+") as file:
        file.truncate(PAGES * PAGE)
        with file.mmap() as mapping, file.mmap(access=dax_mp.ACCESS_COPY) as private:
            do_everything(file, mapping, private)
            mapping.resize(PAGES * PAGE)
            file.pwrite(bytes(range(256)) * (PAGES * PAGE // 256), 0)
            with memoryview(mapping) as view:
                assert mapping[:] == bytes(view) == file.pread(PAGES * PAGE, 0)
            mapping[5] = 77
            assert file.pread(1, 5) == b"\x4d"
        assert session.statfs().vmas == 0


def do_everything(file: dax_mp.DaxFile, mapping: dax_mp.Mapping, private: dax_mp.Mapping) -> None:
    array: Any = np.frombuffer(memoryview(mapping), "u1")
    copies: Any = np.frombuffer(memoryview(private), "u1")

    def place(randomness: random.Random) -> int:
        return randomness.randrange(PAGES * PAGE)

    def length(randomness: random.Random) -> int:
        return randomness.randint(1, PAGES * PAGE)

    def map_and_close(randomness: random.Random) -> None:
        with file.mmap(PAGES * PAGE, past_eof=True) as other:
            other[place(randomness)]
            other[place(randomness)] = 1

    works: list[Work] = [
        lambda randomness: int(array[place(randomness)]),
        lambda randomness: array.sum(),
        lambda randomness: array.__setitem__(place(randomness), 2),
        lambda randomness: copies.__setitem__(place(randomness), 3),
        lambda randomness: mapping.__setitem__(place(randomness), 4),
        lambda randomness: mapping.find(b"\5", 0),
        lambda randomness: mapping.resize(length(randomness)),
        lambda randomness: file.truncate(length(randomness)),
        lambda randomness: file.punch_hole(place(randomness), PAGE),
        lambda randomness: file.pwrite(b"6" * 100, place(randomness)),
        lambda randomness: mapping.madvise(mmap.MADV_DONTNEED),
        lambda randomness: mapping.populate(write=True),
        map_and_close,
    ]
    run(works, (ValueError, IndexError))


def test_one_that_is_closed_meanwhile(session: dax_mp.Session) -> None:
    """Who uses it then gets a ValueError, and nothing is touched that is not there any more."""
    with session.open("file", "x+") as file:
        file.truncate(PAGES * PAGE)
        for _ in range(20):
            mapping = file.mmap()
            close_under(
                mapping,
                [
                    lambda m=mapping: m[3 * PAGE : 7 * PAGE],  # type: ignore[misc]
                    lambda m=mapping: m.__setitem__(5 * PAGE, 1),  # type: ignore[misc]
                    lambda m=mapping: m.find(b"none", 0),  # type: ignore[misc]
                    lambda m=mapping: m.resize(PAGES * PAGE),  # type: ignore[misc]
                    lambda m=mapping: m.madvise(mmap.MADV_DONTNEED),  # type: ignore[misc]
                    lambda m=mapping: m.populate(),  # type: ignore[misc]
                    lambda m=mapping: bytes(memoryview(m)[:9]),  # type: ignore[misc]
                ],
            )
        assert file.stat().mappers == []


def close_under(mapping: dax_mp.Mapping, uses: list[Callable[[], Any]]) -> None:
    ends: list[BaseException] = []
    begin = threading.Barrier(len(uses) + 1)

    def use(call: Callable[[], Any]) -> None:
        begin.wait()
        try:
            while True:
                call()
        except BaseException as error:
            ends.append(error)

    threads = [threading.Thread(target=use, args=[call]) for call in uses]
    for thread in threads:
        thread.start()
    begin.wait()
    while not mapping.closed:
        try:
            mapping.close()
        except BufferError:  # a use has it exported right now
            continue
    for thread in threads:
        thread.join()
    assert {type(error) for error in ends} == {ValueError}, ends
