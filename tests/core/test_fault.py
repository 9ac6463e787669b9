"""Faults: the two windows, what a Map has, and how many faults a file takes."""

import errno
from typing import Any

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.coordinator import Coordinator
from dax_mp.device import Device, HolePolicyName
from dax_mp.effects import Effect, SendControl, SendPager
from dax_mp.fault import handle_fault
from dax_mp.limits import MAP_WINDOW_BYTES, SEGMENTS_MAX
from dax_mp.messages import (
    PROTOCOL_VERSION,
    Access,
    ControlRequest,
    Extents,
    Fallocate,
    Fault,
    FaultError,
    Map,
    Mmap,
    Open,
    PagerHello,
    PagerOrder,
    Reply,
    Target,
    Truncate,
    Unmap,
    UnmapAck,
)
from simulation.client import PAGE_SIZE, Load, Store, Window
from simulation.world import READ_WRITE, World, write_page

REAL_PAGE_SIZE = 4096
WINDOW_PAGES = MAP_WINDOW_BYTES // REAL_PAGE_SIZE
TOKEN = b"t" * 16


class NoMemory:
    """A region whose bytes do not matter."""

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        pass

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        return bytes(length_bytes)

    def write(self, offset_bytes: int, data: bytes | memoryview) -> None:
        pass


class OnePager:
    """A coordinator with pages of a real size, and one client whose pager does as it is told at once."""

    def __init__(self, pmem_pages: int, file_pages: int, vma_pages: int = 0, policy: HolePolicyName = "zero") -> None:
        device = Device(REAL_PAGE_SIZE, NoMemory(), pmem_pages, policy, NoMemory(), 4096)
        self.coordinator = Coordinator(device, 1.0)
        self.orders: list[PagerOrder] = []
        self.coordinator.session_opened(TOKEN, 1)
        self.coordinator.receive_pager(TOKEN, PagerHello(PROTOCOL_VERSION))
        self.request(Open(0, "file", 1))
        self.request(Truncate(0, 1, file_pages * REAL_PAGE_SIZE))
        vma_pages = vma_pages or file_pages
        vma_id = self.request(Mmap(0, 1, 0, vma_pages, READ_WRITE, 0))
        self.window = Window(vma_id, 0, vma_pages)
        self.faults = 0

    def request(self, request: ControlRequest) -> Any:
        self.coordinator.receive_control(TOKEN, TOKEN + b"c", request)
        answers = [e.message for e in self._effects() if isinstance(e, SendControl)]
        assert len(answers) == 1 and isinstance(answers[0], Reply), f"{request} was answered by {answers}"
        return answers[0].value

    def _effects(self) -> list[Effect]:
        done: list[Effect] = []
        while effects := self.coordinator.take_effects():
            for effect in effects:
                if isinstance(effect, SendPager):
                    self._order(effect.message)
            done += effects
        return done

    def _order(self, order: PagerOrder) -> None:
        self.orders.append(order)
        if isinstance(order, Map):
            assert len(order.segments) <= 5 * SEGMENTS_MAX
            for at in range(0, len(order.segments), 5):
                self.window.map(*order.segments[at : at + 5])
        elif isinstance(order, Unmap):
            for at in range(0, len(order.ranges), 3):
                _, pgoff, length_pages = order.ranges[at : at + 3]
                self.window.unmap(pgoff, length_pages)
            self.coordinator.receive_pager(TOKEN, UnmapAck(order.request_id))

    def touch(self, pgoff: int, write: bool) -> None:
        """Access a page, with a fault if it takes one."""
        translation = self.window.translations.get(pgoff)
        if translation is None or (write and not translation.access & Access.WRITE):
            self.faults += 1
            self.coordinator.receive_pager(TOKEN, Fault(self.faults, self.window.vma_id, pgoff, int(write)))
            self._effects()
        translation = self.window.translations[pgoff]
        assert translation.access & (Access.WRITE if write else Access.READ)

    def reach_all(self, pages: int) -> None:
        """Let the file have all its blocks in one extent."""
        inode = self.coordinator.fs.names["file"]
        for extent in self.coordinator.fs.device.frames.allocate(pages, None):
            inode.block_map.set(0, pages, extent.pfn)


def test_a_gibibyte_that_is_there_takes_512_faults() -> None:
    pages = (1 << 30) // REAL_PAGE_SIZE
    pager = OnePager(pages, pages)
    pager.reach_all(pages)
    for pgoff in range(0, pages, 64):
        pager.touch(pgoff, write=False)
    assert pager.faults == 512
    assert len(pager.window.translations) == pages
    (vma,) = pager.coordinator.sessions[TOKEN].vmas.values()
    assert len(vma.page_table) == 1


@pytest.mark.parametrize("backwards", [False, True])
def test_a_gibibyte_of_hole_takes_512_faults_of_the_zero_page(backwards: bool) -> None:
    pages = (1 << 30) // REAL_PAGE_SIZE
    pager = OnePager(16, pages)
    for pgoff in range(0, pages, 128)[:: -1 if backwards else 1]:
        pager.touch(pgoff, write=False)
    assert pager.faults == 512
    assert pager.coordinator.fs.device.frames.free_pages == 16


def test_the_window_is_aligned_and_ends_with_the_vma_and_the_file() -> None:
    pager = OnePager(16, file_pages=3 * WINDOW_PAGES // 2, vma_pages=4 * WINDOW_PAGES)
    pager.touch(WINDOW_PAGES - 1, write=False)
    assert sorted(pager.window.translations) == list(range(WINDOW_PAGES))
    pager.touch(WINDOW_PAGES, write=False)
    assert sorted(pager.window.translations) == list(range(3 * WINDOW_PAGES // 2))


def test_a_lone_write_takes_one_block() -> None:
    pager = OnePager(4096, 2048)
    for pgoff in (100, 700, 300):
        pager.touch(pgoff, write=True)
    assert pager.coordinator.fs.device.frames.free_pages == 4096 - 3


def test_a_file_written_in_sequence_is_allocated_ahead_by_doubling() -> None:
    pages = 4096
    pager = OnePager(64 * pages, pages)
    at, taken = 0, []
    while at < pages:
        free = pager.coordinator.fs.device.frames.free_pages
        pager.touch(at, write=True)
        taken.append(free - pager.coordinator.fs.device.frames.free_pages)
        at += taken[-1]
    assert taken == [1, 2, 4, 8, 16, 32, 64, 128, 256, *[WINDOW_PAGES] * 7, 1]
    assert at == pages, "allocated past the end of the file"
    assert pager.request(Extents(0, 1, 0)) == [0, pages, 1], "the file lies in one extent"


def test_allocation_ahead_takes_little_of_what_is_free() -> None:
    pager = OnePager(256, 4096)
    for pgoff in range(256):
        pager.touch(pgoff, write=True)
    assert pager.faults > 64
    with pytest.raises(KeyError):  # no block is free, so there is no translation
        pager.touch(256, write=True)


def test_allocation_ahead_stops_before_a_block_a_locked_page_and_the_end_of_the_vma() -> None:
    pager = OnePager(4096, 2048, vma_pages=40)
    inode = pager.coordinator.fs.names["file"]
    pager.touch(10, write=True)
    for pgoff in range(7):
        pager.touch(pgoff, write=True)  # 1, 2 and 4 pages
    pager.touch(7, write=True)  # would be 8
    assert list(inode.block_map.gaps(0, 20)) == [(11, 20)]
    assert inode.entry_locks.try_acquire(16)
    pager.touch(11, write=True)
    pager.touch(12, write=True)
    pager.touch(14, write=True)
    assert list(inode.block_map.gaps(0, 20)) == [(16, 20)]
    inode.entry_locks.release(16)
    for pgoff in range(16, 40):
        pager.touch(pgoff, write=True)
    assert list(inode.block_map.gaps(0, 60)) == [(40, 60)]


def test_a_map_has_the_fault_and_at_most_the_segments_that_fit() -> None:
    """Every second page is a block: 512 segments around the fault, of which the nearest are sent."""
    pager = OnePager(1024, WINDOW_PAGES)
    for pgoff in range(0, WINDOW_PAGES, 2):
        pager.touch(pgoff, write=True)
    pager.window.translations.clear()
    pager.coordinator.sessions[TOKEN].vmas[pager.window.vma_id].page_table.clear(0, WINDOW_PAGES)
    pager.touch(255, write=False)
    assert len(pager.window.translations) == SEGMENTS_MAX
    assert set(pager.window.translations) == set(range(255 - SEGMENTS_MAX // 2, 255 + SEGMENTS_MAX // 2))
    pager.touch(0, write=False)
    pager.touch(WINDOW_PAGES - 1, write=False)
    assert {0, WINDOW_PAGES - 1} <= set(pager.window.translations)


def test_what_is_mapped_already_is_not_mapped_again() -> None:
    world = World("zero", pmem_pages=8)
    world.add_client()
    handle = world.open(0, "file")
    world.call(0, Truncate(0, handle, 6 * PAGE_SIZE))
    vma_id = world.map(0, handle, 6)
    world.access(0, Load(vma_id, 0))
    world.call(0, write_page(handle, 3, 5))
    world.clients[0].threads[0].operations.append(Load(vma_id, 3))
    run, fault, order = "run", "fault", "order"
    for kind in (run, fault):
        world.step(next(event for event in world.events() if event.kind == kind))
    (map_order,) = world.clients[0].pager_orders
    assert isinstance(map_order, Map)
    assert map_order.segments[:2] == [3, 1]
    world.step(next(event for event in world.events() if event.kind == order))
    world.check()


def test_what_the_client_has_dropped_by_itself_is_mapped_again() -> None:
    pager = OnePager(64, 64)
    for pgoff in range(64):
        pager.touch(pgoff, write=True)
    pager.window.translations.clear()
    before = pager.faults
    for pgoff in range(64):
        pager.touch(pgoff, write=True)
    assert pager.faults == before + 1


def test_a_read_only_vma_maps_blocks_read_only() -> None:
    world = World("zero", pmem_pages=8)
    world.add_client()
    handle = world.open(0, "file")
    world.call(0, write_page(handle, 0, 5))
    vma_id = world.map(0, handle, 1, access=int(Access.READ))
    assert world.access(0, Load(vma_id, 0)) == 5
    assert world.clients[0].windows[vma_id].translations[0].access == Access.READ


def test_a_vma_that_may_write_maps_blocks_writable_at_the_first_read() -> None:
    world = World("zero", pmem_pages=8)
    world.add_client()
    handle = world.open(0, "file")
    world.call(0, write_page(handle, 0, 5))
    vma_id = world.map(0, handle, 1)
    world.access(0, Load(vma_id, 0))
    faults = world.coordinator.fs.counters["faults"]
    world.access(0, Store(vma_id, 0, 6))
    assert world.coordinator.fs.counters["faults"] == faults


@pytest.mark.parametrize("policy", ["zero", "page-cache"])
def test_a_page_that_was_read_first_is_written(policy: HolePolicyName) -> None:
    pager = OnePager(64, 64, policy=policy)
    pager.touch(5, write=False)
    target = {"zero": Target.ZERO, "page-cache": Target.DRAM}[policy]
    assert pager.window.translations[5].target == target
    pager.touch(5, write=True)
    assert pager.window.translations[5].target == Target.PMEM
    pager.coordinator._debug = True
    pager.coordinator._settle()


def test_a_bus_error_past_the_end_is_for_the_rest_of_the_vma() -> None:
    pager = OnePager(16, file_pages=3, vma_pages=10)
    pager.coordinator.receive_pager(TOKEN, Fault(9, pager.window.vma_id, 4, 1))
    pager._effects()
    assert pager.orders[-1:] == [FaultError(9, pager.window.vma_id, 4, 6, errno.EFAULT)]


def test_a_fault_that_ends_gives_everything_back() -> None:
    """Its user of the inode, its place among the session's faults, its locks; whether it can be answered or not."""
    pager = OnePager(1, file_pages=3, vma_pages=10)
    session = pager.coordinator.sessions[TOKEN]
    (vma,) = session.vmas.values()
    users = vma.inode.users
    for pgoff, write in ((0, 1), (1, 1), (2, 0), (5, 0)):  # a hole filled, no space, a hole, past the end
        for _ in handle_fault(pager.coordinator.fs, vma, Fault(1, vma.vma_id, pgoff, write)):
            raise AssertionError("nothing to wait for")
        assert (session.faults, vma.inode.users, len(vma.inode.entry_locks)) == (0, users, 0)
        assert vma.inode.invalidate_lock.idle


def test_punching_a_file_that_is_mapped_in_one_piece_asks_for_one_range() -> None:
    pager = OnePager(1024, 1024)
    pager.reach_all(1024)
    pager.touch(0, write=False)
    pager.touch(600, write=False)
    pager.request(Fallocate(0, 1, PUNCH_HOLE, 0, 1024 * REAL_PAGE_SIZE))
    assert [order.ranges for order in pager.orders if isinstance(order, Unmap)] == [[pager.window.vma_id, 0, 1024]]


def test_a_bus_error_on_a_full_device_is_for_the_rest_of_the_hole() -> None:
    pager = OnePager(16, file_pages=12, vma_pages=10)
    pager.touch(0, write=True)
    pager.touch(7, write=True)
    rest = pager.request(Open(0, "rest", 1))[0]
    for unwritten_pages in (0, 1):
        if unwritten_pages:  # they are no part of the hole: a store there finds space
            pager.request(Truncate(0, rest, 0))
            pager.request(Fallocate(0, 1, 0, 5 * REAL_PAGE_SIZE, REAL_PAGE_SIZE))
        free_pages = pager.coordinator.fs.device.frames.free_pages
        pager.request(Fallocate(0, rest, 0, 0, free_pages * REAL_PAGE_SIZE))
        pager.coordinator.receive_pager(TOKEN, Fault(9, pager.window.vma_id, 2, 1))
        pager._effects()
        length_pages = 3 if unwritten_pages else 5
        assert pager.orders[-1:] == [FaultError(9, pager.window.vma_id, 2, length_pages, errno.ENOSPC)]
