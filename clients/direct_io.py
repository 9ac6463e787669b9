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

from dax_mp import messages
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


def _store(handle: "Handle", data: memoryview, offset_bytes: int, append: bool) -> tuple[int, int]:
    """Store as much as one lease and the buffer's pages allow. Returns how much, and the offset after it."""
    channel, pager = handle.session.channel, handle.session.pager
    io_id, offset_bytes, changes_file, flat = channel.borrow(
        messages.BeginWrite, handle.number, offset_bytes, int(append), len(data), filename=handle.name
    )
    done_bytes = 0
    try:
        for address, length_bytes in zip(flat[::2], flat[1::2], strict=True):
            copied_bytes = pager.store(data[done_bytes : done_bytes + length_bytes], address)
            done_bytes += copied_bytes
            if copied_bytes < length_bytes:
                break
    finally:
        if changes_file:
            channel.request(messages.EndIo, io_id, done_bytes, filename=handle.name)
        else:
            channel.post(messages.EndIo, io_id, done_bytes)
    return done_bytes, offset_bytes + done_bytes


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
    channel, pager = handle.session.channel, handle.session.pager
    io_id, flat = channel.borrow(messages.BeginRead, handle.number, offset_bytes, len(buffer), filename=handle.name)
    done_bytes = 0
    try:
        for address, length_bytes in zip(flat[::2], flat[1::2], strict=True):
            part = buffer[done_bytes : done_bytes + length_bytes]
            copied_bytes = pager.load(part, address) if address else _zero(part)
            done_bytes += copied_bytes
            if copied_bytes < length_bytes:
                break
    finally:
        channel.post(messages.EndIo, io_id, 0)
    return done_bytes, not any(flat[1::2])


_ZEROES = memoryview(bytes(IO_CHUNK_BYTES_MAX))


def _zero(part: memoryview) -> int:
    for start in range(0, len(part), len(_ZEROES)):
        piece = part[start : start + len(_ZEROES)]
        piece[:] = _ZEROES[: len(piece)]
    return len(part)
