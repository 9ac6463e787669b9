"""The page-cache hole policy: frames are shared by all mappers, kicked out by a write, reclaimed, and never lost."""

import errno

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.errors import ProtocolError, os_error
from dax_mp.hole_pages import PageCache
from dax_mp.memory import ByteArrayMemory
from dax_mp.messages import BeginWrite, Fallocate, Target, Truncate
from simulation.client import PAGE_SIZE, Client, Load, Store
from simulation.world import Event, World


def cached_world(dram_pages: int, clients: int = 2, pages: int = 8) -> World:
    """Each client has handle 1 to the same file, and VMA 1 + its number."""
    world = World("page-cache", 8, dram_pages)
    for _ in range(clients):
        client = world.add_client()
        handle = world.open(client, "file")
        world.call(client, Truncate(0, handle, pages * PAGE_SIZE))
        assert world.map(client, handle, pages) == 1 + client
    return world


def frame(client: Client, pgoff: int) -> tuple[int, int] | None:
    (window,) = client.windows.values()
    translation = window.translations.get(pgoff)
    return None if translation is None else (translation.target, translation.pfn)


def free_frames(world: World) -> int:
    frames = world.coordinator.fs.device.dram_frames
    assert frames is not None
    return frames.free_pages


def test_all_mappers_share_one_frame() -> None:
    world = cached_world(4)
    assert [world.access(client, Load(1 + client, 3)) for client in (0, 1)] == [0, 0]
    first, second = (frame(client, 3) for client in world.clients)
    assert first == second and first is not None and first[0] == Target.DRAM
    assert free_frames(world) == 3
    world.check()


def test_a_write_kicks_the_page_out() -> None:
    world = cached_world(4)
    world.access(0, Load(1, 3))
    world.access(1, Store(2, 3, 9))
    assert free_frames(world) == 4
    assert frame(world.clients[0], 3) is None
    assert world.access(0, Load(1, 3)) == 9
    world.check()


@pytest.mark.parametrize(
    "request_of", [lambda: Truncate(0, 1, 0), lambda: Fallocate(0, 1, PUNCH_HOLE, 0, 8 * PAGE_SIZE)]
)
def test_truncate_and_punch_give_the_frames_back(request_of: object) -> None:
    world = cached_world(4)
    for pgoff in range(4):
        world.access(0, Load(1, pgoff))
    assert free_frames(world) == 0
    world.call(1, request_of())  # type: ignore[operator]
    assert free_frames(world) == 4
    world.check()


def test_the_oldest_page_is_reclaimed() -> None:
    world = cached_world(2)
    for pgoff in (5, 6):
        world.access(0, Load(1, pgoff))
        world.access(1, Load(2, pgoff))
    world.access(1, Load(2, 7))
    assert [frame(client, 5) for client in world.clients] == [None, None]
    assert frame(world.clients[0], 6) is not None
    assert world.coordinator.fs.counters["reclaims"] == 1
    world.check()


def test_a_file_larger_than_the_cache_is_read() -> None:
    world = cached_world(2, pages=40)
    for _ in range(2):
        assert [world.access(0, Load(1, pgoff)) for pgoff in range(40)] == [0] * 40
        world.check()
    world.check_quiescent()


def test_a_fault_is_served_while_another_takes_the_only_frame() -> None:
    """The frame is being taken from client 0; who needs one too meanwhile gets the zero page, and no BusError."""
    world = cached_world(1, clients=3)
    world.access(0, Load(1, 0))
    for client in (1, 2):
        world.clients[client].threads[0].operations.append(Load(1 + client, client))
        world.step(Event("run", client))
        world.step(Event("fault", client))
    assert not world.clients[1].pager_orders, "answered before client 0 has dropped the page"
    assert world.clients[2].pager_orders
    world.settle()
    assert [moment.outcome for moment in world.history if moment.ends][-2:] == [0, 0]
    assert frame(world.clients[2], 2) == (Target.ZERO, 0)
    world.check()
    world.check_quiescent()


def test_a_fault_is_served_while_a_write_keeps_the_only_frame() -> None:
    world = cached_world(1, clients=3)
    world.access(0, Load(1, 0))
    for client, operation in ((1, Store(2, 0, 7)), (2, Load(3, 1))):
        world.clients[client].threads[0].operations.append(operation)
        world.step(Event("run", client))
        world.step(Event("fault", client))
    world.settle()
    assert [moment.outcome for moment in world.history if moment.ends][-2:] == [None, 0]
    world.check_quiescent()


def test_a_load_beside_a_long_write_that_has_all_cached_pages_locked_is_served() -> None:
    """The write is of another file, and lasts as long as its process takes."""
    world = cached_world(2)
    for pgoff in (0, 1):
        world.access(0, Load(1, pgoff))
    world.call(0, BeginWrite(0, 1, 0, 0, 2 * PAGE_SIZE))
    other = world.open(1, "other")
    world.call(1, Truncate(0, other, PAGE_SIZE))
    vma_id = world.map(1, other, 1)
    assert world.access(1, Load(vma_id, 0)) == 0
    assert world.clients[1].windows[vma_id].translations[0].target == Target.ZERO
    assert world.access(1, Store(vma_id, 0, 7)) is None, "and its hole page goes as any other"
    assert world.access(1, Load(vma_id, 0)) == 7
    world.check()


def test_a_load_needs_no_frame() -> None:
    """An evicted client may still reach the only one: the zero page is mapped, and a write kicks it out."""
    world = cached_world(1)
    world.access(0, Load(1, 0))
    world.stopped.add(0)
    world.coordinator.protocol_error(world.clients[0].token, ProtocolError("broken on purpose"))
    world.add_client()
    vma_id = world.map(2, world.open(2, "file"), 8)
    world.access(2, Store(vma_id, 0, 7))  # the frame goes to quarantine
    assert world.access(1, Load(2, 1)) == 0
    assert frame(world.clients[1], 1) == (Target.ZERO, 0)
    world.access(2, Store(vma_id, 1, 9))
    assert frame(world.clients[1], 1) is None
    assert world.access(1, Load(2, 1)) == 9
    world.kill(0)
    assert world.access(1, Load(2, 2)) == 0
    translation = frame(world.clients[1], 2)
    assert translation is not None and translation[0] == Target.DRAM
    world.check()
    world.check_quiescent()


def test_a_frame_that_cannot_be_zeroed_is_not_lost() -> None:
    class NoMemory(ByteArrayMemory):
        def zero(self, offset_bytes: int, length_bytes: int) -> None:
            raise os_error(errno.ENOSPC)

    world = cached_world(2)
    holes = world.coordinator.fs.device.holes
    assert isinstance(holes, PageCache)
    working, holes._memory = holes._memory, NoMemory(1000)
    for pgoff in range(3):
        assert world.access(0, Load(1, pgoff)) == 0
        assert frame(world.clients[0], pgoff) == (Target.ZERO, 0)
        assert free_frames(world) == 2
        world.check()
    holes._memory = working
    assert world.access(0, Load(1, 3)) == 0
    assert free_frames(world) == 1
    world.check_quiescent()
