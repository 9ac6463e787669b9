"""Delays at named steps: an operation waits there, and how things stand is what the step's comment says."""

from collections.abc import Callable
from typing import Final

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.delays import STEPS
from dax_mp.inode import Inode
from dax_mp.messages import Fallocate, FallocateMode, Pin, Truncate
from simulation.client import PAGE_SIZE, Call, Load, Operation, Store
from simulation.world import ACK_TIMEOUT_S, World, write_page

P: Final = PAGE_SIZE


@pytest.fixture
def world() -> World:
    """Two clients that have four pages of a file mapped, as VMAs 1 and 2; the last page alone has a block.

    Client 1 has loaded them all.
    """
    world = World(pmem_pages=8)
    for _ in range(2):
        world.map(world.add_client(), world.open(len(world.clients) - 1, "file"), 4)
    world.call(0, Truncate(0, 1, 4 * P))
    world.call(0, write_page(1, 3, 7))
    for page in range(4):
        world.access(1, Load(2, page))
    return world


def begin(world: World, operation: Operation) -> None:
    world.clients[0].threads[0].operations.append(operation)
    world.settle()


def under_way(world: World) -> bool:
    return bool(world.clients[0].threads[0].operations)


def file(world: World) -> Inode:
    return world.coordinator.fs.names["file"]


def maps(world: World, pgoff: int) -> bool:
    return pgoff in world.clients[1].windows[2].translations


CASES: Final[dict[str, tuple[Operation, Callable[[World], bool]]]] = {
    "fault.entry_locked": (Store(1, 0, 1), lambda world: file(world).entry_locks.held(0) and maps(world, 0)),
    "fault.block_allocated": (
        Store(1, 0, 1),
        lambda world: file(world).block_map.get(0) is not None and maps(world, 0),
    ),
    "fault.before_map": (Store(1, 0, 1), lambda world: not maps(world, 0)),
    "fill.allocated": (
        Call(Pin(0, 1, 0, 2)),
        lambda world: file(world).block_map.get(1) is not None and maps(world, 1),
    ),
    "write.before_copy": (
        Call(write_page(1, 0, 1)),
        lambda world: not maps(world, 0) and world.access(1, Load(2, 3)) == 7,
    ),
    "truncate.size_set": (Call(Truncate(0, 1, P)), lambda world: file(world).size_bytes == P and maps(world, 3)),
    "truncate.unmapped": (
        Call(Truncate(0, 1, P)),
        lambda world: not maps(world, 3) and file(world).block_map.get(3) is not None,
    ),
    "punch.unmapped": (
        Call(Fallocate(0, 1, PUNCH_HOLE, 3 * P, P)),
        lambda world: not maps(world, 3) and file(world).block_map.get(3) is not None,
    ),
    "shift.unmapped": (
        Call(Fallocate(0, 1, int(FallocateMode.COLLAPSE_RANGE), 0, P)),
        lambda world: not maps(world, 3) and file(world).block_map.get(3) is not None,
    ),
}
"""For each step: what comes to it, and what is so then."""


def test_there_is_a_case_for_each_step() -> None:
    assert tuple(CASES) == STEPS


@pytest.mark.parametrize("step", STEPS)
def test_an_operation_is_held_at_the_step(world: World, step: str) -> None:
    operation, as_it_should_be = CASES[step]
    delays = world.coordinator.fs.delays
    delays.hold(step)
    begin(world, operation)
    assert under_way(world)
    assert as_it_should_be(world)
    world.check()
    assert delays.let_go(step) == 1
    world.coordinator.tick(0.0)
    world._carry_out()
    world.settle()
    assert not under_way(world)
    world.check()
    world.check_quiescent()


def test_a_delay_ends_by_the_clock(world: World) -> None:
    world.coordinator.fs.delays.delay("write.before_copy", 5 * ACK_TIMEOUT_S)
    begin(world, Call(write_page(1, 0, 1)))
    assert world.coordinator.next_deadline_s() == 5 * ACK_TIMEOUT_S
    for now_s, waits in ((4.9 * ACK_TIMEOUT_S, True), (5 * ACK_TIMEOUT_S, False)):
        world.coordinator.tick(now_s)
        world._carry_out()
        world.settle()
        assert under_way(world) == waits
    assert world.access(1, Load(2, 0)) == 1


@pytest.mark.parametrize(
    ("step", "seconds"), [("truncate", 1.0), ("truncate.unmapped", 0.0), ("truncate.unmapped", float("inf"))]
)
def test_what_is_no_delay(world: World, step: str, seconds: float) -> None:
    with pytest.raises(ValueError, match=step):
        world.coordinator.fs.delays.delay(step, seconds)
    begin(world, Call(Truncate(0, 1, P)))
    assert not under_way(world)


def test_no_step_is_held_that_is_none(world: World) -> None:
    with pytest.raises(ValueError, match=r"no step: fault\.entry_locked, "):
        world.coordinator.fs.delays.hold("fault")
