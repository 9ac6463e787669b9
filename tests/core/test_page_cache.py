"""The page-cache hole policy: frames are shared by all mappers, kicked out by a write, reclaimed, and never lost."""

import errno

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.errors import ProtocolError, os_error
from dax_mp.hole_pages import PageCache
from dax_mp.memory import ByteArrayMemory
from dax_mp.messages import Fallocate, Target, Truncate
from simulation.client import PAGE_SIZE, Client, Failed, Load, Store
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


def test_a_fault_waits_for_a_reclaim_that_another_has_begun() -> None:
    """The only frame is being taken from client 0; who needs one too meanwhile waits for it and gets no BusError."""
    world = cached_world(1, clients=3)
    world.access(0, Load(1, 0))
    for client in (1, 2):
        world.clients[client].threads[0].operations.append(Load(1 + client, client))
        world.step(Event("run", client))
        world.step(Event("fault", client))
    assert not any(client.pager_orders for client in world.clients[1:]), "answered before client 0 has dropped the page"
    world.settle()
    assert [moment.outcome for moment in world.history if moment.ends][-2:] == [0, 0]
    world.check()
    world.check_quiescent()


def test_a_fault_waits_for_a_frame_that_a_write_is_about_to_free() -> None:
    world = cached_world(1, clients=3)
    world.access(0, Load(1, 0))
    for client, operation in ((1, Store(2, 0, 7)), (2, Load(3, 1))):
        world.clients[client].threads[0].operations.append(operation)
        world.step(Event("run", client))
        world.step(Event("fault", client))
    world.settle()
    assert [moment.outcome for moment in world.history if moment.ends][-2:] == [None, 0]
    world.check_quiescent()


def test_no_frame_at_all_is_an_error() -> None:
    """An evicted client may still reach the only frame."""
    world = cached_world(1)
    world.access(0, Load(1, 0))
    world.stopped.add(0)
    world.coordinator.protocol_error(world.clients[0].token, ProtocolError("broken on purpose"))
    assert world.access(1, Load(2, 1)) == Failed(errno.ENOMEM)
    world.kill(0)
    assert world.access(1, Load(2, 1)) == 0
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
    for _ in range(3):
        assert world.access(0, Load(1, 0)) == Failed(errno.ENOSPC)
        assert free_frames(world) == 2
        world.check()
    holes._memory = working
    assert world.access(0, Load(1, 0)) == 0
    world.check_quiescent()
