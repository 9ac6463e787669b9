"""The messages of the control sockets about a process's VMAs: mmap(2), munmap(2), mremap(2), pins, forks, and
what is not waited for any more.

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


@schema.register(60, schema.U32, schema.data(16), schema.UINT)
class Adopt(NamedTuple):
    """This process is a fork's child: give it what the parent's session has, its handles under the same numbers.

    last_unmap: of the Unmaps that the parent's pager had carried out when it forked: what came after, the child's
    memory has not seen. Reply: flat (vma_id of the parent's, of its copy here). ENOENT (its session is over), EINVAL.
    """

    request_id: int
    parent_token: bytes
    last_unmap: int = 0


@schema.register(100, schema.U32)
class Cuts(NamedTuple):
    """What a fork's child is to drop of its private copies, which nobody has told it of: Unmaps of its parent since the
    fork, and of its own that came before it had a window for them. Reply: flat (vma_id, pgoff, length_pages).
    """

    request_id: int


@schema.register(101, schema.U32, schema.U32)
class Cancel(NamedTuple):
    """Nobody waits any more for the answer to the request `target_id`, the last of this socket that acquires something.

    What it has acquired, or is about to, is released (`acquisitions.py`). Reply: None.
    """

    request_id: int
    target_id: int


VmaRequest = Mmap | Msync | Munmap | Mremap | MunmapRange | Pin | Unpin | Adopt | Cuts | Cancel
