"""The invariants that can be read off the state, as assertions. The design document, dax_mp/README.md, has the words.

Called after every event in tests, and with `dax-mp serve --debug`. What only the clients can show (I6, and that I7
holds against what they have really mapped) is checked where clients are simulated.
"""

from collections.abc import Mapping

from dax_mp.address_space import Vma, unpack_pte
from dax_mp.device import FIRST_PFN
from dax_mp.file_system import FileSystem
from dax_mp.frames import FrameAllocator
from dax_mp.inode import Inode
from dax_mp.messages import Access, Target
from dax_mp.ranges import RangeMap
from dax_mp.session import Lease, Session


def validate(fs: FileSystem, sessions: Mapping[bytes, Session]) -> None:
    """Assert every invariant. Raises AssertionError that names the one that is broken."""
    for inode in fs.inodes.values():
        inode.block_map.check()
        inode.unwritten.check()
        for start, end, _ in inode.unwritten:
            assert not any(inode.block_map.pieces(start, end)), f"I8: a page of [{start}, {end}) has two blocks"
        _validate_users(inode, sessions)
        _validate_pins(inode)
        for vma in inode.mapping.i_mmap.values():
            vma.page_table.check()
            if not vma.session.evicted:
                _validate_translations(inode, vma)
    for io_id, lease in fs.leases.items():
        _validate_lease(io_id, lease)
    blocks = [
        (pfn, pfn + end - start)
        for inode in fs.inodes.values()
        for start, end, pfn in (*inode.block_map, *inode.unwritten)
    ]
    _validate_places(fs.device.frames, blocks)
    if fs.device.dram_frames is not None:
        cached = [pfn for inode in fs.inodes.values() for pfn in inode.mapping.i_pages.values()]
        _validate_places(fs.device.dram_frames, [(pfn, pfn + 1) for pfn in cached])


def _validate_users(inode: Inode, sessions: Mapping[bytes, Session]) -> None:
    handles = sum(list(session.handles.values()).count(inode) for session in sessions.values())
    known = handles + len(inode.mapping.i_mmap)
    assert inode.users >= known, f"inode {inode.ino} has {inode.users} users, fewer than its handles and VMAs: {known}"
    assert inode.users or inode.name is not None, f"inode {inode.ino} has neither a user nor a name"


def _validate_translations(inode: Inode, vma: Vma) -> None:
    """I1, I2, I4: what a serving session may have mapped is what the file has there now."""
    truncating = inode.invalidate_lock.exclusive
    where = f"VMA {vma.vma_id} of inode {inode.ino}"
    for start, end, entry in vma.page_table:
        inside = vma.pgoff <= start and end <= vma.end_pgoff
        assert truncating or inside, f"I7: [{start}, {end}) lies outside {where}"
        assert truncating or end <= inode.size_pages, f"I2: {where} maps [{start}, {end}) past the end"
        first = unpack_pte(entry)
        for pgoff in range(start, end):
            pte = first._replace(pfn=first.pfn + (pgoff - start if first.target is not Target.ZERO else 0))
            locked = truncating or inode.entry_locks.held(pgoff)
            block = inode.block_map.get(pgoff)
            if pte.target is Target.PMEM:
                assert block == pte.pfn, f"I1: {where} maps page {pgoff} to block {pte.pfn}, but it is at {block}"
                continue
            assert Access.WRITE not in pte.access, f"I4: {where} may write to a hole page at {pgoff}"
            assert block is None or locked, f"I4: {where} maps a hole page at {pgoff}, which has block {block}"
            if pte.target is Target.DRAM:
                cached = inode.mapping.i_pages.get(pgoff)
                assert cached == pte.pfn or locked, f"I1: {where} maps cache frame {pte.pfn} at {pgoff}, not {cached}"


def _validate_pins(inode: Inode) -> None:
    """I9: what is pinned is there to be reached."""
    for pin_id, (vma, pages) in inode.pins.items():
        where = f"pin {pin_id} of [{pages.start}, {pages.end}) of inode {inode.ino}"
        assert pin_id in vma.session.pins and not vma.session.ended, f"I9: nobody has {where}"
        assert vma.vma_id in inode.mapping.i_mmap and vma.has_all(pages), f"I9: {where} is not in its mapping"
        assert vma.keeps_holes or not any(inode.block_map.gaps(*pages)), f"I9: a page of {where} has no block"
        assert pages.end <= inode.size_pages, f"I9: {where} reaches past the end"


def _validate_lease(io_id: int, lease: Lease) -> None:
    """I10: what is lent is kept from all others."""
    inode, where = lease.inode, f"what is lent as {io_id} of inode {lease.inode.ino}"
    assert lease.session.leases.get(io_id) is lease and not lease.session.ended, f"I10: nobody has {where}"
    locked = inode.rwsem.exclusive if lease.write else inode.rwsem.shared
    assert locked, f"I10: rwsem is not held for {where}"
    for pgoff in lease.locked:
        assert inode.entry_locks.held(pgoff), f"I10: page {pgoff} of {where} is not locked"
    for start, end, pfn in lease.fresh:
        pieces = list(inode.unwritten.pieces(start, end))
        assert pieces == [(start, end, pfn)], f"I10: of {where}, [{start}, {end}) is {pieces} and not at {pfn}"


def _validate_places(frames: FrameAllocator, in_files: list[tuple[int, int]]) -> None:
    """I8: every frame is free, in one file, or in quarantine."""
    places: RangeMap[None] = RangeMap()
    frames.free.check()
    free = [(start, end) for start, end, _ in frames.free]
    frames.quarantine.check()
    quarantined = [(start, end) for start, end, _ in frames.quarantine]
    for start, end in quarantined:
        held = {pfn for low, high in frames.held_parts(start, end - start) for pfn in range(low, high)}
        assert len(held) == end - start, f"a frame of [{start}, {end}) is in quarantine for nobody"
    for start, end in (*free, *quarantined, *in_files):
        assert not any(places.pieces(start, end)), f"I8: a frame of [{start}, {end}) is in two places"
        places.set(start, end, None)
    expected = frames.end_pfn - FIRST_PFN
    assert places.total() == expected, f"I8: {places.total()} frames of {expected} are in some place"
    assert sum(end - start for start, end in free) == frames.free_pages, (
        "I8: free_pages is not the number of free frames"
    )
