"""The hard bugs of Linux's DAX where they show in real memory: mappings that other processes keep, page tables, copies.

The numbers are those of `sim/test_linux_bugs.py`, which has the rest. The processes keep their mappings all along, so
what they see is what their page tables lead to.
"""

import errno
import mmap
import os
import socket
from collections.abc import Iterator
from typing import Any, Final

import pytest

import dax_mp
from dax_mp.messages import Fstat, Open, Reply, Truncate
from raw_peer import RawPeer
from script_process import Script, ScriptProcess

PAGE: Final = os.sysconf("SC_PAGESIZE")
PAGES: Final = 8
HUGE_BYTES: Final = 2 << 20
GONE: Final = f"BusError {errno.EFAULT}"

MAPPER: Final = """
import sys, dax_mp
endpoint, name, access, offset = sys.argv[1:]
PAGE = {PAGE}
with dax_mp.connect(endpoint) as session, session.open(name, "r+") as file:
    with file.mmap(0, access=int(access), offset=int(offset)) as mapping:
        print("ready", flush=True)
        for line in sys.stdin:
            command, page, value = line.split()
            at = int(page) * PAGE
            try:
                if command == "store":
                    mapping[at] = int(value)
                    print("stored", flush=True)
                else:
                    print(mapping[at], flush=True)
            except dax_mp.BusError as error:
                print("BusError", error.errno, flush=True)
""".replace("{PAGE}", str(PAGE))


class Mapper:
    """Another process that has the file mapped, and loads and stores the first byte of pages."""

    def __init__(self, process: ScriptProcess) -> None:
        self._process = process
        assert process.line() == "ready"

    def _ask(self, command: str) -> str:
        self._process.go_on(command)
        return self._process.line()

    def load(self, page: int) -> int | str:
        answer = self._ask(f"load {page} 0")
        return int(answer) if answer.isdigit() else answer

    def store(self, page: int, value: int) -> None:
        assert self._ask(f"store {page} {value}") == "stored"


@pytest.fixture
def file(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    """A file of PAGES pages, all of it a hole."""
    with session.open("file", "x+") as file:
        file.truncate(PAGES * PAGE)
        yield file


@pytest.fixture
def mapper(script: Script, session: dax_mp.Session, file: dax_mp.DaxFile) -> Any:
    """A function that starts a process which maps the file."""

    def start(access: int = dax_mp.ACCESS_WRITE, offset: int = 0) -> Mapper:
        return Mapper(script(MAPPER, session.endpoint, file.name, str(access), str(offset)))

    return start


def test_b1_a_process_that_has_a_hole_mapped_sees_what_is_written(file: dax_mp.DaxFile, mapper: Any) -> None:
    """The reader's page table kept the zero page (cd656375f946)."""
    reader = mapper(dax_mp.ACCESS_READ)
    assert [reader.load(page) for page in range(3)] == [0, 0, 0]
    file.pwrite(b"\1", 0)
    file.pwrite(b"\2" * (2 << 20), PAGE)  # a long one, which goes past the coordinator
    assert [reader.load(page) for page in range(3)] == [1, 2, 2]


def test_b9_a_process_whose_first_access_is_a_store(file: dax_mp.DaxFile, mapper: Any) -> None:
    """The zero page was taken from the writer's page table alone (2015-08-04)."""
    reader, writer = mapper(), mapper()
    assert reader.load(0) == 0
    writer.store(0, 5)
    assert reader.load(0) == 5
    reader.store(0, 6)
    assert writer.load(0) == 6


FIRST_TOUCH: Final = """
import sys, threading, dax_mp
endpoint, first, pages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with dax_mp.connect(endpoint) as session, session.open("file", "r+") as file, file.mmap() as mapping:
    def touch(place):
        for page in range(pages):
            mapping[page * {PAGE} + place] = place + 1
    threads = [threading.Thread(target=touch, args=(first + number,)) for number in range(4)]
    print("ready", flush=True)
    input()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
""".replace("{PAGE}", str(PAGE))


def test_b6_many_touch_the_same_holes_first(session: dax_mp.Session, file: dax_mp.DaxFile, script: Script) -> None:
    """The block of a hole was zeroed again after the first one had stored to it (843172978bb9); holetest. Processes and
    threads store a byte of their own in each page, all at once."""
    pages = 64
    file.truncate(pages * PAGE)
    processes = [script(FIRST_TOUCH, session.endpoint, str(4 * number), str(pages)) for number in range(3)]
    for process in processes:
        assert process.line() == "ready"
    for process in processes:
        process.go_on()
    for process in processes:
        assert process.end() == (0, "", "")
    for page in range(pages):
        assert file.pread(13, page * PAGE) == bytes(range(1, 13)) + b"\0", f"page {page}"
    assert file.stat().blocks == pages


def test_b11_addresses_and_offsets_that_differ_within_2_mib(file: dax_mp.DaxFile, mapper: Any) -> None:
    """A mapping whose address and file offset differed mod 2 MiB ended in a deadlock (fffa281b48a9). What a fault maps
    around itself is aligned in the file; the window begins anywhere."""
    file.truncate(2 * HUGE_BYTES + 3 * PAGE)
    other = mapper(offset=PAGE)
    with file.mmap(offset=2 * PAGE) as mapping:
        edges = [0, HUGE_BYTES - 3 * PAGE, HUGE_BYTES - 2 * PAGE, HUGE_BYTES - PAGE, 2 * HUGE_BYTES - 2 * PAGE]
        for number, at in enumerate(edges, 1):
            mapping[at] = number
            assert other.load(at // PAGE + 1) == number
        other.store(HUGE_BYTES // PAGE, 77)
        assert mapping[HUGE_BYTES - PAGE] == 77
        file.pwrite(b"\x09" * PAGES * PAGE, HUGE_BYTES - 4 * PAGE)
        assert mapping[HUGE_BYTES - 3 * PAGE] == 9
        assert other.load(HUGE_BYTES // PAGE) == 9


LEFT: Final[dict[str, list[int | str]]] = {
    "truncate": [1, 2, GONE, GONE],
    "punch": [1, 2, 0, 0],
    "collapse": [3, 4, GONE, GONE],
    "unlink": [1, 2, 3, 4],
}


@pytest.mark.parametrize("how", LEFT)
def test_b18_b19_a_freed_block_is_nobodys_that_had_it_mapped(serve: Any, script: Script, how: str) -> None:
    """A page table still led to a freed block, and to what another file then had in it (283307c7607d, ea3d7209ca01).
    The device has no more blocks than the file."""
    coordinator = serve(size=f"{4 * PAGE}")
    with dax_mp.connect(coordinator.endpoint) as session, session.open("file", "x+") as file:
        file.write(bytes(range(1, 5)) * PAGE)
        for page in range(4):
            file.pwrite(bytes([page + 1]), page * PAGE)
        mappers = [Mapper(script(MAPPER, session.endpoint, "file", "2", "0")) for _ in range(2)]
        for mapper in mappers:
            assert [mapper.load(page) for page in range(4)] == [1, 2, 3, 4]
        match how:
            case "truncate":
                file.truncate(2 * PAGE)
            case "punch":
                file.punch_hole(2 * PAGE, 2 * PAGE)
            case "collapse":
                file.collapse_range(0, 2 * PAGE)
            case "unlink":
                session.unlink("file")
        with session.open("other", "x+") as other:
            if how == "unlink":  # the mappings keep the blocks
                with pytest.raises(OSError) as raised:
                    other.write(b"\xff" * PAGE)
                assert raised.value.errno == errno.ENOSPC
            else:
                other.write(b"\xff" * 2 * PAGE)
            for mapper in mappers:
                assert [mapper.load(page) for page in range(4)] == LEFT[how]
            if how == "truncate":
                other.truncate(0)
                file.truncate(4 * PAGE)
                assert [mapper.load(3) for mapper in mappers] == [0, 0]
                mappers[0].store(3, 8)
                assert mappers[1].load(3) == 8


def test_b20_a_system_call_into_pages_that_are_cut_off(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    """DMA went into blocks that truncate had freed (430657b6be89). Here the kernel receives into pinned pages, and the
    truncate waits until it has."""
    sender, receiver = socket.socketpair()
    with sender, receiver, RawPeer(session.endpoint) as peer, file.mmap() as mapping:
        peer.hello()
        handle, _, _ = peer.request(Open(1, file.name, 0))
        with mapping.pin(2 * PAGE, 2 * PAGE) as view:
            peer.send(Truncate(2, handle, PAGE))
            # Answered before the truncate, which has come before it: that waits.
            assert peer.request(Fstat(3, handle))["size_bytes"] == PAGES * PAGE
            sender.sendall(b"\x05" * 2 * PAGE)
            assert receiver.recv_into(view, 2 * PAGE, socket.MSG_WAITALL) == 2 * PAGE
            assert view[0] == view[-1] == 5
        assert peer.answer() == Reply(2, None)
        with pytest.raises(dax_mp.BusError):
            mapping[2 * PAGE]


@pytest.mark.parametrize("how", ["punch", "zero", "write", "long write", "collapse", "truncate"])
def test_b21_private_copies(session: dax_mp.Session, file: dax_mp.DaxFile, mapper: Any, how: str) -> None:
    """A punch dropped private copies with all else, and what their process had stored was lost (dax:
    dax_layout_busy_page() should not unmap cow pages). Truncate drops them, and nothing else does."""
    file.pwrite(b"\1" * 4 * PAGE, 0)
    private, shared = mapper(mmap.ACCESS_COPY), mapper()
    for page in (1, 2):
        private.store(page, 70 + page)
    assert [private.load(page) for page in range(4)] == [1, 71, 72, 1]
    assert [shared.load(page) for page in range(4)] == [1, 1, 1, 1], "a private store has come into the file"
    others = {
        "punch": [0, 71, 72, 0],
        "zero": [0, 71, 72, 0],
        "write": [2, 71, 72, 2],
        "long write": [2, 71, 72, 2],
        "collapse": [1, 71, 72, 0],
        "truncate": [0, 0, 0, 0],
    }
    match how:
        case "punch":
            file.punch_hole(0, 4 * PAGE)
        case "zero":
            file.zero_range(0, 4 * PAGE)
        case "write":
            file.pwrite(b"\2" * 4 * PAGE, 0)
        case "long write":
            file.pwrite(b"\2" * (2 << 20), 0)
        case "collapse":
            file.collapse_range(0, PAGE)
        case "truncate":
            file.truncate(0)
            assert private.load(1) == GONE
            file.truncate(PAGES * PAGE)
    assert [private.load(page) for page in range(4)] == others[how]


def test_b23_bytes_past_the_end_in_a_page_that_stays_mapped(file: dax_mp.DaxFile, mapper: Any) -> None:
    """Truncate left them in the cached page, and a later mapping showed them (350976ae2187; generic/469)."""
    other = mapper()
    with file.mmap() as mapping:
        mapping[: 2 * PAGE] = b"\7" * 2 * PAGE
        assert other.load(1) == 7
        file.truncate(PAGE + 100)
        assert mapping[PAGE : 2 * PAGE] == b"\7" * 100 + bytes(PAGE - 100)
        mapping[PAGE + 200] = 9  # past the end, in the last page
        file.truncate(2 * PAGE)
        assert mapping[PAGE : 2 * PAGE] == b"\7" * 100 + bytes(PAGE - 100)
        assert file.pread(PAGE, PAGE) == b"\7" * 100 + bytes(PAGE - 100)
