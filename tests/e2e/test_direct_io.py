"""Reads and writes longer than a message, which go past the coordinator; and that shorter ones are atomic."""

import errno
import mmap
import os
import random
import threading
from typing import Final

import pytest

import dax_mp
from dax_mp import messages
from dax_mp.limits import IO_CHUNK_BYTES_MAX
from raw_peer import RawPeer
from script_process import Script

LONG: Final = IO_CHUNK_BYTES_MAX + 3 * mmap.PAGESIZE + 5
"""More than a message, and no whole number of pages."""


def noise(seed: int, length: int = LONG) -> bytes:
    return random.Random(seed).randbytes(length)


def test_within_a_file(session: dax_mp.Session) -> None:
    """Both ends in the middle of pages, into what is there: what is around stays."""
    before = noise(1, 3 << 20)
    data = noise(2)
    with session.open("file", "w+") as file:
        file.write(before)
        assert file.pwrite(data, 12_345) == LONG
        assert file.pread(4 << 20, 0) == before[:12_345] + data + before[12_345 + LONG :]
        buffer = bytearray(LONG)
        assert file.preadv([buffer], 12_345) == LONG
        assert buffer == data


def test_into_holes_that_others_see(session: dax_mp.Session, script: Script) -> None:
    """And past the end of a file whose last page has been stored to, beyond the end."""
    data = noise(3)
    with session.open("file", "w+") as file:
        file.truncate(100)
        with file.mmap(4 << 20, past_eof=True) as mapping:
            assert mapping[:100] == bytes(100)  # the hole is mapped
            mapping[100 : mmap.PAGESIZE] = b"x" * (mmap.PAGESIZE - 100)
            other = script(
                "import sys, dax_mp\n"
                "session = dax_mp.connect(sys.argv[1])\n"
                "mapping = session.open('file').mmap(4 << 20, past_eof=True, access=dax_mp.ACCESS_READ)\n"
                "print(sum(mapping[:100]), flush=True)\n"
                "input()\n"
                "print(mapping[:5_000].hex(), flush=True)\n"
                "mapping.close(); session.close()\n",
                session.endpoint,
            )
            assert other.line() == "0"
            assert file.pwrite(data, 1_000) == LONG
            other.go_on()
            expected = bytes(1_000) + data
            assert other.line() == expected[:5_000].hex()
            assert other.end()[0] == 0
            assert mapping[: len(expected)] == expected
            assert file.size == len(expected)
            assert file.pread(2 << 20, 0) == expected


def test_holes_read_as_zero(session: dax_mp.Session) -> None:
    with session.open("file", "w+") as file:
        file.truncate(4 << 20)
        file.pwrite(b"data", 3 << 20)
        buffer = bytearray(b"x" * (4 << 20))
        assert file.readinto(buffer) == 4 << 20
        assert buffer.count(0) == (4 << 20) - 4
        assert file.pread(4 << 20, 4 << 20) == b""
        assert file.pread(4 << 20, (4 << 20) - 5) == bytes(5)


@pytest.mark.parametrize("touched", [False, True])
def test_from_and_into_a_mapping_of_the_same_file(session: dax_mp.Session, touched: bool) -> None:
    """A system call cannot fault the pages of the buffer in; they may be those that are lent."""
    data = noise(4)
    with session.open("file", "w+") as file:
        file.write(data)
        with file.mmap() as mapping:
            if touched:
                mapping.populate()
            with memoryview(mapping) as view:
                assert file.pwrite(view, LONG) == LONG
                assert file.pread(LONG, LONG) == data
                assert file.preadv([view], LONG) == LONG
        assert file.pread(LONG, 0) == data


def test_what_does_not_fit(session: dax_mp.Session) -> None:
    free = session.statfs().pages_free
    with session.open("file", "w+") as file:
        file.write(b"before")
        with pytest.raises(OSError) as raised:
            file.write(bytes(free * mmap.PAGESIZE))
        assert raised.value.errno == errno.ENOSPC
        assert file.pread(100, 0) == b"before"
        assert session.statfs().pages_free == free - 1


def test_appends_of_two_processes(session: dax_mp.Session, script: Script) -> None:
    text = (
        "import sys, dax_mp\n"
        "with dax_mp.connect(sys.argv[1]) as session, session.open('log', 'a') as file:\n"
        "    for _ in range(4):\n"
        "        file.write(sys.argv[2].encode() * int(sys.argv[3]))\n"
    )
    writers = [script(text, session.endpoint, letter, str(LONG)) for letter in "ab"]
    assert [writer.end() for writer in writers] == [(0, "", "")] * 2
    with session.open("log") as file:
        records = [file.read(LONG) for _ in range(8)]
        assert file.read(1) == b""
    assert sorted(records) == sorted([b"a" * LONG, b"b" * LONG] * 4)


def test_threads_share_what_is_left_unanswered(session: dax_mp.Session) -> None:
    """The answer that a long read does not wait for is not taken for that of the next request, whoever makes it."""
    with session.open("file", "w+") as file:
        file.truncate(4 * LONG)

        def work(number: int) -> None:
            generator = random.Random(number)
            for _ in range(40):
                data, offset = noise(generator.getrandbits(32)), number * LONG
                assert file.pwrite(data, offset) == LONG
                assert file.pread(100, offset + 50) == data[50:150]
                assert file.pread(LONG, offset) == data
                assert file.size == 4 * LONG

        errors: list[BaseException] = []

        def caught(number: int) -> None:
            try:
                work(number)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=caught, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors


def test_ctrl_c_in_the_middle(session: dax_mp.Session, script: Script) -> None:
    """What was lent is given back: nobody waits for it."""
    process = script(
        "import sys, dax_mp\n"
        "session = dax_mp.connect(sys.argv[1])\n"
        "file = session.open('file', 'w+')\n"
        "data = bytes(int(sys.argv[2]))\n"
        "try:\n"
        "    print('writing', flush=True)\n"
        "    while True:\n"
        "        file.pwrite(data, 0)\n"
        "        file.pread(len(data), 0)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
        "input()\n"
        "file.close(); session.close()\n",
        session.endpoint,
        str(LONG),
    )
    assert process.line() == "writing"
    os.kill(process.pid, 2)
    assert process.line() == "interrupted"
    with session.open("file", "r+") as file:
        assert file.pwrite(noise(5), 0) == LONG
    process.go_on()
    assert process.end() == (0, "", "")


def test_a_message_is_atomic(session: dax_mp.Session, script: Script) -> None:
    """Of writes that are not longer than a message, a read sees all or nothing, and no write is seen in two parts."""
    text = (
        "import sys, dax_mp\n"
        "length = int(sys.argv[3])\n"
        "with dax_mp.connect(sys.argv[1]) as session, session.open('file', 'r+') as file:\n"
        "    for number in range(60):\n"
        "        file.pwrite(bytes([number % 100 + int(sys.argv[2])]) * length, 7)\n"
        "        data = file.pread(length, 7)\n"
        "        assert data.count(data[0]) == length, 'torn'\n"
    )
    with session.open("file", "w+") as file:
        file.write(bytes(7 + IO_CHUNK_BYTES_MAX))
        writers = [script(text, session.endpoint, str(first), str(IO_CHUNK_BYTES_MAX)) for first in (0, 100)]
        while any(writer.process.poll() is None for writer in writers):
            data = file.pread(IO_CHUNK_BYTES_MAX, 7)
            assert data.count(data[0]) == IO_CHUNK_BYTES_MAX
        assert [writer.end() for writer in writers] == [(0, "", "")] * 2


def test_a_load_of_a_hole_beside_a_long_write_that_has_all_of_the_page_cache_locked() -> None:
    """The write is of another file, and its process takes as long as it likes: the load is served all the same."""
    cache_pages = 64
    page = mmap.PAGESIZE
    with (
        dax_mp.launch("16MiB", "page-cache", cache_pages * page, debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        RawPeer(daemon.endpoint) as writer,
    ):
        with session.open("cached", "w+") as file:
            file.truncate(cache_pages * page)
            mapping = file.mmap()
            assert sum(mapping[::page]) == 0  # each page of the hole has a frame of the cache now
            assert session.statfs().dram_pages_free == 0
        writer.hello()
        handle = writer.request(messages.Open(1, "cached", 0))[0]
        writer.request(messages.BeginWrite(1, handle, 0, 0, cache_pages * page))
        with session.open("other", "w+") as file:
            file.truncate(page)
            with file.mmap() as other:
                assert other[0] == 0
                other[0] = 7
                assert file.pread(1, 0) == b"\7"
        writer.kill()
        mapping.close()
