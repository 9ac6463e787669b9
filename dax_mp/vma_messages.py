"""The messages of the control sockets about a process's VMAs: mmap(2), munmap(2), mremap(2), pins and forks.

A VMA is known by the id that the coordinator gave it. Ranges are in pages of the file, pgoff, not of the VMA.
"""

from typing import NamedTuple

from dax_mp import schema


@schema.register(47, schema.U32, schema.UINT, schema.UINT, schema.UINT, 3, 1)
class Mmap(NamedTuple):
    """access: Access. private: stores are copy-on-write in the process (MAP_PRIVATE), and `access` is READ.

    Reply: the VMA's id. EBADF, EINVAL, ENOMEM (too many VMAs).
    """

    request_id: int
    handle: int
    pgoff: int
    length_pages: int
    access: int
    private: int


@schema.register(99, schema.U32, schema.UINT)
class Msync(NamedTuple):
    """Reply: None, when all that was stored through the VMA is as durable as the region is; it counts as of now.

    EINVAL.
    """

    request_id: int
    vma_id: int


@schema.register(48, schema.U32, schema.UINT)
class Munmap(NamedTuple):
    """The process has dropped every translation of the VMA and ignores any that is on its way. Reply: None. EINVAL."""

    request_id: int
    vma_id: int


@schema.register(58, schema.U32, schema.UINT, schema.UINT)
class Mremap(NamedTuple):
    """Give the VMA another length. Reply: None, when the process has dropped what lies past the new end. EINVAL."""

    request_id: int
    vma_id: int
    length_pages: int


@schema.register(59, schema.U32, schema.UINT, schema.UINT, schema.UINT)
class MunmapRange(NamedTuple):
    """Take pages out of a VMA. Reply: None, when the process has dropped them; faults there are EFAULT. EINVAL."""

    request_id: int
    vma_id: int
    pgoff: int
    length_pages: int


@schema.register(56, schema.U32, schema.UINT, schema.UINT, schema.UINT)
class Pin(NamedTuple):
    """Keep these pages of a VMA where they are: truncate and the like wait, and then get EBUSY.

    Holes get blocks, but in a shared VMA for loads alone: there a Map of fault 0 replaces a hole page that goes.

    Reply: the pin's id. EINVAL, EFAULT (past the end of the file), ENOSPC.
    """

    request_id: int
    vma_id: int
    pgoff: int
    length_pages: int


@schema.register(57, schema.U32, schema.UINT)
class Unpin(NamedTuple):
    """Reply: None. EINVAL."""

    request_id: int
    pin_id: int


@schema.register(60, schema.U32, schema.data(16))
class Adopt(NamedTuple):
    """This process is a fork's child: give it what the parent's session has, its handles under the same numbers.

    Reply: flat (vma_id of the parent's, of its copy here, the first page past the end of the file), since nobody has
    told the child of what was cut off between the fork and this. ENOENT (the parent's session is over), EINVAL.
    """

    request_id: int
    parent_token: bytes


VmaRequest = Mmap | Msync | Munmap | Mremap | MunmapRange | Pin | Unpin | Adopt
