"""What a mapping is asked for: the arguments of `DaxFile.mmap`, judged as mmap.mmap and mmap(2) judge theirs."""

import errno
import mmap
from functools import partial
from typing import TYPE_CHECKING, Final

from dax_mp import messages, mmu
from dax_mp.clients.lane import Claim
from dax_mp.clients.mapping import ACCESS_COPY, ACCESS_DEFAULT, ACCESS_READ, ACCESS_WRITE, Mapping
from dax_mp.clients.mapping_cursor import as_c_int
from dax_mp.errors import os_error
from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.messages import Access

if TYPE_CHECKING:
    from dax_mp.clients.handle import Handle

_MAP_TYPE: Final = 0x0F
"""The bits of mmap(2)'s flags that say whether the mapping is shared or private."""

_MAP_NORESERVE: Final = 0x4000
_MAP_NONBLOCK: Final = 0x10000
_MAP_KEPT: Final = (
    _MAP_TYPE
    | mmap.MAP_POPULATE
    | _MAP_NORESERVE  # address space takes no memory here
    | _MAP_NONBLOCK  # MAP_POPULATE maps what is there, and waits for no device
    | mmap.MAP_STACK  # these three mean nothing in Linux either
    | mmap.MAP_DENYWRITE
    | mmap.MAP_EXECUTABLE
)
"""The flags whose meaning is kept. The others of mmap(2) say where the mapping is to be, what its pages are to be, or
that they are never to go (MAP_FIXED, MAP_GROWSDOWN, MAP_HUGETLB, MAP_LOCKED, MAP_SYNC)."""


def map_file(
    handle: "Handle",
    readable: bool,
    writable: bool,
    length: int,
    offset: int,
    access: int,
    past_eof: bool,
    flags: int,
    prot: int,
    trackfd: bool,
    populate: bool,
) -> Mapping:
    """What `DaxFile.mmap` does, and raises, for an open file with these rights.

    The tests are those of mmap.mmap, in its order, then those of mmap(2).
    """
    access, flags, prot = as_c_int(access), as_c_int(flags), as_c_int(prot)
    if length < 0:
        raise OverflowError("memory mapped length must be positive")
    if offset < 0:
        raise OverflowError("memory mapped offset must be positive")
    size_bytes = handle.size_bytes()
    if length == 0:
        if size_bytes == 0:
            raise ValueError("cannot mmap an empty file")
        if offset >= size_bytes:
            raise ValueError("mmap offset is greater than file size")
        length = size_bytes - offset
    elif length + offset > size_bytes and not past_eof:
        raise ValueError("mmap length is greater than file size")
    access = _access_of(access, flags, prot, handle.name)
    if length + offset > OFFSET_BYTES_MAX:
        raise OverflowError("the mapping ends past the largest file offset")
    if not readable or (access == ACCESS_WRITE and not writable):
        raise os_error(errno.EACCES, filename=handle.name)
    page_size = handle.session.page_size
    if offset % page_size:
        raise os_error(errno.EINVAL, f"the offset must be a multiple of the page size, {page_size}", handle.name)
    mapping = _map(handle, offset, length, access, bool(trackfd))
    if flags & mmap.MAP_POPULATE:
        mapping.madvise(mmap.MADV_WILLNEED)
    if populate:
        try:
            mapping.populate(0, max(0, min(length, size_bytes - offset)))
        except BaseException:
            mapping.close()
            raise
    return mapping


def _access_of(access: int, flags: int, prot: int, name: str) -> int:
    """What mmap.mmap's `access`, or its `flags` and `prot`, come to: ACCESS_READ, ACCESS_WRITE or ACCESS_COPY.

    Raises ValueError as mmap.mmap, OSError as mmap(2).
    """
    if access != ACCESS_DEFAULT:
        if flags != mmap.MAP_SHARED or prot != mmap.PROT_READ | mmap.PROT_WRITE:
            raise ValueError("mmap can't specify both access and flags, prot.")
        if access not in (ACCESS_READ, ACCESS_WRITE, ACCESS_COPY):
            raise ValueError("mmap invalid access parameter.")
        return access
    kind = flags & _MAP_TYPE
    if kind not in (mmap.MAP_SHARED, mmap.MAP_PRIVATE, mmap.MAP_SHARED | mmap.MAP_PRIVATE):
        raise os_error(errno.EINVAL, "the flags say neither MAP_SHARED nor MAP_PRIVATE", name)
    if flags & mmap.MAP_ANONYMOUS:
        raise os_error(errno.EINVAL, "the mapping of a file is not anonymous", name)
    if refused := flags & ~_MAP_KEPT:
        raise os_error(errno.EOPNOTSUPP, f"what the flags {refused:#x} of mmap(2) ask for cannot be had here", name)
    if prot & mmap.PROT_EXEC:
        raise os_error(errno.EPERM, "the device holds data, not programs", name)
    if not prot & mmap.PROT_WRITE:
        return ACCESS_READ
    return ACCESS_COPY if kind == mmap.MAP_PRIVATE else ACCESS_WRITE


def _map(handle: "Handle", offset: int, length: int, access: int, trackfd: bool) -> Mapping:
    """The VMA's number is on the claim until the mapping has it, which tells the coordinator of its own end."""
    claim = Claim(messages.Munmap)
    mapping = Mapping.__new__(Mapping)
    mmu.settled(partial(_settle_map, handle, claim, mapping), _acquire, handle, claim, mapping, offset, length, access)
    mapping.trackfd = trackfd
    return mapping


def _acquire(handle: "Handle", claim: Claim, mapping: Mapping, offset: int, length: int, access: int) -> None:
    page_size = handle.session.page_size
    vma_access = Access.READ | Access.WRITE if access == ACCESS_WRITE else Access.READ
    vma_id = handle.session.channel.acquire(
        claim,
        messages.Mmap,
        handle.number,
        offset // page_size,
        -(-length // page_size),
        int(vma_access),
        int(access == ACCESS_COPY),
        filename=handle.name,
    )
    Mapping.__init__(mapping, handle, vma_id, offset, length, access)


def _settle_map(handle: "Handle", claim: Claim, mapping: Mapping, failed: bool) -> None:
    if not failed:
        return
    if not mapping.closed:
        mmu.Window.close(mapping)
        claim.number = None
    elif claim.number is not None:
        handle.session.channel.holdings.closed_vmas.append(claim.number)
        claim.number = None
    handle.session.channel.post_released()
