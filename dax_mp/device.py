"""The device: the PMem region's frames and bytes, and what holes are read from.

Blocks and pages are the same size, the system's page size, as DAX asks of a file system.
"""

from collections.abc import Iterable, Iterator
from typing import Final, Literal

from dax_mp.frames import FrameAllocator
from dax_mp.hole_pages import HolePolicy, PageCache, ZeroPage
from dax_mp.inode import Inode
from dax_mp.memory import Memory
from dax_mp.ranges import Extent

HolePolicyName = Literal["zero", "page-cache"]

FIRST_PFN: Final = 1
"""Frame 0 of a region is its superblock; no file ever has it."""


class Device:
    """A PMem device.

    page_size: in bytes. pmem, pmem_pages: the PMem region's memory, and how many frames it has for files, from
    FIRST_PFN on. dram, dram_pages: likewise the DRAM region, for the "page-cache" hole policy; None and 0 with "zero".
    """

    def __init__(
        self,
        page_size: int,
        pmem: Memory,
        pmem_pages: int,
        hole_policy: HolePolicyName = "zero",
        dram: Memory | None = None,
        dram_pages: int = 0,
    ) -> None:
        self.page_size = page_size
        self.pmem = pmem
        self.pmem_pages = pmem_pages
        self.dram_pages = dram_pages
        self.hole_policy_name = hole_policy
        self.frames = FrameAllocator(FIRST_PFN, FIRST_PFN + pmem_pages)
        self.holes: HolePolicy = ZeroPage()
        self.dram_frames: FrameAllocator | None = None
        if hole_policy == "page-cache":
            assert dram is not None and dram_pages > 0, "the page cache needs a DRAM region"
            self.dram_frames = FrameAllocator(FIRST_PFN, FIRST_PFN + dram_pages)
            self.holes = PageCache(self.dram_frames, dram, page_size)

    def release(self, extents: list[Extent]) -> None:
        """Give blocks back; see FrameAllocator.release."""
        self.frames.release(extents)

    def hold(self, token: bytes, pmem: Iterable[Extent], dram: Iterable[Extent]) -> None:
        """The session `token` is evicted, and its process may reach these frames of the two regions."""
        self.frames.hold(token, pmem)
        if self.dram_frames is not None:
            self.dram_frames.hold(token, dram)

    def holder_gone(self, token: bytes) -> None:
        """An evicted session can reach nothing any more: what only it held back is free."""
        self.frames.holder_gone(token)
        if self.dram_frames is not None:
            self.dram_frames.holder_gone(token)

    def zero_extent(self, extent: Extent) -> None:
        """Zero the frames. Raises OSError ENOSPC where a sparse region's backing is full."""
        self.pmem.zero(extent.pfn * self.page_size, extent.length_pages * self.page_size)

    def _blocks(self, inode: Inode, offset_bytes: int, end_bytes: int) -> Iterator[tuple[int, int, int]]:
        """The parts of the byte range that have blocks: (offset, end, offset in the region) each."""
        pages = inode.pages_of(offset_bytes, end_bytes)
        for start, end, pfn in inode.block_map.pieces(*pages):
            low = max(start * self.page_size, offset_bytes)
            high = min(end * self.page_size, end_bytes)
            yield low, high, (pfn - start) * self.page_size + low

    def _address_of(self, inode: Inode, offset_bytes: int, end_bytes: int) -> int | None:
        """Where these bytes lie in the region, if they lie together: most often they do, and it is quickly found."""
        pages = inode.pages_of(offset_bytes, end_bytes)
        pfn = inode.block_map.covering(*pages)
        return None if pfn is None else (pfn - pages.start) * self.page_size + offset_bytes

    def zero_bytes(self, inode: Inode, offset_bytes: int, end_bytes: int) -> None:
        """Zero the bytes of the range that have blocks; the others read as zero anyway."""
        for low, high, address in self._blocks(inode, offset_bytes, end_bytes):
            self.pmem.zero(address, high - low)

    def read_bytes(self, inode: Inode, offset_bytes: int, end_bytes: int) -> bytes:
        """The bytes of the range, zero where there is a hole."""
        address = self._address_of(inode, offset_bytes, end_bytes)
        if address is not None:
            return self.pmem.read(address, end_bytes - offset_bytes)
        parts: list[bytes] = []
        for low, high, address in self._blocks(inode, offset_bytes, end_bytes):
            if offset_bytes < low:
                parts.append(bytes(low - offset_bytes))
            parts.append(self.pmem.read(address, high - low))
            offset_bytes = high
        if offset_bytes < end_bytes:
            parts.append(bytes(end_bytes - offset_bytes))
        return b"".join(parts)

    def write_bytes(self, inode: Inode, offset_bytes: int, data: bytes) -> None:
        """Store the bytes. Precondition: the whole range has blocks."""
        address = self._address_of(inode, offset_bytes, offset_bytes + len(data))
        if address is not None:
            self.pmem.write(address, data)
            return
        written_bytes = self.overwrite_bytes(inode, offset_bytes, data)
        assert written_bytes == len(data), f"{len(data) - written_bytes} bytes of a write had no block"

    def overwrite_bytes(self, inode: Inode, offset_bytes: int, data: bytes) -> int:
        """Store those of the bytes that fall on blocks. Returns how many."""
        view = memoryview(data)
        written_bytes = 0
        for low, high, address in self._blocks(inode, offset_bytes, offset_bytes + len(data)):
            self.pmem.write(address, view[low - offset_bytes : high - offset_bytes])
            written_bytes += high - low
        return written_bytes
