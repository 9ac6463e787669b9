"""Every order of events of small worlds. The names B1..B28 are those of bugs in the history of Linux's DAX.

After each event the coordinator's invariants are asserted, and I1, I4 and I7 against the translations that the clients
have in truth. At the end of each order nothing may be under way, and what all threads have seen must have an
explanation. Each test asserts how many orders there are at least, so that an enumeration that has lost some is noticed.
"""

from collections.abc import Callable, Sequence

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.device import HolePolicyName
from dax_mp.messages import Fallocate, FallocateMode, Munmap, Pin, Truncate
from simulation.client import PAGE_SIZE, Call, DirectRead, DirectWrite, Operation
from simulation.explore import explore, partial_order
from simulation.stage import Stage
from simulation.world import PRIVATE_VALUES, Event, Moment, write_page

COLLAPSE = int(FallocateMode.COLLAPSE_RANGE)
INSERT = int(FallocateMode.INSERT_RANGE)
ZERO = int(FallocateMode.ZERO_RANGE)

# What the other one does, and how many orders there are at least.
ALLOCATED = [
    ("store", 36_170),
    ("write", 10_565),
    ("truncate", 1_182_271),
    ("punch", 24_480_081),
    ("allocate", 7_510),
    ("direct write", 153_179),
]
ZEROED = [
    ("load", 44),
    ("store", 44),
    ("write", 198),
    ("truncate", 221),
    ("direct write", 736),
]
SHIFTED = [
    ("load", 44),
    ("store", 44),
    ("write", 198),
    ("direct read", 840),
    ("direct write", 840),
]
DIRECT = [
    ("load", 36),
    ("store", 36),
    ("write", 175),
    ("truncate", 2_452),
    ("punch", 2_754),
    ("zero", 2_754),
    ("direct read", 765),
    ("direct write", 765),
    ("pin", 175),
]
PINNED = [
    ("truncate", 23_310),
    ("punch", 18_096),
    ("zero", 18_096),
    ("collapse", 25_008),
    ("insert", 25_008),
]
COPIED = [
    ("store", 2_383),
    ("write", 10_651),
    ("truncate", 16_617),
    ("punch", 10_651),
    ("zero", 10_651),
    ("collapse", 17_407),
    ("insert", 10_651),
    ("direct write", 46_102),
]
FATEFUL = [
    ("die", "punch", 11_050),
    ("die", "store", 22_048),
    ("misbehave", "store", 1_383_991),
    ("misbehave", "truncate", 678_955),
]

both_policies = pytest.mark.parametrize("policy", ["zero", "page-cache"])


def truncate(stage: Stage, client: int, pages: int = 0) -> Operation:
    return Call(Truncate(0, stage.handles[client], pages * PAGE_SIZE))


def punch(stage: Stage, client: int) -> Operation:
    return Call(Fallocate(0, stage.handles[client], PUNCH_HOLE, 0, PAGE_SIZE))


def write(stage: Stage, client: int, value: int) -> Operation:
    return Call(write_page(stage.handles[client], 0, value))


@both_policies
@pytest.mark.parametrize(
    ("how", "cut", "orders"),
    [
        ("store", "truncate", 12_683_454),
        ("store", "punch", 263_477_951),
        ("write", "truncate", 53_726),
        ("write", "punch", 104_546),
    ],
)
def test_read_fault_hole_write_and_cut(policy: HolePolicyName, how: str, cut: str, orders: int) -> None:
    """Two clients, one page: a read fault, a write to the hole by store or by write(2), and a truncate or a punch."""
    stage = Stage(policy, threads=(2, 1))
    stage.does(0, stage.load(0))
    stage.does(1, stage.store(1, 7) if how == "store" else write(stage, 1, 7))
    stage.does(0, truncate(stage, 0) if cut == "truncate" else punch(stage, 0), thread=1)
    assert stage.explore().orders >= orders


@both_policies
@pytest.mark.parametrize(("mapped", "orders"), [((), 433_244), ((2,), 36_170), ((0, 1, 2), 13_854_100)])
def test_b6_two_write_faults_on_one_hole(policy: HolePolicyName, mapped: Sequence[int], orders: int) -> None:
    """I3: they end with one block, and neither's store is lost to the other's zeroing. A third client reads."""
    stage = Stage(policy, threads=(1, 1, 1), mapped=mapped)
    stage.does(0, stage.store(0, 7))
    stage.does(1, stage.store(1, 8))
    stage.does(2, stage.load(2))
    assert stage.explore().orders >= orders


@both_policies
def test_b8_three_readers_of_one_hole_and_a_writer(policy: HolePolicyName) -> None:
    """The writer's fault has the entry lock, and waits for its own pager. All who come then are woken."""
    stage = Stage(policy, threads=(1, 1, 1, 1), mapped=(0,))
    stage.does(0, stage.store(0, 7))
    stage.faults_first(0)
    for client in (1, 2, 3):
        stage.does(client, stage.load(client))
    assert stage.explore().orders >= 34_533_450


@both_policies
@pytest.mark.parametrize(("how", "orders"), [("store", 117), ("write", 44)])
def test_b9_the_writer_has_never_mapped_the_page(policy: HolePolicyName, how: str, orders: int) -> None:
    stage = Stage(policy, threads=(1, 1), mapped=(0,))
    stage.does(0, stage.load(0), stage.load(0))
    stage.does(1, stage.store(1, 7) if how == "store" else write(stage, 1, 7))
    assert stage.explore().orders >= orders


@both_policies
def test_b1_b2_b4_read_faults_against_a_write(policy: HolePolicyName) -> None:
    """No fault brings the hole page back between the write's allocation and its data."""
    stage = Stage(policy, threads=(1, 1, 1))
    stage.does(0, stage.load(0))
    stage.does(1, write(stage, 1, 7))
    stage.does(2, stage.load(2))
    assert stage.explore().orders >= 11_094_490


@both_policies
def test_a_write_waits_for_a_fault_that_fills_the_hole(policy: HolePolicyName) -> None:
    """Client 1's fault has given the page its block, and client 0 still has the hole page when client 2 writes."""
    stage = Stage(policy, threads=(1, 1, 1), mapped=(0,))
    stage.does(0, stage.load(0))
    stage.does(1, stage.store(1, 7))
    stage.does(2, write(stage, 2, 8))
    assert stage.explore().orders >= 10_565


@both_policies
def test_another_thread_of_the_writer_reads(policy: HolePolicyName) -> None:
    """The writer's own VMA must have dropped the hole page too before anyone can store to the block."""
    stage = Stage(policy, threads=(2, 1), mapped=(0,))
    stage.does(0, stage.store(0, 7))
    stage.does(0, stage.load(0), thread=1)
    stage.does(1, stage.store(1, 8))
    assert stage.explore().orders >= 16_205


@both_policies
@pytest.mark.parametrize(
    ("block", "growing", "orders"), [(False, False, 549), (True, False, 212), (False, True, 6_152), (True, True, 4_075)]
)
def test_b18_truncate_races_with_faults(policy: HolePolicyName, block: bool, growing: bool, orders: int) -> None:
    stage = Stage(policy, threads=(1, 1), block=block)
    stage.does(0, stage.load(0), stage.store(0, 7))
    stage.does(1, truncate(stage, 1), *([truncate(stage, 1, 1)] if growing else []))
    assert stage.explore().orders >= orders


@both_policies
def test_b19_a_punched_block_goes_to_another_file_at_once(policy: HolePolicyName) -> None:
    """The device has one block. Nobody who had it mapped ever sees the other file's bytes."""
    stage = Stage(policy, threads=(1, 1), pmem_pages=1, block=True, mapped=(0,))
    other = stage.world.open(1, "other")
    stage.does(0, stage.load(0), stage.load(0))
    stage.does(1, punch(stage, 1), Call(write_page(other, 0, 99)))
    assert stage.explore().orders >= 517


@both_policies
@pytest.mark.parametrize(
    ("what", "orders"), [("store", 6_854), ("write", 3_506), ("punch", 2_125), ("truncate", 1_181)]
)
def test_a_process_dies_at_any_moment(policy: HolePolicyName, what: str, orders: int) -> None:
    stage = Stage(policy, threads=(1, 1), mapped=(0,), block=what in ("punch", "truncate"))
    stage.world.fates.append(Event("die", 0))
    stage.world.fates.append(Event("die", 1))
    stage.does(0, stage.load(0), stage.store(0, 6))
    programs = {"store": stage.store(1, 7), "write": write(stage, 1, 7), "punch": punch(stage, 1)}
    stage.does(1, programs.get(what, truncate(stage, 1)))
    assert stage.explore().orders >= orders


@both_policies
@pytest.mark.parametrize(
    ("what", "orders"), [("store", 18_781), ("write", 9_019), ("punch", 9_019), ("truncate", 5_856)]
)
def test_a_process_is_evicted_at_any_moment(policy: HolePolicyName, what: str, orders: int) -> None:
    """Who waits for it goes on, and what it can still reach goes to nobody else until it has dropped it."""
    stage = Stage(policy, threads=(1, 1), mapped=(0,), block=what in ("punch", "truncate"))
    other = stage.world.open(1, "other")
    stage.world.fates.append(Event("misbehave", 0))
    stage.does(0, stage.store(0, 6) if what in ("punch", "truncate") else stage.load(0))
    programs = {"store": stage.store(1, 7), "write": write(stage, 1, 7), "punch": punch(stage, 1)}
    stage.does(1, programs.get(what, truncate(stage, 1)), Call(write_page(other, 0, 99)))
    assert stage.explore().orders >= orders


@pytest.mark.parametrize(("what", "orders"), [("store", 158), ("write", 97), ("truncate", 181), ("punch", 97)])
def test_reclaim_races_with_the_page_that_is_reclaimed(what: str, orders: int) -> None:
    """Client 1 needs the only frame of the page cache, which shows client 0 a hole that is changing."""
    stage = Stage("page-cache", threads=(1, 1), pages=2, dram_pages=1, mapped=(0,))
    programs = {"store": stage.store(0, 7), "write": write(stage, 0, 7), "punch": punch(stage, 0)}
    stage.does(0, programs.get(what, truncate(stage, 0)))
    stage.does(1, stage.load(1, pgoff=1))
    assert stage.explore().orders >= orders


# --- fallocate, direct I/O, pins, private mappings --------------------------------------------------------------------


def falloc(stage: Stage, client: int, mode: int, pages: int = 1) -> Operation:
    return Call(Fallocate(0, stage.handles[client], mode, 0, pages * PAGE_SIZE))


def direct_write(stage: Stage, client: int, *values: int) -> Operation:
    return DirectWrite(stage.handles[client], 0, values)


def rival(stage: Stage, client: int, what: str) -> Operation:
    """What another process may do to the first page meanwhile."""
    rivals: dict[str, Callable[[], Operation]] = {
        "load": lambda: stage.load(client),
        "store": lambda: stage.store(client, 8),
        "write": lambda: write(stage, client, 8),
        "truncate": lambda: truncate(stage, client),
        "punch": lambda: punch(stage, client),
        "zero": lambda: falloc(stage, client, ZERO),
        "allocate": lambda: falloc(stage, client, 0),
        "collapse": lambda: falloc(stage, client, COLLAPSE),
        "insert": lambda: falloc(stage, client, INSERT),
        "direct read": lambda: DirectRead(stage.handles[client], 0, 1),
        "direct write": lambda: direct_write(stage, client, 8),
        "pin": lambda: Call(Pin(0, stage.vmas[client], 0, 1)),
    }
    return rivals[what]()


@both_policies
@pytest.mark.parametrize(("how", "orders"), ALLOCATED)
def test_unwritten_blocks(policy: HolePolicyName, how: str, orders: int) -> None:
    """A page that is allocated reads as a hole, until someone fills it; a third client reads all along."""
    stage = Stage(policy, threads=(1, 1, 1), unwritten=True, mapped=(2,), pmem_pages=1)
    stage.does(0, stage.store(0, 7))
    stage.does(1, rival(stage, 1, how))
    stage.does(2, stage.load(2))
    assert stage.explore().orders >= orders


@both_policies
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize(("how", "orders"), ZEROED)
def test_zero_range_against_others(policy: HolePolicyName, block: bool, how: str, orders: int) -> None:
    stage = Stage(policy, threads=(1, 1), block=block, mapped=(0,))
    stage.does(0, rival(stage, 0, how), stage.load(0))
    stage.does(1, falloc(stage, 1, ZERO))
    assert stage.explore().orders >= orders


@both_policies
@pytest.mark.parametrize("mode", [COLLAPSE, INSERT])
@pytest.mark.parametrize(("how", "orders"), SHIFTED)
def test_shifts_against_others(policy: HolePolicyName, mode: int, how: str, orders: int) -> None:
    """The first page of two becomes the second, or the other way round, while somebody uses it."""
    stage = Stage(policy, threads=(1, 1), pages=2, pmem_pages=4, block=True, second=9, mapped=(0,))
    stage.does(0, rival(stage, 0, how), stage.load(0))
    stage.does(1, falloc(stage, 1, mode))
    assert stage.explore().orders >= orders


@both_policies
@pytest.mark.parametrize("mode", [COLLAPSE, INSERT])
def test_a_process_is_evicted_while_blocks_move(policy: HolePolicyName, mode: int) -> None:
    """What it still reaches does not become another page's, or another file's."""
    stage = Stage(policy, threads=(1, 1), pages=2, pmem_pages=6, block=True, second=9, mapped=(0,))
    other = stage.world.open(1, "other")
    stage.world.fates.append(Event("misbehave", 0))
    stage.does(0, stage.store(0, 6))
    stage.does(1, falloc(stage, 1, mode), Call(write_page(other, 0, 99)))
    assert stage.explore().orders >= 9_019


@both_policies
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize(("how", "orders"), DIRECT)
def test_direct_writes_against_others(policy: HolePolicyName, block: bool, how: str, orders: int) -> None:
    """Client 0 has the page mapped and does something else; the bytes of client 1 do not pass the coordinator."""
    stage = Stage(policy, threads=(1, 1), block=block, mapped=(0,))
    stage.does(0, rival(stage, 0, how), stage.load(0))
    stage.does(1, direct_write(stage, 1, 7))
    assert stage.explore().orders >= orders


@both_policies
def test_direct_writes_and_reads_of_two_pages(policy: HolePolicyName) -> None:
    """The first page has a block, the second is a hole: they are lent in two pieces."""
    stage = Stage(policy, threads=(1, 1), pages=2, pmem_pages=4, block=True, mapped=(0,))
    stage.does(0, stage.store(0, 6))
    stage.does(1, DirectWrite(stage.handles[1], 0, (7, 8)), DirectRead(stage.handles[1], 0, 2))
    assert stage.explore().orders >= 16


@pytest.mark.parametrize(("policy", "unwritten"), [("zero", True), ("page-cache", False)])
@pytest.mark.parametrize(("fate", "how", "orders"), FATEFUL)
def test_a_direct_writer_dies_or_is_evicted(
    policy: HolePolicyName, unwritten: bool, fate: str, how: str, orders: int
) -> None:
    """What it half wrote into a hole is not there, and what it may still store to is nobody else's."""
    stage = Stage(policy, threads=(1, 1), pmem_pages=3, unwritten=unwritten, mapped=(1,))
    other = stage.world.open(1, "other")
    stage.world.fates.append(Event(fate, 0))
    stage.does(0, direct_write(stage, 0, 7))
    stage.does(1, rival(stage, 1, how), Call(write_page(other, 0, 99)))
    assert stage.explore().orders >= orders


@both_policies
@pytest.mark.parametrize(("how", "orders"), PINNED)
def test_what_is_pinned_while_others_take_it_away(policy: HolePolicyName, how: str, orders: int) -> None:
    """They wait for the pin, which dies with its process; the page is used through it meanwhile."""
    stage = Stage(policy, threads=(1, 1), pages=2, pmem_pages=4, second=9, mapped=(0, 1))
    stage.world.fates.append(Event("die", 0))
    stage.does(0, rival(stage, 0, "pin"), stage.store(0, 7), Call(Munmap(0, stage.vmas[0])))
    stage.does(1, rival(stage, 1, how))
    assert stage.explore().orders >= orders


@both_policies
@pytest.mark.parametrize(("how", "orders"), COPIED)
def test_private_copies_against_others(policy: HolePolicyName, how: str, orders: int) -> None:
    """A truncate takes them, at some time while it goes on, and nothing else does."""
    pages = 2 if how in ("collapse", "insert") else 1
    stage = Stage(policy, threads=(1, 1), pages=pages, pmem_pages=4, second=9 if pages == 2 else 0, private=(0,))
    stage.does(0, stage.load(0), stage.store(0, PRIVATE_VALUES), stage.load(0))
    stage.does(1, rival(stage, 1, how), stage.load(1))
    assert stage.explore().orders >= orders


# --- the enumeration itself -------------------------------------------------------------------------------------------


@both_policies
def test_following_equal_states_once_loses_nothing(policy: HolePolicyName) -> None:
    """With and without it: the same number of orders, and the same histories at their ends."""

    def histories(merge: bool) -> tuple[int, set[tuple[Moment, ...]], int]:
        stage = Stage(policy, threads=(1, 1), mapped=(0,))
        stage.does(0, stage.load(0), stage.load(0))
        stage.does(1, stage.store(1, 7))
        seen: list[tuple[Moment, ...]] = []
        explored = explore(stage.world, lambda world: seen.append(tuple(partial_order(world.history))), merge=merge)
        return explored.orders, set(seen), len(seen)

    merged_orders, merged_histories, _ = histories(merge=True)
    all_orders, all_histories, ends = histories(merge=False)
    assert ends == all_orders == merged_orders > 100
    assert merged_histories == all_histories
