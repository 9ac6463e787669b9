"""The hard bugs of Linux's DAX, B1 to B28, played again: faults, hole pages and locks.

`test_linux_bugs_cuts.py` has those of truncate, punch and pins, and `e2e/test_linux_bugs.py` those that show in real
memory alone.

Each docstring says what Linux did wrong, with the commit that put it right, and what would be seen here. The orders are
told one by one, with operations held at a step (`dax_mp/delays.py`); `test_exhaustive.py` goes through all orders of
some of them, and `test_mutations.py` puts some of the bugs back.
"""

import re
from pathlib import Path
from typing import Final

import pytest

from dax_mp.device import HolePolicyName
from dax_mp.messages import Fsync, Map, Mmap, Munmap, Read, Truncate, Unmap, Write
from simulation.client import PAGE_SIZE, Failed
from simulation.scene import Scene
from simulation.world import read_page, write_page

P: Final = PAGE_SIZE
FILE: Final = Scene.handle

WITHOUT_MEANING: Final = {
    13: "fsync cleaned a tag while a fault made the page writable (4b4bb46d00b3): there is no dirty tracking (I5)",
    14: "a huge page stayed writable after fsync (f729c8c9b24f): fsync has nothing to write back, and protects nothing",
    16: "4 KiB of a huge page were flushed (e583b5c472bd): stores go to the medium itself, and nothing is flushed",
    26: "a journal, or data within the inode, and DAX owned the same bytes: a file's bytes are in its blocks alone",
}
"""The bugs that cannot be had here, and why."""

policies = pytest.mark.parametrize("policy", ["zero", "page-cache"])


def test_each_bug_has_a_test_or_a_reason() -> None:
    tests = Path(__file__).parent.parent
    sources = [tests / "sim" / "test_linux_bugs.py", tests / "sim" / "test_linux_bugs_cuts.py"]
    sources.append(tests / "e2e" / "test_linux_bugs.py")
    tested = {
        int(number) for source in sources for number in re.findall(r"^def test_b(\d+)_", source.read_text(), re.M)
    }
    assert tested | set(WITHOUT_MEANING) == set(range(1, 29))
    assert not tested & set(WITHOUT_MEANING)


@policies
def test_b1_write_to_a_hole_that_is_mapped(policy: HolePolicyName) -> None:
    """The readers' page tables were not invalidated by write(2), and showed zeroes for good (cd656375f946)."""
    scene = Scene(3, policy=policy)
    assert [scene.load(client) for client in range(3)] == [0, 0, 0]
    scene.call(0, write_page(FILE, 0, 7))
    assert [scene.load(client) for client in range(3)] == [7, 7, 7]
    scene.end()


@policies
def test_b2_a_fault_that_has_not_looked_yet_and_a_write(policy: HolePolicyName) -> None:
    """The fault looked up the block before it took the entry lock; a write came between, found nothing to unmap, and
    the fault mapped the hole page for good (2017-05-10 series). Here the write waits until the fault has its Map."""
    scene = Scene(policy=policy)
    with scene.held("fault.entry_locked"):
        load = scene.begin_load(0)
        write = scene.begin(1, write_page(FILE, 0, 7))
        assert load.waits and write.waits
    assert (load.outcome, write.waits) == (0, False)
    assert scene.load(0) == 7
    scene.end()


def test_b3_a_page_leaves_the_cache_while_it_is_mapped() -> None:
    """drop_caches took the entry away and left the mappings: the next write found nothing to unmap (4636e70bb0a8).
    Here reclaim, which needs the frame, has the page unmapped first."""
    scene = Scene(policy="page-cache", dram_pages=1)
    assert scene.load(0, 0) == 0
    assert scene.load(1, 1) == 0
    assert 0 not in scene.file.mapping.i_pages
    assert not scene.maps(0, 0)
    scene.store(1, 0, 7)
    assert scene.load(0, 0) == 7
    scene.end()


@policies
def test_b4_a_fault_between_the_allocation_and_the_invalidation(policy: HolePolicyName) -> None:
    """The range was invalidated before the block was allocated, and a fault brought the hole page back (e3fce68cdbed).
    Here the allocation is first, and faults wait until all have dropped the hole page and the data is there."""
    scene = Scene(3, policy=policy)
    scene.load(0)
    with scene.held("write.before_copy"), scene.held("fill.allocated"):
        write = scene.begin(1, write_page(FILE, 0, 7))
        assert scene.maps(0, 0), "unmapped before there is a block"
        load = scene.begin_load(2)
        assert write.waits and load.waits
    assert load.outcome == 7
    assert scene.load(0) == 7
    scene.end()


def test_b5_a_store_and_a_write_to_the_same_block() -> None:
    """write(2) dropped the dirty entry of a block that had been stored to, and fsync did not flush the stored bytes
    (c6dcf52c23d2). Here they are in the file however their process ends."""
    scene = Scene()
    scene.store(0, 0, 7)
    scene.call(1, Write(0, FILE, P // 2, 0, b"written"))
    scene.call(1, Fsync(0, FILE))
    scene.world.kill(0)
    assert scene.call(1, Read(0, FILE, 0, 8)) == (7).to_bytes(8, "little")
    assert scene.call(1, Read(0, FILE, P // 2, 7)) == b"written"


@policies
@pytest.mark.parametrize("step", ["fault.entry_locked", "fault.block_allocated", "fault.before_map"])
def test_b6_two_write_faults_on_one_hole(policy: HolePolicyName, step: str) -> None:
    """The loser zeroed the block after the winner had stored to it (843172978bb9). Here the second one finds the block,
    at whichever step the first one is."""
    scene = Scene(3, policy=policy)
    scene.load(2)
    with scene.held(step):
        winner, loser = scene.begin_store(0, 0, 7), scene.begin_store(1, 0, 8)
        scene.world.stopped.add(1)  # its fault is served, and its store is later
        assert winner.waits and loser.waits
    assert winner.outcome is None
    assert loser.waits
    assert [scene.load(0), scene.load(2)] == [7, 7]
    scene.world.stopped.clear()
    scene.go_on()
    assert [scene.load(client) for client in range(3)] == [8, 8, 8]
    assert scene.file.block_map.total() == 1
    scene.end()


@policies
def test_b6_a_write_fault_that_comes_after_the_first_store(policy: HolePolicyName) -> None:
    """The same race, where the second fault is on its way while the first one is served."""
    scene = Scene(policy=policy)
    loser = scene.send_fault(1, scene.store_to(1, 0, 8))
    scene.world.stopped.add(1)
    assert scene.store(0, 0, 7) is None
    scene.go_on()
    assert not scene.world.clients[1].pager_requests, "the second fault is not served"
    assert loser.waits
    assert scene.load(0) == 7
    scene.world.stopped.clear()
    scene.go_on()
    assert scene.load(0) == 8
    scene.end()


@policies
@pytest.mark.parametrize("step", ["fault.block_allocated", "fault.before_map"])
def test_b7_a_fault_that_allocates_keeps_nobody_else_waiting(policy: HolePolicyName, step: str) -> None:
    """The cure of B6 held the lock of the rmap while the file system allocated: deadlocks, and one fault at a time
    (0f90cc6609c7, which took it back). Here one page is locked, and not the file's list of VMAs."""
    scene = Scene(3, policy=policy)
    scene.load(2)
    with scene.held(step):
        slow = scene.begin_store(0, 0, 7)
        scene.pass_by(step)
        assert [scene.load(1, 1), scene.store(1, 2, 8), scene.load(2, 2)] == [0, None, 8]
        scene.call(1, Munmap(0, scene.call(1, Mmap(0, FILE, 0, 4, 3, 0))))
        scene.call(1, write_page(FILE, 3, 9))
        scene.call(1, read_page(FILE, 0))
        truncate = scene.begin(2, Truncate(0, FILE, 0))
        assert slow.waits and truncate.waits
    assert not truncate.waits
    scene.end()


@policies
def test_b8_three_readers_wait_for_one_hole(policy: HolePolicyName) -> None:
    """The entry that they waited for was replaced by a page, one of them was woken, and the third slept for good
    (965d004af540)."""
    scene = Scene(4, policy=policy)
    with scene.held("fault.entry_locked"):
        loads = [scene.begin_load(client) for client in range(3)]
        store = scene.begin_store(3, 0, 7)
        assert all(load.waits for load in loads)
    assert [load.outcome for load in loads] == [0, 0, 0]
    assert store.outcome is None
    assert [scene.load(client) for client in range(3)] == [7, 7, 7]
    scene.end()


@policies
@pytest.mark.parametrize("how", ["store", "write"])
def test_b9_the_writer_has_never_mapped_the_hole(policy: HolePolicyName, how: str) -> None:
    """Whether to unmap was asked of the writer's own page table, and the readers kept the zero page (2015-08-04)."""
    scene = Scene(3, policy=policy)
    scene.load(0)
    if how == "store":
        scene.store(1, 0, 7)
    else:
        scene.call(1, write_page(FILE, 0, 7))
    assert not scene.maps(0, 0)
    assert scene.load(0) == 7
    scene.end()


@policies
def test_b10_a_read_fault_in_what_a_write_fault_allocates_ahead(policy: HolePolicyName) -> None:
    """A huge write fault and a small read fault locked different entries, and the reader kept a hole page over the
    block. Here a fault that allocates ahead locks each of its pages."""
    scene = Scene(3, pages=8, policy=policy, pmem_pages=600)
    scene.load(0, 5)
    for page in (0, 1):  # the second one takes page 2 as well, and the next, to page 3, four pages
        scene.store(1, page, page + 1)
    with scene.held("fault.block_allocated"):
        store = scene.begin_store(1, 3, 4)
        assert scene.file.block_map.get(4) is not None, "it does not allocate ahead"
        load = scene.begin_load(2, 4)
        assert store.waits and load.waits
    assert load.outcome == 0
    for page in (4, 5):
        scene.store(1, page, page + 1)
    assert [scene.load(2, 4), scene.load(0, 5)] == [5, 6], "a reader has a hole page where there is a block"
    scene.end()


@policies
def test_b12_a_large_map_and_a_small_write_fault(policy: HolePolicyName) -> None:
    """A huge entry and a small one collided in one place of the tree (e2093926a098). Here a Map of all that lies around
    a fault leaves out the page that a write fault is filling: the acknowledgement of that one's Unmap, which lies
    before the Map in the channel, would take the page out of the rmap."""
    scene = Scene(3, policy=policy)
    for page in (0, 2, 3):
        scene.store(0, page, 10 + page)
    scene.load(2, 1)
    scene.world.clients[2].windows[scene.vmas[2]].unmap(0, 1, even_cows=False)
    scene.world.stopped.add(2)
    store = scene.begin_store(1, 1, 11)
    load = scene.send_fault(2, scene.load_from(2, 0))
    scene.go_on()
    assert store.waits
    assert [type(order) for order in scene.world.clients[2].pager_orders] == [Unmap, Map]
    scene.world.stopped.clear()
    scene.go_on()
    assert (store.outcome, load.outcome) == (None, 10)
    assert [scene.load(2, page) for page in range(4)] == [10, 11, 12, 13]
    scene.end()


@policies
@pytest.mark.parametrize("step", ["fault.entry_locked", "fault.block_allocated", "fault.before_map"])
def test_b17_many_wait_for_one_page(policy: HolePolicyName, step: str) -> None:
    """Of many that waited for one entry to be invalidated the first was woken, and the rest hung (23c84eb78375,
    237388320def). Here faults of both kinds, a write and, in the page cache, a reclaim come to an end."""
    scene = Scene(6, policy=policy, dram_pages=1)
    scene.load(5)
    with scene.held(step):
        first = scene.begin_store(0, 0, 7)
        faults = [scene.begin_load(client) for client in (1, 2)] + [scene.begin_store(3, 0, 7)]
        write = scene.begin(4, write_page(FILE, 0, 7))
        other = scene.begin_load(5, 1)
        assert first.waits and write.waits and all(fault.waits for fault in faults)
    assert [fault.waits for fault in (*faults, first, write, other)] == [False] * 6
    assert all(not isinstance(fault.outcome, Failed) for fault in faults)
    assert [scene.load(client) for client in range(6)] == [7] * 6
    scene.end()


@policies
def test_b27_a_map_does_not_take_rights_away(policy: HolePolicyName) -> None:
    """An entry that was put in over another one changed its protection (c6f3c5ee40c1). Here the Map for a read fault
    takes in its neighbours: what could be written can be written, and what could not cannot."""
    scene = Scene(policy=policy)
    for page in (0, 1, 3):
        scene.store(0, page, page + 1)
    window = scene.world.clients[0].windows[scene.vmas[0]]
    read_only = scene.world.map(0, FILE, 4, access=1)
    del window.translations[1], window.translations[3]
    assert scene.load(0, 1) == 2
    assert {
        page: translation.access for page, translation in window.translations.items() if page != 2
    } == dict.fromkeys((0, 1, 3), 3)
    assert scene.load(0, 1, vma=read_only) == 2
    accesses = [translation.access for translation in scene.world.clients[0].windows[read_only].translations.values()]
    assert accesses and set(accesses) == {1}
    scene.end()


def test_b28_a_page_comes_into_the_cache_while_a_fault_waits_for_a_frame() -> None:
    """An insertion dropped the lock to get memory, and another one put an entry in at the same place. Here a fault that
    waits for a frame of the page cache keeps its page locked."""
    scene = Scene(4, policy="page-cache", dram_pages=1)
    scene.load(0, 0)
    scene.world.stopped.add(0)  # its frame is wanted, and it does not answer yet
    load = scene.begin_load(1, 1)
    store = scene.begin_store(2, 1, 7)
    other = scene.begin_load(3, 1)
    assert load.waits and store.waits and other.waits
    assert scene.file.block_map.get(1) is None
    scene.world.stopped.clear()
    scene.go_on()
    assert (load.outcome, store.outcome) == (0, None)
    assert other.outcome == 7
    assert scene.load(1, 1) == 7
    scene.end()
