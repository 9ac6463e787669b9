"""Sessions from Hello to their end, what ends them, limits, and the errors of requests."""

import errno
from collections.abc import Callable
from typing import Any, get_args

import pytest

from dax_mp import coordinator as coordinator_module
from dax_mp import requests
from dax_mp.address_space import Vma, pack_pte
from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.coordinator import Coordinator
from dax_mp.device import Device, HolePolicyName
from dax_mp.effects import EndSession, SendControl, SendPager
from dax_mp.errors import ProtocolError
from dax_mp.limits import LIST_ENTRIES_MAX, MESSAGE_BYTES_MAX, OFFSET_BYTES_MAX, SEGMENTS_MAX
from dax_mp.memory import ByteArrayMemory
from dax_mp.messages import (
    PROTOCOL_VERSION,
    Access,
    Adopt,
    Bye,
    Cancel,
    Close,
    ControlRequest,
    Dropped,
    Evict,
    Extents,
    Fallocate,
    Fault,
    FaultError,
    Fsync,
    Hello,
    List,
    Maps,
    Mmap,
    Munmap,
    Open,
    PagerHello,
    PagerReady,
    Read,
    Reply,
    Seek,
    Statfs,
    Target,
    Truncate,
    Unmap,
    UnmapAck,
    Write,
    encode,
)
from dax_mp.requests import MAPPED_ENTRIES_MAX
from dax_mp.session import SessionState
from simulation.client import PAGE_SIZE, Call, Failed, Load, Store, page_bytes
from simulation.world import ACK_TIMEOUT_S, READ_WRITE, Event, World, read_page, write_page

A, B = b"a" * 16, b"b" * 16


@pytest.fixture
def world() -> World:
    return world_of_two("zero")


def world_of_two(policy: HolePolicyName) -> World:
    """Two clients; handle 1 of each is the same file of 4 pages, which is VMA 1 and 2."""
    world = World(policy, pmem_pages=8)
    for number in (0, 1):
        world.add_client()
        world.open(number, "file")
    world.call(0, Truncate(0, 1, 4 * PAGE_SIZE))
    for number in (0, 1):
        world.map(number, 1, 4)
    return world


@pytest.fixture
def coordinator() -> Coordinator:
    """With an open session A whose pager has not come yet."""
    coordinator = Coordinator(Device(PAGE_SIZE, ByteArrayMemory(9 * PAGE_SIZE), 8), 1.0, {"welcome": 1}, debug=True)
    coordinator.session_opened(A, 1)
    return coordinator


def error_of(world: World, client: int, request: object) -> int | None:
    with pytest.raises(OSError) as caught:
        world.call(client, request)  # type: ignore[arg-type]
    return caught.value.errno


def state(world: World, client: int) -> SessionState:
    return world.coordinator.sessions[world.clients[client].token].state


# --- the beginning ----------------------------------------------------------------------------------------------------


def test_hello_is_answered_with_the_welcome(coordinator: Coordinator) -> None:
    coordinator.receive_control(A, A + b"1", Hello(7, PROTOCOL_VERSION))
    assert coordinator.take_effects() == [SendControl(A + b"1", Reply(7, {"welcome": 1}))]
    assert coordinator.take_effects() == [], "an effect is given once"


def test_a_pager_says_hello_once(coordinator: Coordinator) -> None:
    coordinator.receive_pager(A, PagerHello(PROTOCOL_VERSION))
    assert coordinator.take_effects() == [SendPager(A, PagerReady(PROTOCOL_VERSION))]
    coordinator.receive_pager(A, PagerHello(PROTOCOL_VERSION))
    assert coordinator.take_effects() == [SendPager(A, Evict(errno.EPROTO))]


@pytest.mark.parametrize(
    "message", [Fault(1, 1, 0, 0), UnmapAck(1), Dropped(), PagerHello(PROTOCOL_VERSION + 1), PagerHello(0)]
)
def test_a_pager_that_does_not_begin_with_its_hello(coordinator: Coordinator, message: PagerHello) -> None:
    coordinator.receive_pager(A, message)
    assert coordinator.take_effects() == [SendPager(A, Evict(errno.EPROTO))]
    assert coordinator.fs.counters["protocol_errors"] == 1


def test_a_session_is_opened_once(coordinator: Coordinator) -> None:
    assert coordinator.has_session(A) and not coordinator.has_session(B)
    with pytest.raises(AssertionError, match="opened twice"):
        coordinator.session_opened(A, 2)


# --- what breaks the protocol -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        UnmapAck(0),
        UnmapAck(OFFSET_BYTES_MAX),
        Dropped(),
        PagerHello(PROTOCOL_VERSION),
    ],
)
def test_a_pager_that_breaks_the_protocol_is_evicted_alone(world: World, message: Dropped) -> None:
    world.coordinator.receive_pager(world.clients[0].token, message)
    world._carry_out()
    world.settle()
    assert world.clients[0].evict_errno == errno.EPROTO
    assert state(world, 0) is SessionState.DROPPED
    assert error_of(world, 0, read_page(1, 0)) == errno.EPROTO
    assert world.access(1, Store(2, 0, 5)) is None
    world.check()


def test_a_fault_past_the_vma_is_one_of_before_it_shrank(world: World) -> None:
    token = world.clients[0].token
    for pgoff in (4, OFFSET_BYTES_MAX):
        world.coordinator.receive_pager(token, Fault(1, 1, pgoff, 1))
        (effect,) = world.coordinator.take_effects()
        assert effect == SendPager(token, FaultError(1, 1, pgoff, 1, errno.EFAULT))


def test_a_fault_below_the_vma_breaks_the_protocol(world: World) -> None:
    vma_id = world.map(0, 1, 2, pgoff=2)
    world.coordinator.receive_pager(world.clients[0].token, Fault(1, vma_id, 1, 0))
    assert state(world, 0) is SessionState.EVICTED


def test_a_write_fault_in_a_read_only_vma_breaks_the_protocol(world: World) -> None:
    vma_id = world.map(0, 1, 4, access=int(Access.READ))
    world.coordinator.receive_pager(world.clients[0].token, Fault(1, vma_id, 0, 1))
    assert state(world, 0) is SessionState.EVICTED


def test_a_vma_of_another_session_is_not_there(world: World) -> None:
    world.coordinator.receive_pager(world.clients[0].token, Fault(1, 2, 0, 1))
    assert state(world, 0) is SessionState.SERVING
    assert world.coordinator.take_effects() == []
    assert error_of(world, 0, Munmap(0, 2)) == errno.EINVAL


def test_more_faults_at_once_than_a_process_may_have(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "FAULTS_PER_SESSION_MAX", 3)
    world.access(1, Load(2, 0))
    world.stopped.add(1)
    token = world.clients[0].token
    for fault_id in range(3):
        world.coordinator.receive_pager(token, Fault(fault_id, 1, 0, 1))
    assert state(world, 0) is SessionState.SERVING
    world.coordinator.receive_pager(token, Fault(9, 1, 0, 1))
    assert state(world, 0) is SessionState.EVICTED
    world.stopped.clear()
    world._carry_out()
    world.settle()
    world.check()
    world.check_quiescent()


# --- who does not acknowledge -----------------------------------------------------------------------------------------


def test_one_that_does_not_acknowledge_in_time_is_evicted(world: World) -> None:
    """The operation that waits for it goes on; what it can reach waits in quarantine until it has dropped it."""
    assert world.access(0, Store(1, 0, 5)) is None
    assert world.access(1, Load(2, 0)) == 5
    world.stopped.add(1)
    assert world.coordinator.next_deadline_s() is None
    world.coordinator.tick(10.0)
    world.clients[0].threads[0].operations.append(Call(Fallocate(0, 1, PUNCH_HOLE, 0, PAGE_SIZE)))
    world.settle()
    assert world.coordinator.next_deadline_s() == 10.0 + ACK_TIMEOUT_S
    world.coordinator.tick(10.0 + ACK_TIMEOUT_S - 0.01)
    assert state(world, 1) is SessionState.SERVING
    world.coordinator.tick(10.0 + ACK_TIMEOUT_S)
    world._carry_out()
    world.settle()
    assert state(world, 1) is SessionState.EVICTED
    assert not world.clients[0].threads[0].operations, "the punch has not ended"
    frames = world.coordinator.fs.device.frames
    assert (frames.free_pages, frames.quarantined_pages) == (7, 1)
    assert world.coordinator.next_deadline_s() is None
    world.check()
    assert world.access(0, Load(1, 0)) == 0

    # It wakes up: it carries out what is in its channel, and its late acknowledgement is no mistake.
    world.stopped.clear()
    world.settle()
    assert world.clients[1].evict_errno == errno.ESTALE
    assert world.access(1, Load(2, 0)) == Failed(errno.ESTALE)
    assert state(world, 1) is SessionState.DROPPED
    assert (frames.free_pages, frames.quarantined_pages) == (8, 0)
    assert world.coordinator.fs.counters["protocol_errors"] == 0
    world.check()
    world.check_quiescent()


def test_quarantine_ends_when_the_process_dies(world: World) -> None:
    world.access(0, Store(1, 0, 5))
    world.access(1, Load(2, 0))
    world.stopped.add(1)
    world.coordinator.protocol_error(world.clients[1].token, ProtocolError("broken on purpose"))
    world.call(0, Truncate(0, 1, 0))
    assert world.coordinator.fs.device.frames.quarantined_pages == 1
    assert world.call(0, Statfs(0))["pages_quarantined"] == 1
    world.kill(1)
    assert world.coordinator.fs.device.frames.free_pages == 8
    world.check()


@pytest.mark.parametrize("policy", ["zero", "page-cache"])
def test_quarantine_holds_what_the_stopped_process_had_once(policy: HolePolicyName) -> None:
    """Another process punches, reads and writes the page again and again: device and page cache stay as large."""
    world = world_of_two(policy)
    world.access(0, Store(1, 0, 5))
    world.access(1, Load(2, 0))
    world.access(1, Load(2, 1))
    world.stopped.add(1)
    world.coordinator.protocol_error(world.clients[1].token, ProtocolError("broken on purpose"))
    device = world.coordinator.fs.device
    for value in range(1, 40):
        world.call(0, Fallocate(0, 1, PUNCH_HOLE, 0, 2 * PAGE_SIZE))
        assert device.frames.quarantined_pages == 1
        for pgoff in (0, 1):
            assert world.access(0, Load(1, pgoff)) == 0
            assert world.access(0, Store(1, pgoff, value)) is None
        if device.dram_frames is not None:
            assert device.dram_frames.quarantined_pages == 1
        world.check()
    world.kill(1)
    assert device.frames.free_pages == 6
    assert device.dram_frames is None or not device.dram_frames.quarantined_pages
    world.check()


def test_an_unlinked_file_that_an_evicted_process_maps_is_freed_when_that_has_dropped_it(world: World) -> None:
    world.access(1, Store(2, 0, 5))
    world.stopped.add(1)
    world.coordinator.protocol_error(world.clients[1].token, ProtocolError("broken on purpose"))
    world._carry_out()
    world.coordinator.fs.unlink("file")
    world.kill(0)
    assert set(world.coordinator.fs.inodes) == {1}
    world.stopped.clear()
    world.settle()
    assert not world.coordinator.fs.inodes
    assert world.coordinator.fs.device.frames.free_pages == 8


def test_each_of_many_is_evicted_at_its_own_deadline() -> None:
    world = World("zero", pmem_pages=8)
    for number in range(4):
        world.add_client(threads=2)
        world.open(number, "file")
        world.open(number, "other")
        world.call(number, write_page(1, 0, 1))
        world.call(number, write_page(2, 0, 1))
    for number, handle in ((1, 1), (2, 2), (3, 1), (3, 2)):
        world.access(number, Load(world.map(number, handle, 1), 0))
    world.stopped |= {1, 2, 3}
    for now_s, handle in ((0.0, 1), (0.5, 2)):
        world.coordinator.tick(now_s)
        world.clients[0].threads[handle - 1].operations.append(Call(Truncate(0, handle, 0)))
        world.settle()
    assert world.coordinator.next_deadline_s() == ACK_TIMEOUT_S
    world.coordinator.tick(ACK_TIMEOUT_S)
    assert [state(world, number) for number in (1, 2, 3)] == [
        *(SessionState.EVICTED, SessionState.SERVING, SessionState.EVICTED)
    ]
    assert world.coordinator.next_deadline_s() == 0.5 + ACK_TIMEOUT_S
    world.coordinator.tick(0.5 + ACK_TIMEOUT_S)
    assert state(world, 2) is SessionState.EVICTED
    assert world.coordinator.fs.counters["evictions"] == 3
    world._carry_out()
    world.check()


def test_a_process_with_many_vmas_is_asked_in_requests_that_fit() -> None:
    world = World("zero", pmem_pages=8)
    world.add_client()
    world.open(0, "file")
    world.call(0, write_page(1, 0, 5))
    for _ in range(2 * SEGMENTS_MAX + 1):
        world.access(0, Load(world.map(0, 1, 1), 0))
    unmaps = world.coordinator.fs.counters["unmaps"]
    world.call(0, Truncate(0, 1, 0))
    assert world.coordinator.fs.counters["unmaps"] == unmaps + 3
    assert not any(window.translations for window in world.clients[0].windows.values())
    world.check_quiescent()


# --- the end ----------------------------------------------------------------------------------------------------------


def test_bye_ends_the_session_and_all_it_had(world: World) -> None:
    world.access(0, Load(1, 0))
    world.call(0, Bye(0))
    assert not world.coordinator.has_session(world.clients[0].token)
    (inode,) = world.coordinator.fs.inodes.values()
    assert [vma.vma_id for vma in inode.mapping.i_mmap.values()] == [2]
    assert inode.users == 2


def test_the_end_of_a_session_is_said(coordinator: Coordinator) -> None:
    coordinator.receive_control(A, A + b"1", Bye(3))
    assert coordinator.take_effects() == [SendControl(A + b"1", Reply(3, None)), EndSession(A)]
    coordinator.session_opened(B, 2)
    coordinator.session_gone(B)
    assert coordinator.take_effects() == [EndSession(B)]


def test_a_request_goes_on_when_its_process_is_gone(world: World) -> None:
    """A truncate that waits for another process is not undone by the death of who asked for it."""
    for number in (0, 1):
        world.access(number, Store(number + 1, 0, 5))
    world.clients[0].threads[0].operations.append(Call(Truncate(0, 1, 0)))
    for kind in ("run", "request"):
        world.step(Event(kind, 0))
    world.kill(0)
    world.settle()
    (inode,) = world.coordinator.fs.inodes.values()
    assert (inode.size_bytes, inode.block_map.total(), inode.users) == (0, 0, 2)
    world.check()
    world.check_quiescent()


def test_an_open_that_waits_when_its_process_dies_leaves_no_handle(world: World) -> None:
    world.access(1, Store(2, 0, 5))
    world.clients[0].threads[0].operations.append(Call(Open(0, "file", 4)))
    for kind in ("run", "request"):
        world.step(Event(kind, 0))
    world.kill(0)
    world.settle()
    (inode,) = world.coordinator.fs.inodes.values()
    assert inode.users == 2
    world.check_quiescent()


def test_a_handle_that_is_closed_while_its_request_waits(world: World) -> None:
    world.access(1, Store(2, 0, 5))
    for request in (Truncate(11, 1, 0), Close(12, 1)):
        world.coordinator.receive_control(world.clients[0].token, world.clients[0].token + b"c", request)
    world.coordinator.fs.unlink("file")
    answers = [e.message for e in world.coordinator.take_effects() if isinstance(e, SendControl)]
    assert answers == [Reply(12, None)]
    world.coordinator.receive_pager(world.clients[1].token, UnmapAck(1))
    assert Reply(11, None) in [e.message for e in world.coordinator.take_effects() if isinstance(e, SendControl)]


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Mmap(0, 1, 0, 0, READ_WRITE, 0), errno.EINVAL),
        (Mmap(0, 1, 0, 1, int(Access.WRITE), 0), errno.EINVAL),
        (Mmap(0, 1, 0, 1, 0, 0), errno.EINVAL),
        (Mmap(0, 1, 0, OFFSET_BYTES_MAX, READ_WRITE, 0), errno.EOVERFLOW),
        (Mmap(0, 1, OFFSET_BYTES_MAX // PAGE_SIZE, 1, READ_WRITE, 0), errno.EOVERFLOW),
        (Mmap(0, 9, 0, 1, READ_WRITE, 0), errno.EBADF),
        (Munmap(0, 99), errno.EINVAL),
        (Close(0, 9), errno.EBADF),
        (Truncate(0, 9, 0), errno.EBADF),
        (Fallocate(0, 9, PUNCH_HOLE, 0, 1), errno.EBADF),
        (Read(0, 9, 0, 1), errno.EBADF),
        (Write(0, 9, 0, 0, b""), errno.EBADF),
        (Seek(0, 9, 0, 3), errno.EBADF),
        (Extents(0, 9, 0), errno.EBADF),
        (Fsync(0, 9), errno.EBADF),
        (Maps(0, "none", 0, 0), errno.ENOENT),
    ],
)
def test_errors(world: World, request_: Mmap, code: int) -> None:
    assert error_of(world, 0, request_) == code
    world.check()
    world.check_quiescent()


def test_every_request_has_a_function() -> None:
    answered_by_the_coordinator_itself = {Hello, Bye, Statfs, Adopt, Cancel}
    assert set(requests.REQUESTS) == set(get_args(ControlRequest)) - answered_by_the_coordinator_itself


def test_more_handles_than_a_process_may_have(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "HANDLES_PER_SESSION_MAX", 3)
    world.open(0, "b")
    world.open(0, "c")
    assert error_of(world, 0, Open(0, "d", 1)) == errno.EMFILE
    assert "d" not in world.coordinator.fs.names
    world.call(0, Close(0, 2))
    world.open(0, "d")


def test_more_vmas_than_a_process_may_have(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "VMAS_PER_SESSION_MAX", 2)
    world.map(0, 1, 1)
    assert error_of(world, 0, Mmap(0, 1, 0, 1, READ_WRITE, 0)) == errno.ENOMEM
    world.call(0, Munmap(0, 1))
    world.map(0, 1, 1)


def test_a_vma_outlives_its_handle(world: World) -> None:
    world.call(0, Close(0, 1))
    assert world.access(0, Store(1, 0, 5)) is None
    assert world.call(1, read_page(1, 0)) == page_bytes(5)


def test_statfs(world: World) -> None:
    world.access(0, Store(1, 0, 5))
    stat = world.call(1, Statfs(0))
    counters = stat.pop("counters")
    assert stat == {
        "page_size": PAGE_SIZE,
        "hole_policy": "zero",
        "pages": 8,
        "pages_free": 7,
        "pages_quarantined": 0,
        "dram_pages": 4,
        "dram_pages_free": 0,
        "files": 1,
        "sessions": 2,
        "handles": sum(len(session.handles) for session in world.coordinator.sessions.values()),
        "vmas": 2,
    }
    assert counters["write_holes"] == counters["faults"] == 1
    world.access(1, Load(2, 0))
    assert counters["faults"] == 1, "the reply changes after it was given"


def test_maps_says_who_has_what_mapped(world: World) -> None:
    world.access(0, Store(1, 1, 5))
    world.access(1, Load(2, 1))
    world.coordinator.protocol_error(world.clients[1].token, ProtocolError("broken on purpose"))
    world.stopped.add(1)
    pfn = world.clients[0].windows[1].translations[1].pfn
    mine, other = world.call(0, Maps(0, "file", 0, 0))
    assert mine == {
        "pid": 1000,
        "evicted": False,
        "vma_id": 1,
        "pgoff": 0,
        "length_pages": 4,
        "access": 3,
        "private": False,
        "mapped": [1, 1, Target.PMEM, pfn, 3],
    }
    assert (other["pid"], other["evicted"]) == (1001, True)
    assert other["mapped"] == [0, 1, Target.ZERO, 0, 1, 1, 1, Target.PMEM, pfn, 3, 2, 2, Target.ZERO, 0, 1]


def test_fsync_is_answered(world: World) -> None:
    assert world.call(0, Fsync(0, 1)) is None


def all_replies(coordinator: Coordinator, token: bytes, request_after: Callable[[Any], Any], key: str) -> list[Any]:
    """What a request that goes on gives, until it gives nothing. Each reply fits into a message."""
    entries: list[Any] = []
    while True:
        coordinator.receive_control(token, b"x", request_after(entries[-1][key] if entries else None))
        (effect,) = coordinator.take_effects()
        assert isinstance(effect, SendControl) and isinstance(effect.message, Reply)
        assert len(encode(effect.message)) <= MESSAGE_BYTES_MAX
        if not effect.message.value:
            return entries
        entries += effect.message.value


def test_the_maps_of_a_file_with_many_vmas_come_in_replies_that_fit() -> None:
    world = World("zero", pmem_pages=8)
    world.add_client()
    world.open(0, "file")
    token = world.clients[0].token
    for _ in range(20_000):
        world.coordinator.receive_control(token, b"x", Mmap(1, 1, 0, 1, READ_WRITE, 0))
    world.coordinator.take_effects()
    entries = all_replies(world.coordinator, token, lambda after: Maps(1, "file", (after or 0) + 1, 0), "vma_id")
    assert [entry["vma_id"] for entry in entries] == list(world.coordinator.sessions[token].vmas)


def test_the_maps_of_scattered_pages_come_in_replies_that_fit() -> None:
    """More pieces in each VMA than a reply has."""
    world = World("zero", pmem_pages=8)
    world.add_client()
    world.open(0, "file")
    token = world.clients[0].token
    for _ in range(20):
        vma = world.coordinator.sessions[token].vmas[world.map(0, 1, 2 * MAPPED_ENTRIES_MAX + 2)]
        for pgoff in range(0, 2 * MAPPED_ENTRIES_MAX + 2, 2):
            vma.page_table.set(pgoff, pgoff + 1, pack_pte(Target.PMEM, 1 << 40, Access.READ))
    found: dict[int, list[int]] = {}
    request = Maps(1, "file", 0, 0)
    while True:
        world.coordinator.receive_control(token, b"x", request)
        (effect,) = world.coordinator.take_effects()
        assert isinstance(effect, SendControl) and isinstance(effect.message, Reply)
        assert len(encode(effect.message)) <= MESSAGE_BYTES_MAX
        if not effect.message.value:
            break
        for entry in effect.message.value:
            found.setdefault(entry["vma_id"], []).extend(entry["mapped"][::5])
        request = Maps(1, "file", entry["vma_id"], entry["mapped"][-5] + entry["mapped"][-4])
    assert list(found.values()) == [list(range(0, 2 * MAPPED_ENTRIES_MAX + 2, 2))] * 20


def test_a_list_of_files_with_many_mappers_comes_in_replies_that_fit() -> None:
    coordinator = Coordinator(Device(PAGE_SIZE, ByteArrayMemory(9 * PAGE_SIZE), 8), 1.0)
    tokens = [number.to_bytes(16, "big") for number in range(64)]
    for number, token in enumerate(tokens):
        coordinator.session_opened(token, 4_000_000 + number)
    for name in range(LIST_ENTRIES_MAX):
        inode = coordinator.fs.create(f"{name:05}")
        for session in coordinator.sessions.values():
            vma_id = coordinator.fs.next_id()
            inode.mapping.i_mmap[vma_id] = Vma(vma_id, session, inode, 0, 1, Access.READ)
    entries = all_replies(coordinator, tokens[0], lambda after: List(1, after or ""), "name")
    assert [entry["name"] for entry in entries] == sorted(coordinator.fs.names)


def test_unmaps_of_one_operation_are_all_sent_before_any_is_awaited(world: World) -> None:
    for number in (0, 1):
        world.access(number, Load(number + 1, 0))
    world.coordinator.receive_control(world.clients[0].token, b"x", Truncate(1, 1, 0))
    orders = [e for e in world.coordinator.take_effects() if isinstance(e, SendPager)]
    assert [type(order.message) for order in orders] == [Unmap, Unmap]
    assert {order.token for order in orders} == {client.token for client in world.clients}
