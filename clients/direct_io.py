"""Long reads and writes: between the caller's buffer and the region's frames, past the coordinator.

The coordinator lends the frames (BeginRead, BeginWrite), this process copies by system calls on the region, and EndIo
gives them back: two round trips for up to IO_LEASE_BYTES_MAX, and one copy. Until EndIo a write keeps every other read
and write of the file waiting, so nothing is done between but the copy.

Where EndIo has nothing more to do than that (a read; a write over what is there), its answer is not waited for. Should
the coordinator have taken the frames back before, since this process took too long, then what the others did meanwhile
was done while the call was under way, and it counts as done before them (a truncate that took the frames) or after (a
write). It is told so by its next request.

A page of the caller's buffer that is not mapped (one of a mapping of ours, for example) ends the copy, because the
system call cannot fault it in. To do that here, with the frames lent, could wait for those very frames. So they are
given back first, and that chunk goes through a message.
"""

from typing import TYPE_CHECKING

from dax_mp import messages, mmu
from dax_mp.clients.lane import Claim
from dax_mp.limits import IO_CHUNK_BYTES_MAX, IO_LEASE_BYTES_MAX

if TYPE_CHECKING:
    from dax_mp.clients.handle import Handle


def write(handle: "Handle", data: memoryview, offset_bytes: int, append: bool) -> int:
    """Write all of `data`. Returns the offset after it. Raises OSError: what is before the failure is written."""
    position = 0
    while position < len(data):
        stored_bytes, offset_bytes = _store(
            handle, data[position : position + IO_LEASE_BYTES_MAX], offset_bytes, append
        )
        position += stored_bytes
        if not stored_bytes:
            chunk = bytes(data[position : position + IO_CHUNK_BYTES_MAX])
            offset_bytes = handle.write(offset_bytes, chunk, append)
            position += len(chunk)
    return offset_bytes


class _Lease:
    """What one request has lent, and how much of it has been stored. It goes back whatever happens."""

    def __init__(self, handle: "Handle") -> None:
        self.handle = handle
        self.claim = Claim(messages.EndIo)
        self.done_bytes = 0

    def settle(self, failed: bool) -> None:
        """Give back what has not been, and wait for nothing: an exception may be on its way."""
        if self.claim.number is not None:
            self.handle.session.channel.post_quietly(messages.EndIo, self.claim.number, self.done_bytes)
            self.claim.number = None


def _store(handle: "Handle", data: memoryview, offset_bytes: int, append: bool) -> tuple[int, int]:
    """Store as much as one lease and the buffer's pages allow. Returns how much, and the offset after it."""
    lease = _Lease(handle)
    return mmu.settled(lease.settle, _store_lent, handle, lease, data, offset_bytes, append)


def _store_lent(handle: "Handle", lease: _Lease, data: memoryview, offset_bytes: int, append: bool) -> tuple[int, int]:
    channel, pager = handle.session.channel, handle.session.pager
    io_id, offset_bytes, changes_file, flat = channel.acquire(
        lease.claim, messages.BeginWrite, handle.number, offset_bytes, int(append), len(data), filename=handle.name
    )
    for address, length_bytes in zip(flat[::2], flat[1::2], strict=True):
        copied_bytes = pager.store(data[lease.done_bytes : lease.done_bytes + length_bytes], address)
        lease.done_bytes += copied_bytes
        if copied_bytes < length_bytes:
            break
    if changes_file:
        channel.request(messages.EndIo, io_id, lease.done_bytes, filename=handle.name)
        lease.claim.number = None
    return lease.done_bytes, offset_bytes + lease.done_bytes


def readinto(handle: "Handle", buffer: memoryview, offset_bytes: int) -> int:
    """Fill the buffer. Returns how much there was: less at the end of the file alone."""
    position = 0
    while position < len(buffer):
        rest = buffer[position : position + IO_LEASE_BYTES_MAX]
        loaded_bytes, ended = _load(handle, rest, offset_bytes + position)
        position += loaded_bytes
        if ended:
            break
        if not loaded_bytes:
            data = handle.read(offset_bytes + position, min(IO_CHUNK_BYTES_MAX, len(rest)))
            rest[: len(data)] = data
            position += len(data)
    return position


def _load(handle: "Handle", buffer: memoryview, offset_bytes: int) -> tuple[int, bool]:
    """Load as much as one lease and the buffer's pages allow. Returns how much, and whether the file ends there."""
    lease = _Lease(handle)
    return mmu.settled(lease.settle, _load_lent, handle, lease, buffer, offset_bytes)


def _load_lent(handle: "Handle", lease: _Lease, buffer: memoryview, offset_bytes: int) -> tuple[int, bool]:
    channel, pager = handle.session.channel, handle.session.pager
    _, flat = channel.acquire(
        lease.claim, messages.BeginRead, handle.number, offset_bytes, len(buffer), filename=handle.name
    )
    loaded_bytes = 0
    for address, length_bytes in zip(flat[::2], flat[1::2], strict=True):
        part = buffer[loaded_bytes : loaded_bytes + length_bytes]
        copied_bytes = pager.load(part, address) if address else _zero(part)
        loaded_bytes += copied_bytes
        if copied_bytes < length_bytes:
            break
    return loaded_bytes, not any(flat[1::2])


_ZEROES = memoryview(bytes(IO_CHUNK_BYTES_MAX))


def _zero(part: memoryview) -> int:
    for start in range(0, len(part), len(_ZEROES)):
        piece = part[start : start + len(_ZEROES)]
        piece[:] = _ZEROES[: len(piece)]
    return len(part)
