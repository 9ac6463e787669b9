"""The enumeration finds the bug when the core has one: each test breaks one rule of it, and expects to be told."""

from collections.abc import Callable
from typing import Any

import pytest

from dax_mp import blocks, fallocate, fault, pins, read_write, requests, shift, truncate
from dax_mp.address_space import Pinned, Vma, pack_pte
from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.device import Device, HolePolicyName
from dax_mp.file_system import FileSystem
from dax_mp.frames import FrameAllocator
from dax_mp.inode import Inode
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.locks import EntryLocks, SharedLock
from dax_mp.messages import Access, Fallocate, FallocateMode, Fault, Munmap, Open, Pin, Target, Truncate
from dax_mp.ranges import Extent, PageRange
from dax_mp.session import Session
from dax_mp.transaction import Completion, Scheduler, Steps
from dax_mp.unmap import Unmapper
from simulation.client import PAGE_SIZE, Call, DirectWrite
from simulation.explore import OrderError
from simulation.stage import Stage
from simulation.world import PRIVATE_VALUES, Event, write_page

Break = pytest.MonkeyPatch

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""A world that is given up closes its suspended operations in any order; those of a broken core may fail then."""

# Not local variables of the mutants: those are part of a world's state.
UNMAP = Unmapper.unmap_mapping_range
HANDLE_FAULT = fault.handle_fault
WRITE_HOLE = fault._write_hole
WRITE = read_write._write
OPEN_FILE = requests.open_file


def expect_bug(stage: Stage, match: str) -> None:
    with pytest.raises(OrderError, match=match):
        stage.explore()


def reader_and_writer(policy: HolePolicyName = "zero", how: str = "store") -> Stage:
    """Client 0 has the hole mapped and reads it again and again; client 1 fills it."""
    stage = Stage(policy, threads=(1, 1), mapped=(0,))
    stage.does(0, stage.load(0), stage.load(0))
    stage.does(1, stage.store(1, 7) if how == "store" else Call(write_page(stage.handles[1], 0, 7)))
    return stage


def mapper_and_cutter(cut: str, *, block: bool = True) -> Stage:
    """Client 0 loads and stores; client 1 truncates or punches."""
    stage = Stage("zero", threads=(1, 1), block=block, mapped=(0,))
    handle = stage.handles[1]
    stage.does(0, stage.load(0), stage.store(0, 7))
    stage.does(1, Call(Truncate(0, handle, 0) if cut == "truncate" else Fallocate(0, handle, PUNCH_HOLE, 0, PAGE_SIZE)))
    return stage


@pytest.fixture(params=["zero", "page-cache"])
def policy(request: pytest.FixtureRequest) -> HolePolicyName:
    policy: HolePolicyName = request.param
    return policy


def while_one_is_waited_for(*, block: bool = False, cut: str = "") -> Stage:
    """Client 2 writes to or cuts a page that client 0 has mapped. Before client 0 has dropped it, client 1 comes."""
    stage = Stage("zero", threads=(1, 1, 1), block=block, mapped=(0,))
    handle = stage.handles[2]
    stage.does(1, stage.load(1))
    match cut:
        case "truncate":
            stage.does(2, Call(Truncate(0, handle, 0)))
        case "punch":
            stage.does(2, Call(Fallocate(0, handle, PUNCH_HOLE, 0, PAGE_SIZE)))
        case _:
            stage.does(2, Call(write_page(handle, 0, 7)))
    return stage


def test_nothing_is_found_where_nothing_is_broken(policy: HolePolicyName) -> None:
    for how in ("store", "write"):
        reader_and_writer(policy, how).explore()
    for cut in ("truncate", "punch"):
        mapper_and_cutter(cut).explore()
        while_one_is_waited_for(block=True, cut=cut).explore()
    while_one_is_waited_for().explore()


@pytest.mark.parametrize("how", ["store", "write"])
def test_answer_before_the_acknowledgements(monkeypatch: Break, policy: HolePolicyName, how: str) -> None:

    def do_not_wait(self: Unmapper, inode: Inode, page_ranges: list[PageRange], even_cows: bool = False) -> Steps[None]:
        for _ in UNMAP(self, inode, page_ranges):
            break
        return
        yield Completion(self._scheduler)

    monkeypatch.setattr(Unmapper, "unmap_mapping_range", do_not_wait)
    expect_bug(reader_and_writer(policy, how), "I1|I4|I7|no explanation")


@pytest.mark.parametrize("how", ["store", "write"])
def test_b9_unmap_only_where_the_writer_has_the_page_mapped(
    monkeypatch: Break, policy: HolePolicyName, how: str
) -> None:
    writer = b"\x01".rjust(16, b"\0")

    def ask_the_writer(self: Unmapper, inode: Inode, page_ranges: list[PageRange]) -> Steps[None]:
        if not any(vma.session.token == writer for pages in page_ranges for vma, _ in inode.mapping.mapped(pages)):
            return
        yield from UNMAP(self, inode, page_ranges)

    monkeypatch.setattr(Unmapper, "unmap_mapping_range", ask_the_writer)
    expect_bug(reader_and_writer(policy, how), "I1|I4|no explanation")


def test_unmap_all_but_the_writer(monkeypatch: Break, policy: HolePolicyName) -> None:
    """The Map would replace the writer's hole page anyway; but until it does, the writer's other thread reads that."""

    def spare_the_writer(fs: FileSystem, vma: Vma, message: Fault) -> Steps[None]:
        vma.page_table.clear(message.pgoff, message.pgoff + 1)
        yield from WRITE_HOLE(fs, vma, message)

    monkeypatch.setattr(fault, "_write_hole", spare_the_writer)
    stage = Stage(policy, threads=(2, 1), mapped=(0,))
    stage.world.blind = True  # the invariants would say it at once; what the threads see says it too
    stage.does(0, stage.store(0, 7))
    stage.does(0, stage.load(0), thread=1)
    stage.does(1, stage.store(1, 8))
    expect_bug(stage, "no explanation")


def test_b1_a_write_that_does_not_wait_for_a_fault_that_fills_the_hole(monkeypatch: Break) -> None:
    def look_at_the_block_map_alone(fs: FileSystem, inode: Inode, start_bytes: int, data: bytes) -> Steps[None]:
        pages = inode.pages_of(start_bytes, start_bytes + len(data))
        if any(inode.block_map.gaps(*pages)):
            yield from WRITE(fs, inode, start_bytes, data)
        else:
            fs.device.write_bytes(inode, start_bytes, data)

    monkeypatch.setattr(read_write, "_write", look_at_the_block_map_alone)
    stage = Stage("zero", threads=(1, 1, 1), mapped=(0,))
    stage.does(0, stage.load(0))
    stage.does(1, stage.store(1, 7))
    stage.does(2, Call(write_page(stage.handles[2], 0, 8)))
    expect_bug(stage, "no explanation")


def truncate_as(*steps: str) -> Callable[[FileSystem, Inode, int], Steps[None]]:
    """A truncate to less that takes its steps in this order."""

    def mutant(fs: FileSystem, inode: Inode, size_bytes: int) -> Steps[None]:
        past_eof = PageRange(-(-size_bytes // inode.page_size), OFFSET_BYTES_MAX)
        for step in steps:
            if step == "lock" and (granted := inode.invalidate_lock.acquire_exclusive()):
                yield granted
            elif step == "size":
                inode.size_bytes = size_bytes
            elif step == "unmap":
                yield from fs.unmapper.unmap_mapping_range(inode, [past_eof])
            elif step == "free":
                fs.cut(inode, past_eof)
            elif step == "unlock":
                inode.invalidate_lock.release_exclusive()

    return mutant


def test_the_mutants_begin_as_the_original(monkeypatch: Break) -> None:
    monkeypatch.setattr(truncate, "_truncate_down", truncate_as("lock", "size", "unmap", "free", "unlock"))
    mapper_and_cutter("truncate").explore()
    mapper_and_cutter("truncate", block=False).explore()


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(("lock", "size", "free", "unmap", "unlock"), id="free before unmap"),
        pytest.param(("lock", "unmap", "unlock", "lock", "size", "free", "unlock"), id="size and free after a gap"),
        pytest.param(("unmap", "size", "free"), id="no lock, size after unmap"),
        pytest.param(("size", "unmap", "free"), id="no lock"),
        pytest.param(("lock", "size", "free", "unlock"), id="no unmap"),
    ],
)
def test_b18_truncate_in_a_wrong_order(monkeypatch: Break, steps: tuple[str, ...]) -> None:
    monkeypatch.setattr(truncate, "_truncate_down", truncate_as(*steps))
    stage = mapper_and_cutter("truncate")
    other = Stage("zero", threads=(1, 1, 1), mapped=(0,))  # a fault that waits for client 0 while the file is cut
    other.does(1, other.store(1, 7))
    other.does(2, Call(Truncate(0, other.handles[2], 0)))
    with pytest.raises(OrderError, match=r"I1|I2|I7|no explanation"):  # noqa: PT012
        stage.explore()
        other.explore()


def test_b19_punch_frees_before_it_unmaps(monkeypatch: Break) -> None:
    def free_first(fs: FileSystem, inode: Inode, start_bytes: int, end_bytes: int) -> Steps[None]:
        whole = inode.pages_of(start_bytes, end_bytes)
        if granted := inode.invalidate_lock.acquire_exclusive():
            yield granted
        fs.cut(inode, whole)
        yield from fs.unmapper.unmap_mapping_range(inode, [whole])
        inode.invalidate_lock.release_exclusive()

    monkeypatch.setattr(fallocate, "_punch", free_first)
    expect_bug(mapper_and_cutter("punch"), "I1")


@pytest.mark.parametrize("cut", ["truncate", "punch"])
def test_b18_b19_invalidate_lock_does_not_exclude(monkeypatch: Break, cut: str) -> None:
    def take_shared(self: SharedLock) -> None:
        self.shared += 1

    def take_exclusive(self: SharedLock) -> None:
        self.exclusive = True

    monkeypatch.setattr(SharedLock, "acquire_shared", take_shared)
    monkeypatch.setattr(SharedLock, "acquire_exclusive", take_exclusive)
    stage = while_one_is_waited_for(block=cut == "punch", cut=cut)
    if cut == "truncate":  # a fault that has compared with i_size before, and answers after
        stage.world.clients[1].threads[0].operations.clear()
        stage.does(1, stage.store(1, 7))
    expect_bug(stage, "I1|I2|I7|no explanation")


def without_entry_locks(monkeypatch: Break) -> None:
    def take_at_once(self: EntryLocks, pgoff: int) -> None:
        self._held[pgoff] = None

    monkeypatch.setattr(EntryLocks, "acquire", take_at_once)
    monkeypatch.setattr(EntryLocks, "release", lambda self, pgoff: self._held.pop(pgoff, None))


def test_b2_a_read_fault_and_a_write_without_entry_lock(monkeypatch: Break) -> None:
    without_entry_locks(monkeypatch)
    expect_bug(while_one_is_waited_for(), "I4|no explanation")


def test_b6_two_write_faults_without_entry_lock(monkeypatch: Break) -> None:
    without_entry_locks(monkeypatch)
    stage = Stage("zero", threads=(1, 1, 1), mapped=(2,))
    stage.does(0, stage.store(0, 7))
    stage.does(1, stage.store(1, 8))
    expect_bug(stage, "I1|I4|I8|no explanation")


def test_b2_block_lookup_before_the_entry_lock(monkeypatch: Break) -> None:
    def look_first(fs: FileSystem, vma: Vma, message: Fault) -> Steps[None]:
        inode, pgoff = vma.inode, message.pgoff
        if message.write or pgoff or inode.block_map.get(pgoff) is not None:
            yield from HANDLE_FAULT(fs, vma, message)
            return
        if granted := inode.entry_locks.acquire(pgoff):
            yield granted
        hole_page = pack_pte(Target.ZERO, 0, Access.READ)
        fault._answer(fs, vma, message, [(pgoff, pgoff + 1, hole_page)])
        inode.entry_locks.release(pgoff)

    stage = Stage("page-cache", threads=(1, 1, 1, 1), pages=2, dram_pages=1, mapped=(0,))
    monkeypatch.setattr("dax_mp.coordinator.handle_fault", look_first)
    stage.does(1, stage.load(1, pgoff=1))
    stage.faults_first(1)  # reclaims page 0, and holds its lock until client 0 has dropped it
    stage.does(2, Call(write_page(stage.handles[2], 0, 7)))
    stage.does(3, stage.load(3))
    expect_bug(stage, "I4|no explanation")


@pytest.mark.parametrize("woken", [0, 1])
def test_b8_b17_a_waiter_is_not_woken(monkeypatch: Break, woken: int) -> None:
    def wake_some(self: EntryLocks, pgoff: int) -> None:
        queue = self._held.pop(pgoff)
        if queue and woken:
            self._held[pgoff] = None
            queue.popleft().complete()

    monkeypatch.setattr(EntryLocks, "release", wake_some)
    stage = Stage("zero", threads=(1, 1, 1), mapped=(0,))
    stage.does(0, stage.store(0, 7))
    for client in (1, 2):
        stage.does(client, stage.load(client))
    expect_bug(stage, "hangs")


def test_a_block_is_not_zeroed(monkeypatch: Break, policy: HolePolicyName) -> None:
    def leave_it(self: Device, extent: Extent) -> None:
        pass

    monkeypatch.setattr(Device, "zero_extent", leave_it)
    stage = Stage(policy, threads=(1, 1))
    stage.does(0, stage.load(0))
    stage.does(1, stage.store(1, 7))
    stage.does(1, stage.load(1))
    expect_bug(stage, "no explanation")


def test_a_block_is_zeroed_after_the_answer(monkeypatch: Break) -> None:
    """B6: the loser of two write faults zeroes what the winner has stored."""

    def zero_late(fs: FileSystem, vma: Vma, message: Fault) -> Steps[None]:
        yield from HANDLE_FAULT(fs, vma, message)
        if message.write and (pfn := vma.inode.block_map.get(message.pgoff)) is not None:
            fs.device.zero_extent(Extent(pfn, 1))

    monkeypatch.setattr("dax_mp.coordinator.handle_fault", zero_late)
    stage = Stage("zero", threads=(1, 1))
    stage.does(0, stage.store(0, 7), stage.load(0))
    stage.does(1, stage.store(1, 8))
    expect_bug(stage, "no explanation")


def test_no_quarantine(monkeypatch: Break) -> None:
    monkeypatch.setattr(FrameAllocator, "held_parts", lambda self, pfn, length_pages: iter(()))
    stage = mapper_and_cutter("punch")
    stage.world.fates.append(Event("misbehave", 0))
    expect_bug(stage, "I1: evicted")


def test_an_evicted_process_is_forgotten_before_it_has_dropped_everything(monkeypatch: Break) -> None:
    monkeypatch.setattr(FrameAllocator, "hold", lambda self, token, extents: None)
    stage = mapper_and_cutter("truncate")
    stage.world.fates.append(Event("misbehave", 0))
    expect_bug(stage, "I1: evicted")


def test_the_dead_are_waited_for(monkeypatch: Break) -> None:
    monkeypatch.setattr(Unmapper, "session_over", lambda self, session: None)
    stage = mapper_and_cutter("punch")
    stage.world.fates.append(Event("die", 0))
    expect_bug(stage, "hangs")


def test_unmap_and_map_in_two_channels() -> None:
    """Nothing in the coordinator is broken: with a channel for each of them a stale Map overtakes an Unmap."""
    stage = Stage("zero", threads=(1, 1), block=True)
    stage.does(0, stage.load(0))
    stage.does(1, Call(Fallocate(0, stage.handles[1], PUNCH_HOLE, 0, PAGE_SIZE)))
    for client in stage.world.clients:
        client.use_second_channel()
    expect_bug(stage, "I1|I7")


def test_reclaim_frees_a_page_that_is_mapped(monkeypatch: Break) -> None:
    def just_take_it(fs: FileSystem, inode: Inode, pgoff: int) -> Steps[None]:
        fs.device.holes.discard(inode, PageRange(pgoff, pgoff + 1))
        return
        yield Completion(fs.scheduler)

    monkeypatch.setattr(fault, "reclaim", just_take_it)
    stage = Stage("page-cache", threads=(1, 1), pages=2, dram_pages=1, mapped=(0,))
    stage.does(1, stage.load(1, pgoff=1))
    expect_bug(stage, "I1")


def test_a_handle_that_is_closed_twice_is_seen(monkeypatch: Break) -> None:
    """The count of users, too, is judged."""

    def leak(fs: FileSystem, session: Any, request: Any) -> Steps[list[int]]:
        reply = yield from OPEN_FILE(fs, session, request)
        fs.get(session.handles[reply[0]])
        return reply

    monkeypatch.setitem(requests.REQUESTS, Open, leak)
    expect_bug(reader_and_writer(), "a user too many")


def pinner_and_truncater() -> Stage:
    stage = Stage("zero", threads=(1, 1), mapped=(0, 1))
    stage.does(0, Call(Pin(0, stage.vmas[0], 0, 1)), stage.store(0, 7), Call(Munmap(0, stage.vmas[0])))
    stage.does(1, Call(Truncate(0, stage.handles[1], 0)))
    return stage


def test_b20_nobody_waits_for_pins(monkeypatch: Break) -> None:
    def do_not_look(fs: FileSystem, inode: Inode, taken: Any) -> Steps[None]:
        if granted := inode.rwsem.acquire_exclusive():
            yield granted

    pinner_and_truncater().explore()
    monkeypatch.setattr(truncate, "lock_unpinned", do_not_look)
    expect_bug(pinner_and_truncater(), "I9")


def test_b22_a_pin_does_not_wait_for_those_who_look_for_pins(monkeypatch: Break) -> None:
    def take_nothing(fs: FileSystem, vma: Vma, pages: PageRange) -> Steps[int]:
        inode = vma.inode
        locked = yield from blocks.lock_and_fill(fs, inode, pages)
        inode.entry_locks.release_all(locked)
        pin_id = fs.next_id()
        vma.session.pins[pin_id] = inode.pins[pin_id] = Pinned(vma, pages)
        return pin_id

    monkeypatch.setattr(pins, "pin", take_nothing)
    expect_bug(pinner_and_truncater(), "I[179]")


def test_b21_a_punch_takes_private_copies(monkeypatch: Break) -> None:
    def all_of_it(self: Unmapper, inode: Inode, page_ranges: list[PageRange], even_cows: bool = False) -> Steps[None]:
        yield from UNMAP(self, inode, page_ranges, even_cows=True)

    monkeypatch.setattr(Unmapper, "unmap_mapping_range", all_of_it)
    stage = Stage("zero", threads=(1, 1), private=(0,))
    stage.does(0, stage.store(0, PRIVATE_VALUES), stage.load(0))
    stage.does(1, Call(Fallocate(0, stage.handles[1], PUNCH_HOLE, 0, PAGE_SIZE)))
    expect_bug(stage, "lost its copy")


def test_a_direct_write_takes_no_entry_locks(monkeypatch: Break) -> None:
    """A fault fills the hole, and zeroes the block, under the client's store."""

    def take_none(inode: Inode, pages: PageRange, locked: list[int]) -> Steps[None]:
        return
        yield Completion(Scheduler())

    monkeypatch.setattr(blocks, "lock_holes", take_none)
    stage = Stage("zero", threads=(1, 1), mapped=(0,))
    stage.does(0, stage.store(0, 8))
    stage.does(1, DirectWrite(stage.handles[1], 0, (7,)))
    expect_bug(stage, "I10|no explanation")


def test_what_is_lent_to_the_evicted_is_free_at_once(monkeypatch: Break) -> None:
    monkeypatch.setattr(Session, "reach", lambda self, target: iter(()))
    stage = Stage("zero", threads=(1, 1), pmem_pages=1)
    handles = [stage.world.open(client, "other") for client in (0, 1)]
    stage.world.call(1, write_page(handles[1], 0, 99))
    stage.world.begin_history()
    stage.world.fates.append(Event("misbehave", 0))
    stage.does(0, DirectWrite(handles[0], 0, (7,)))
    stage.does(1, Call(Fallocate(0, handles[1], PUNCH_HOLE, 0, PAGE_SIZE)), stage.store(1, 8), stage.load(1))
    expect_bug(stage, "no explanation")


def test_blocks_that_the_evicted_reach_move(monkeypatch: Break) -> None:
    monkeypatch.setattr(shift, "_replace_reachable", lambda fs, inode, pages: None)
    stage = Stage("zero", threads=(1, 1), pages=2, pmem_pages=4, block=True, second=9, mapped=(0,))
    stage.world.fates.append(Event("misbehave", 0))
    stage.does(0, stage.store(0, 7))
    stage.does(1, Call(Fallocate(0, stage.handles[1], int(FallocateMode.INSERT_RANGE), 0, PAGE_SIZE)))
    expect_bug(stage, "I1: evicted")
