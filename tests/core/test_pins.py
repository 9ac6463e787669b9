"""What holds off those who would take a page away: pins, and blocks that are lent. VMAs that change. Forks."""

import errno
from typing import Any

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.device import HolePolicyName
from dax_mp.effects import SendPager
from dax_mp.locks import EntryLocks
from dax_mp.messages import (
    Access,
    Adopt,
    BeginRead,
    BeginWrite,
    Bye,
    Close,
    CopyRange,
    Cuts,
    EndIo,
    Fallocate,
    FallocateMode,
    Fault,
    FaultError,
    Fstat,
    Getxattr,
    Listxattr,
    Map,
    Mmap,
    Mremap,
    Munmap,
    MunmapRange,
    Open,
    OpenFlag,
    Pin,
    Read,
    Removexattr,
    Rename,
    Reply,
    Setxattr,
    Truncate,
    Unlink,
    Unmap,
    UnmapAck,
    Unpin,
    Write,
)
from dax_mp.ranges import PageRange
from dax_mp.session import SessionState
from simulation.client import PAGE_SIZE, Call, DirectWrite, Ended, Failed, Load, Store, page_bytes
from simulation.world import ACK_TIMEOUT_S, FATES, Event, World

P = PAGE_SIZE
READ = int(Access.READ)


@pytest.fixture
def world() -> World:
    """Two clients that have four pages of a file mapped, as VMAs 1 and 2; the first page and the last have blocks."""
    world = World(pmem_pages=16)
    for _ in range(2):
        client = world.add_client(threads=2)
        assert world.open(client, "file") == 1
        world.map(client, 1, 4)
    world.call(0, Truncate(0, 1, 4 * P))
    for page in (0, 3):
        assert world.access(0, Store(1, page, page + 1)) is None
    return world


def run(world: World, client: int | None = None, request: Any = None) -> list[Ended]:
    """Send the request, if any, and let everything happen that can. Returns what has ended."""
    if client is not None:
        world.clients[client].threads[1].operations.append(Call(request))
    ended: list[Ended] = []
    while (events := world.events()) and events[0].kind not in FATES:
        ended += world.step(events[0])
    return ended


def tick(world: World, now_s: float) -> list[Ended]:
    world.coordinator.tick(now_s)
    world._carry_out()
    return run(world)


def error_of(world: World, client: int, request: Any) -> int | None:
    with pytest.raises(OSError) as caught:
        world.call(client, request)
    return caught.value.errno


def blocks(world: World) -> int:
    return int(world.call(1, Fstat(0, 1))["blocks"])


# --- pins ------------------------------------------------------------------------------------------------------------

TAKES_AWAY: dict[str, Any] = {
    "truncate": Truncate(0, 1, P),
    "open": Open(0, "file", int(OpenFlag.TRUNCATE)),
    "punch": Fallocate(0, 1, PUNCH_HOLE, 0, 4 * P),
    "zero": Fallocate(0, 1, int(FallocateMode.ZERO_RANGE), 0, 4 * P),
    "collapse": Fallocate(0, 1, int(FallocateMode.COLLAPSE_RANGE), 0, P),
    "insert": Fallocate(0, 1, int(FallocateMode.INSERT_RANGE), P, P),
}


def test_a_pin_gives_holes_blocks(world: World) -> None:
    assert world.access(1, Load(2, 1)) == 0
    world.call(0, Pin(0, 1, 0, 4))
    assert blocks(world) == 4
    assert world.access(1, Store(2, 1, 5)) is None
    assert world.access(0, Load(1, 1)) == 5
    world.check()


@pytest.mark.parametrize("how", TAKES_AWAY)
def test_what_takes_pinned_pages_waits_for_the_pin(world: World, how: str) -> None:
    pin_id = world.call(0, Pin(0, 1, 1, 3))
    assert run(world, 1, TAKES_AWAY[how]) == []
    assert world.coordinator.next_deadline_s() == ACK_TIMEOUT_S
    assert world.access(0, Store(1, 2, 9)) is None, "faults go on"
    world.call(0, Unpin(0, pin_id))
    (end,) = [end for end in world_ends(world) if end.operation == Call(TAKES_AWAY[how])]
    assert not isinstance(end.outcome, Failed)
    world.check()


def world_ends(world: World) -> list[Ended]:
    return [Ended(moment.thread, moment.operation, moment.outcome) for moment in world.history if moment.ends] + run(
        world
    )


@pytest.mark.parametrize("how", TAKES_AWAY)
def test_a_pin_that_stays_is_busy(world: World, how: str) -> None:
    world.call(0, Pin(0, 1, 1, 3))
    content = world.call(0, Read(0, 1, 0, 8 * P))
    assert run(world, 1, TAKES_AWAY[how]) == []
    (end,) = tick(world, ACK_TIMEOUT_S)
    assert end.outcome == Failed(errno.EBUSY)
    assert world.call(0, Read(0, 1, 0, 8 * P)) == content
    assert world.coordinator.sessions[world.clients[0].token].state is SessionState.SERVING
    world.check()


@pytest.mark.parametrize("how", TAKES_AWAY)
def test_who_has_the_pin_reads_and_writes_while_others_wait_for_it(world: World, how: str) -> None:
    """README's own example: its pwrite, beside another's truncate, stood still for the whole ack timeout."""
    pin_id = world.call(0, Pin(0, 1, 1, 3))
    assert run(world, 1, TAKES_AWAY[how]) == []
    assert world.call(0, Write(0, 1, P, 0, b"x" * P)) == 2 * P
    assert world.call(0, Read(0, 1, P, P)) == b"x" * P
    io_id = world.call(0, BeginWrite(0, 1, 2 * P, 0, P))[0]
    world.call(0, EndIo(0, io_id, 0))
    second_id = world.call(0, Pin(0, 1, 2, 1))
    world.call(0, Unpin(0, pin_id))
    assert world.call(0, Read(0, 1, P, P)) == b"x" * P, "it waits for the second pin as well"
    world.call(0, Unpin(0, second_id))
    (end,) = [end for end in world_ends(world) if end.operation == Call(TAKES_AWAY[how])]
    assert not isinstance(end.outcome, Failed)
    world.check()


def test_who_waited_for_a_pin_looks_at_the_file_again(world: World) -> None:
    """It has become shorter meanwhile: the collapse would reach the end, and the truncate makes it longer."""
    pin_id = world.call(0, Pin(0, 1, 1, 1))
    assert run(world, 1, Fallocate(0, 1, int(FallocateMode.COLLAPSE_RANGE), P, P)) == []
    world.clients[0].threads[0].operations.append(Call(Truncate(0, 1, 2 * P)))
    run(world)
    world.call(0, Unpin(0, pin_id))
    collapse, *_ = (end for end in world_ends(world) if isinstance(end.operation, Call) and end.thread == 1)
    assert collapse.outcome == Failed(errno.EINVAL)
    assert world.call(1, Fstat(0, 1))["size_bytes"] == 2 * P


def test_a_pin_of_a_large_sparse_range_is_counted_first(world: World) -> None:
    """64 TiB on a device of 16 pages: no time, no memory, and nothing allocated."""
    world.call(0, Truncate(0, 1, 1 << 46))
    vma_id = world.map(0, 1, (1 << 46) // P)
    assert error_of(world, 0, Pin(0, vma_id, 0, (1 << 46) // P)) == errno.ENOSPC
    assert blocks(world) == 2
    reader_id = world.map(0, 1, (1 << 46) // P, access=READ)
    pin_id = world.call(0, Pin(0, reader_id, 0, (1 << 46) // P))
    assert blocks(world) == 2
    world.call(0, Unpin(0, pin_id))
    world.check()


@pytest.mark.parametrize("policy", ["zero", "page-cache"])
@pytest.mark.parametrize("how", ["store", "write", "long write", "reclaim"])
def test_a_pinned_hole_page_of_a_mapping_for_loads_is_replaced_and_never_missing(
    policy: HolePolicyName, how: str
) -> None:
    world = World(policy, pmem_pages=8, dram_pages=1)
    for _ in range(2):
        world.open(world.add_client(threads=2), "file")
    world.call(0, Truncate(0, 1, 4 * P))
    world.map(0, 1, 4, access=READ)
    world.map(1, 1, 4)
    world.call(0, Pin(0, 1, 0, 2))
    assert blocks(world) == 0, "a pin of a mapping for loads allocates no hole"
    assert [world.access(0, Load(1, page)) for page in (1, 0)] == [0, 0]
    operation: Any = {
        "store": Store(2, 0, 7),
        "write": Call(Write(0, 1, 0, 0, page_bytes(7))),
        "long write": DirectWrite(1, 0, (7,)),
        "reclaim": Load(2, 3),
    }[how]
    world.clients[1].threads[0].operations.append(operation)
    window = world.clients[0].windows[1]
    while events := world.events():
        world.step(events[0])
        world.check()
        assert 0 in window.translations, "a system call would find no page"
    assert world.access(0, Load(1, 0)) == (0 if how == "reclaim" else 7)
    assert world.access(1, Store(2, 0, 8)) is None
    assert world.access(0, Load(1, 0)) == 8
    world.check_quiescent()


def test_a_pin_for_loads_waits_for_a_hole_page_that_is_being_unmapped(world: World) -> None:
    """Else the page that it has just faulted in would go under the Unmap."""
    reader_id = world.map(0, 1, 4, access=READ)
    assert world.access(0, Load(reader_id, 1)) == 0
    world.stopped.add(0)
    world.clients[1].threads[0].operations.append(Store(2, 1, 7))
    run(world)
    world.clients[0].requests.append(Pin(77, reader_id, 1, 1))
    run(world)
    assert not world.clients[0].answers, "the Unmap is on its way"
    world.stopped.clear()
    world.clients[0].receive_order()
    run_to_coordinator(world)
    assert [answer.request_id for answer in world.clients[0].answers] == [77]


def run_to_coordinator(world: World) -> None:
    """Let all that client 0 has sent arrive."""
    while world.clients[0].pager_requests:
        world.step(Event("fault", 0))


def test_what_leaves_the_pinned_pages_alone_does_not_wait(world: World) -> None:
    world.call(0, Pin(0, 1, 1, 1))
    world.call(1, Fallocate(0, 1, PUNCH_HOLE, 2 * P, 2 * P))
    world.call(1, Truncate(0, 1, 2 * P))
    world.call(1, Write(0, 1, 0, 0, b"x" * 2 * P))


@pytest.mark.parametrize("end", [Munmap(0, 1), Bye(0)])
def test_a_pin_goes_with_its_mapping_and_its_session(world: World, end: Any) -> None:
    world.call(0, Pin(0, 1, 0, 4))
    run(world, 1, TAKES_AWAY["truncate"])
    run(world, 0, end)
    assert world.call(1, Fstat(0, 1))["size_bytes"] == P


def test_a_killed_process_has_no_pin(world: World) -> None:
    world.call(0, Pin(0, 1, 0, 4))
    run(world, 1, TAKES_AWAY["truncate"])
    world.kill(0)
    run(world)
    assert world.call(1, Fstat(0, 1))["size_bytes"] == P


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Pin(0, 1, 0, 0), errno.EINVAL),
        (Pin(0, 1, 3, 2), errno.EINVAL),
        (Pin(0, 9, 0, 1), errno.EINVAL),
        (Unpin(0, 9), errno.EINVAL),
        (EndIo(0, 9, 0), errno.EINVAL),
        (Mremap(0, 9, 1), errno.EINVAL),
        (Mremap(0, 1, 0), errno.EINVAL),
        (MunmapRange(0, 1, 3, 2), errno.EINVAL),
        (MunmapRange(0, 1, 0, 0), errno.EINVAL),
        (Mmap(0, 1, 0, 1, 3, 1), errno.EINVAL),
        (Adopt(0, b"x" * 16), errno.ENOENT),
        (BeginWrite(0, 9, 0, 0, 1), errno.EBADF),
        (BeginRead(0, 9, 0, 1), errno.EBADF),
        (Getxattr(0, 1, "none"), errno.ENODATA),
        (Removexattr(0, 1, "none"), errno.ENODATA),
        (Rename(0, "file", "other", 1), errno.EEXIST),
    ],
)
def test_what_is_refused(world: World, request_: Any, code: int) -> None:
    world.open(1, "other")
    assert error_of(world, 0, request_) == code
    world.check()


def test_no_pin_past_the_end(world: World) -> None:
    world.call(1, Truncate(0, 1, 2 * P))
    assert error_of(world, 0, Pin(0, 1, 1, 2)) == errno.EFAULT


def test_a_pin_that_waited_finds_its_mapping_shorter(world: World) -> None:
    """It would be a pin of pages that the mapping has no more."""
    io_id, _, _, _ = world.call(1, BeginWrite(0, 1, 0, 0, P))
    assert run(world, 0, Pin(0, 1, 0, 4)) == []
    world.call(0, Mremap(0, 1, 2))
    world.call(1, EndIo(0, io_id, 0))
    assert Ended(1, Call(Pin(0, 1, 0, 4)), Failed(errno.EFAULT)) in world_ends(world)
    world.call(1, Truncate(0, 1, 0))
    world.check()


def test_no_pin_of_pages_that_were_taken_out(world: World) -> None:
    world.call(0, MunmapRange(0, 1, 1, 1))
    assert error_of(world, 0, Pin(0, 1, 0, 4)) == errno.EFAULT


def test_a_pin_that_waits_keeps_its_file(world: World) -> None:
    """Else it would give blocks to a file that is gone, and they would be nowhere."""
    world.call(1, BeginWrite(0, 1, 0, 0, P))
    assert run(world, 0, Pin(0, 1, 0, 4)) == []
    for request in (Munmap(0, 1), Close(0, 1), Unlink(0, "file")):
        world.call(0, request)
    world.kill(1)
    run(world)
    assert not world.coordinator.fs.inodes
    world.check()


def test_a_copy_that_waits_keeps_its_source(world: World) -> None:
    target = world.open(0, "target")
    io_id, _, _, _ = world.call(1, BeginWrite(0, 1, 0, 0, P))
    assert run(world, 0, CopyRange(0, 1, 3 * P, target, 0, P)) == []
    for client, request in ((0, Munmap(0, 1)), (0, Close(0, 1)), (1, Munmap(0, 2)), (1, Close(0, 1))):
        world.call(client, request)
    world.call(1, Unlink(0, "file"))
    world.call(1, EndIo(0, io_id, 0))
    run(world)
    assert world.call(0, Read(0, target, 0, 1)) == b"\4"
    world.check()


# --- leases ----------------------------------------------------------------------------------------------------------


def test_a_lease_keeps_others_waiting_until_its_end(world: World) -> None:
    io_id, _, _, _ = world.call(0, BeginWrite(0, 1, 0, 0, 4 * P))
    assert run(world, 1, Read(0, 1, 0, P)) == []
    world.call(0, EndIo(0, io_id, 0))
    assert any(end.operation == Call(Read(0, 1, 0, P)) for end in world_ends(world))


def test_nothing_of_a_write_is_left_where_its_process_dies(world: World) -> None:
    _, _, changes, flat = world.call(0, BeginWrite(0, 1, P, 0, 5 * P))
    assert changes
    for address, length in zip(flat[::2], flat[1::2], strict=True):
        world.pmem.write(address, b"x" * min(length, 8))
    world.kill(0)
    run(world)
    assert (blocks(world), world.call(1, Fstat(0, 1))["size_bytes"]) == (2, 4 * P)
    assert world.call(1, Read(0, 1, P, 2 * P)) == bytes(2 * P)
    world.check()


def test_who_keeps_what_is_lent_is_evicted_and_its_blocks_in_quarantine(world: World) -> None:
    world.call(0, BeginWrite(0, 1, 0, 0, 6 * P))
    world.stopped.add(0)
    assert run(world, 1, Truncate(0, 1, 0)) == []
    assert world.coordinator.next_deadline_s() == ACK_TIMEOUT_S
    tick(world, ACK_TIMEOUT_S)
    frames = world.coordinator.fs.device.frames
    assert (frames.quarantined_pages, blocks(world)) == (6, 0), "it may still store to all of them"
    world.stopped.clear()
    run(world)
    assert frames.quarantined_pages == 0
    assert world.clients[0].evict_errno == errno.ESTALE
    world.check()


def test_an_evicted_writer_keeps_its_blocks_from_moving(world: World) -> None:
    """What it may still store to does not become another page of the file."""
    world.call(0, BeginWrite(0, 1, 3 * P, 0, P))
    world.stopped.add(0)
    tick(world, ACK_TIMEOUT_S)
    before = world.call(1, Read(0, 1, 3 * P, P))
    world.call(1, Fallocate(0, 1, int(FallocateMode.COLLAPSE_RANGE), 0, P))
    assert world.call(1, Read(0, 1, 2 * P, P)) == before
    assert world.coordinator.fs.device.frames.quarantined_pages >= 1
    world.check()


def test_an_evicted_writer_keeps_unwritten_blocks_from_moving_too(world: World) -> None:
    """They would become another page's, and the next file's when that page is cut off."""
    world.call(1, Fallocate(0, 1, 0, P, P))
    _, _, _, flat = world.call(0, BeginWrite(0, 1, P, 0, P))
    lent_pfn = flat[0] // P
    world.stopped.add(0)
    tick(world, ACK_TIMEOUT_S)
    world.call(1, Fallocate(0, 1, int(FallocateMode.COLLAPSE_RANGE), 0, P))
    assert blocks(world) == 2, "what was allocated stays so"
    world.call(1, Write(0, 1, 4, 0, b"x"))
    world.pmem.write(lent_pfn * P, b"late")
    assert world.call(1, Read(0, 1, 0, 4)) == bytes(4)
    world.call(1, Fallocate(0, 1, PUNCH_HOLE, 0, P))
    assert not any(world.coordinator.fs.device.frames.free.pieces(lent_pfn, lent_pfn + 1))
    world.check()


def test_a_long_write_that_ends_in_the_last_page_leaves_zeroes_behind_it(world: World) -> None:
    """I6: what a mapping has stored there past the old end is not there after the size has changed."""
    world.call(1, Truncate(0, 1, 3 * P + 10))
    pfn = world.clients[0].windows[1].translations[3].pfn
    world.pmem.write(pfn * P + 10, b"\xff" * (P - 10))
    io_id, _, _, _ = world.call(1, BeginWrite(0, 1, 0, 0, 3 * P + 20))
    world.pmem.write(pfn * P, b"\1" * 20)
    world.call(1, EndIo(0, io_id, 3 * P + 20))
    assert world.pmem.read(pfn * P, P) == b"\1" * 20 + bytes(P - 20)


def test_many_holes_are_locked_at_one_look(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look for each hole at all that are locked would be quadratic."""
    looks: list[tuple[int, int]] = []
    first_held = EntryLocks.first_held

    def look(self: EntryLocks, start: int, end: int) -> int | None:
        looks.append((start, end))
        return first_held(self, start, end)

    world.call(1, Write(0, 1, 2 * P, 0, b"x"))
    monkeypatch.setattr(EntryLocks, "first_held", look)
    world.call(0, BeginWrite(0, 1, 0, 0, 6 * P))
    assert looks == [(0, 6)]
    assert len(world.coordinator.fs.names["file"].entry_locks) == 3


def test_a_broken_state_is_seen(world: World) -> None:
    """The invariants about pins, leases and unwritten blocks are asserted after every event; each is broken here."""
    file = world.coordinator.fs.names["file"]
    world.call(0, Pin(0, 1, 3, 1))
    world.call(1, Fallocate(0, 1, 0, P, P))
    io_id, _, _, _ = world.call(1, BeginWrite(0, 1, P, 0, 2 * P))
    lease = world.coordinator.fs.leases[io_id]

    def expect(broken: str) -> None:
        with pytest.raises(AssertionError, match=broken):
            world.check()

    world.check()
    (pinned,) = file.block_map.clear(3, 4)
    expect("I9: a page of pin")
    file.block_map.set(*pinned)
    world.coordinator.sessions[world.clients[0].token].vmas[1].remove(PageRange(3, 4))
    expect("I9: pin .* is not in its mapping")
    world.coordinator.sessions[world.clients[0].token].vmas[1].removed = None
    (fresh,) = file.unwritten.clear(2, 3)
    expect("I10: of what is lent")
    file.unwritten.set(*fresh)
    file.entry_locks.release(1)
    expect("I10: page 1 of what is lent .* is not locked")
    file.entry_locks.take(range(1, 2))
    file.rwsem.exclusive = False
    expect("I10: rwsem is not held")
    file.rwsem.exclusive = True
    lease.session.leases.clear()
    expect("I10: nobody has what is lent")
    lease.session.leases[io_id] = lease
    file.unwritten.set(3, 4, fresh[2] + 1)
    expect("I8: a page of .* has two blocks")
    file.unwritten.clear(3, 4)
    world.check()


# --- private VMAs ----------------------------------------------------------------------------------------------------


def order_to(world: World, client: int, kind: type[Any]) -> Any:
    (order,) = [order for order in world.clients[client].pager_orders if isinstance(order, kind)]
    return order


def test_a_truncate_reaches_copies_and_nothing_else_does(world: World) -> None:
    vma_id = world.call(0, Mmap(0, 1, 0, 4, READ, 1))
    world.stopped.add(0)
    for request in (Fallocate(0, 1, PUNCH_HOLE, 3 * P, P), Write(0, 1, 2 * P, 0, b"x")):
        world.stopped.discard(0)
        world.call(1, request)
        world.stopped.add(0)
    run(world, 1, Truncate(0, 1, P))
    unmap = order_to(world, 0, Unmap)
    assert unmap.even_cows == 1
    assert [vma_id, 1, 3] == unmap.ranges[-3:] or [vma_id, 1, 3] == unmap.ranges[:3]


def test_a_store_in_a_private_vma_is_none_here(world: World) -> None:
    vma_id = world.call(0, Mmap(0, 1, 0, 4, READ, 1))
    world.coordinator.receive_pager(world.clients[0].token, Fault(1, vma_id, 0, 1))
    assert world.coordinator.sessions[world.clients[0].token].evicted


# --- VMAs that change ------------------------------------------------------------------------------------------------


def test_a_vma_grows(world: World) -> None:
    world.call(0, Truncate(0, 1, 8 * P))
    world.coordinator.receive_pager(world.clients[0].token, Fault(7, 1, 6, 1))
    world.call(0, Mremap(0, 1, 8))
    world.coordinator.receive_pager(world.clients[0].token, Fault(8, 1, 6, 1))
    orders = [effect.message for effect in world.coordinator.take_effects()]  # type: ignore[union-attr]
    assert [type(order) for order in orders] == [Map]
    assert orders[0].segments[:2] == [6, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [Mremap(0, 1, 2), MunmapRange(0, 1, 2, 2)])
def test_pages_that_a_vma_loses_are_dropped_before_the_answer(world: World, change: Any) -> None:
    assert world.access(0, Load(1, 3)) == 4
    world.stopped.add(0)
    world.clients[0].requests.append(change._replace(request_id=99))
    run(world)
    assert order_to(world, 0, Unmap).ranges == [1, 2, 2]
    assert not world.clients[0].answers
    world.check()
    world.step(Event("order", 0))
    world.step(Event("fault", 0))
    assert world.clients[0].answers.pop() == Reply(99, None)
    world.stopped.clear()
    assert 3 not in world.clients[0].windows[1].translations
    world.coordinator.receive_pager(world.clients[0].token, Fault(9, 1, 3, 0))
    (effect,) = world.coordinator.take_effects()
    assert effect.message == FaultError(9, 1, 3, 1, errno.EFAULT)  # type: ignore[union-attr]
    assert world.access(0, Load(1, 0)) == 1
    world.check()


def test_what_a_vma_loses_is_decided_when_its_turn_comes(world: World) -> None:
    """It grows, and a page there is mapped, between the request to shrink and its turn."""
    world.call(0, Truncate(0, 1, 8 * P))
    assert world.access(0, Load(1, 0)) == 1
    world.stopped.add(0)
    run(world, 1, Fallocate(0, 1, PUNCH_HOLE, 0, P))
    unmaps = [order_to(world, 0, Unmap)]
    assert unmaps[0].ranges == [1, 0, 1]
    coordinator, token = world.coordinator, world.clients[0].token
    coordinator.receive_control(token, token, Mremap(0, 1, 8))
    coordinator.receive_pager(token, Fault(9, 1, 6, 1))
    coordinator.receive_control(token, token, Mremap(0, 1, 2))
    while unmaps:
        for unmap in unmaps:
            coordinator.receive_pager(token, UnmapAck(unmap.request_id))
        orders = [effect.message for effect in coordinator.take_effects() if isinstance(effect, SendPager)]
        unmaps = [order for order in orders if isinstance(order, Unmap)]
    vma = coordinator.sessions[token].vmas[1]
    assert (vma.end_pgoff, [pgoff for pgoff, _, _ in vma.page_table if pgoff >= 2]) == (2, [])


def test_a_map_leaves_removed_pages_out(world: World) -> None:
    world.call(0, Write(0, 1, 0, 0, b"x" * 4 * P))
    world.call(1, MunmapRange(0, 2, 1, 1))
    for page in (0, 2):
        world.access(1, Load(2, page))
    assert sorted(world.clients[1].windows[2].translations) == [0, 2, 3]
    world.check()


def test_pinned_pages_stay_in_their_vma(world: World) -> None:
    world.call(0, Pin(0, 1, 2, 2))
    assert error_of(world, 0, MunmapRange(0, 1, 3, 1)) == errno.EBUSY
    assert error_of(world, 0, Mremap(0, 1, 2)) == errno.EBUSY


# --- fork ------------------------------------------------------------------------------------------------------------


def test_a_child_has_the_parents_handles_and_vmas(world: World) -> None:
    private = world.call(0, Mmap(0, 1, 1, 2, READ, 1))
    world.call(0, MunmapRange(0, 1, 3, 1))
    world.call(0, Pin(0, 1, 0, 1))
    world.call(0, Unlink(0, "file"))
    child = world.add_client()
    copies = world.call(child, Adopt(0, world.clients[0].token))
    mine = dict(zip(copies[::2], copies[1::2], strict=True))
    assert set(mine) == {1, private}
    parent, session = (world.coordinator.sessions[world.clients[number].token] for number in (0, child))
    assert session.handles == parent.handles
    assert session.next_handle == parent.next_handle
    assert not session.pins
    for vma_id, copy in mine.items():
        before, after = parent.vmas[vma_id], session.vmas[copy]
        assert (after.pgoff, after.length_pages, after.access, after.private) == (
            (before.pgoff, before.length_pages, before.access, before.private)
        )
        assert len(after.page_table) == 0
        assert list(after.removed or ()) == list(before.removed or ())
    assert error_of(world, child, Adopt(0, world.clients[0].token)) == errno.EINVAL
    world.kill(0)
    run(world)
    assert world.call(child, Read(0, 1, 0, 1)) == b"\1"
    world.check()


def test_a_child_is_told_of_the_cuts_after_its_fork(world: World) -> None:
    """A truncate down and up again has taken the parent's private copies, and the child has them still."""
    private = world.call(0, Mmap(0, 1, 0, 4, READ, 1))
    world.call(1, Truncate(0, 1, 2 * P))
    before_fork = max(cut.request_id for cut in world.coordinator.sessions[world.clients[0].token].vmas[private].cuts)
    for size in (4 * P, 3 * P, P, 4 * P, 2 * P, 4 * P):
        world.call(1, Truncate(0, 1, size))
    child = world.add_client()
    copies = world.call(child, Adopt(0, world.clients[0].token, before_fork))
    mine = dict(zip(copies[::2], copies[1::2], strict=True))[private]
    assert world.call(child, Cuts(0)) == [mine, 1, 3, mine, 2, 2]
    world.call(1, Truncate(0, 1, 3 * P))
    assert world.call(child, Cuts(0))[-3:] == [mine, 3, 1]
    late = world.add_client()
    last = max(cut.request_id for cut in world.coordinator.sessions[world.clients[0].token].vmas[private].cuts)
    world.call(late, Adopt(0, world.clients[0].token, last))
    assert world.call(late, Cuts(0)) == []
    world.check()


# --- files -----------------------------------------------------------------------------------------------------------


def test_attributes_are_the_files(world: World) -> None:
    world.call(0, Setxattr(0, 1, "b", b"2"))
    world.call(0, Setxattr(0, 1, "a", b"1"))
    assert world.call(1, Listxattr(0, 1)) == ["a", "b"]
    world.call(1, Setxattr(0, 1, "a", b"3"))
    assert world.call(0, Getxattr(0, 1, "a")) == b"3"
    world.call(0, Removexattr(0, 1, "a"))
    assert world.call(1, Listxattr(0, 1)) == ["b"]


def test_attributes_have_a_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dax_mp.file_requests.XATTRS_PER_FILE_MAX", 1)
    world.call(0, Setxattr(0, 1, "a", b"1"))
    assert error_of(world, 0, Setxattr(0, 1, "b", b"1")) == errno.ENOSPC
    world.call(0, Setxattr(0, 1, "a", b"2"))


def test_an_ephemeral_file_goes_with_its_last_user(world: World) -> None:
    handle = world.open(0, "passing", int(OpenFlag.CREATE | OpenFlag.EPHEMERAL))
    world.call(0, Write(0, handle, 0, 0, b"x"))
    world.call(0, Rename(0, "passing", "renamed", 0))
    other = world.open(1, "renamed", 0)
    world.kill(0)
    run(world)
    assert world.call(1, Read(0, other, 0, 9)) == b"x"
    assert "renamed" in world.coordinator.fs.names
    world.kill(1)
    run(world)
    assert list(world.coordinator.fs.names) == ["file"]
