"""What the coordinator remembers: at most 1 KiB for a VMA, and for a file in one extent nothing that grows with it."""

import gc
import tracemalloc

from dax_mp.address_space import pack_pte
from dax_mp.messages import Access, Mmap, Target, Truncate
from simulation.client import PAGE_SIZE
from simulation.world import READ_WRITE, World


def traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def mapped_world() -> World:
    world = World("zero", pmem_pages=64)
    world.add_client()
    world.open(0, "file")
    return world


def test_a_vma_takes_at_most_a_kibibyte_when_all_of_it_is_mapped() -> None:
    world = mapped_world()
    token = world.clients[0].token
    vmas = 1000
    tracemalloc.start()
    try:
        before = traced_bytes()
        for _ in range(vmas):
            world.coordinator.receive_control(token, b"x", Mmap(1, 1, 0, 64, READ_WRITE, 0))
            world.coordinator.take_effects()
        for vma in world.coordinator.sessions[token].vmas.values():
            vma.page_table.set(0, 64, pack_pte(Target.PMEM, 1, Access.READ | Access.WRITE))
        taken = traced_bytes() - before
    finally:
        tracemalloc.stop()
    assert len(world.coordinator.sessions[token].vmas) == vmas
    assert taken / vmas <= 1024, f"{taken / vmas:.0f} bytes a VMA"


def pieces_of(world: World, pages: int) -> tuple[int, int]:
    """Fill a file of so many pages. Returns the pieces of its block map and of the page table of one who maps it."""
    world.call(0, Truncate(0, 1, pages * PAGE_SIZE))
    inode = world.coordinator.fs.names["file"]
    (extent,) = world.coordinator.fs.device.frames.allocate(pages, None)
    inode.block_map.set(0, pages, extent.pfn)
    vma_id = world.map(0, 1, pages)
    vma = world.coordinator.sessions[world.clients[0].token].vmas[vma_id]
    for pgoff in range(pages):
        vma.page_table.set(pgoff, pgoff + 1, pack_pte(Target.PMEM, extent.pfn + pgoff, Access.READ))
    return len(inode.block_map), len(vma.page_table)


def test_a_file_in_one_extent_takes_the_same_however_large_it_is() -> None:
    assert pieces_of(mapped_world(), 1) == pieces_of(mapped_world(), 64) == (1, 1)


def test_a_page_that_nobody_locks_takes_no_memory() -> None:
    world = mapped_world()
    pieces_of(world, 64)
    (inode,) = world.coordinator.fs.inodes.values()
    assert len(inode.entry_locks) == 0
    assert not inode.mapping.i_pages
