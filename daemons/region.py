"""A region: one POSIX shared-memory object, its first page a superblock, the rest frames.

The coordinator never maps it. It reads, writes and zeroes through the file descriptor, so its own resident memory does
not grow with what the clients store.
"""

import errno
import os
from collections.abc import Callable
from typing import Final

import posix_ipc

from dax_mp.errors import os_error
from dax_mp.sizes import format_size
from dax_mp.superblock import Superblock

SHARED_MEMORY: Final = "/dev/shm"
PAGE_SIZE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
RESERVE_CHUNK_BYTES: Final = 64 << 20
"""How much is reserved between two looks at whether a signal has come."""

_ZEROS: Final = memoryview(bytes(256 << 10))


class FileMemory:
    """`dax_mp.memory.Memory` over a file descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        while length_bytes > 0:
            written_bytes = os.pwrite(self._fd, _ZEROS[:length_bytes], offset_bytes)
            offset_bytes += written_bytes
            length_bytes -= written_bytes

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        data = os.pread(self._fd, length_bytes, offset_bytes)
        assert len(data) == length_bytes, (
            f"a region ends at {offset_bytes + len(data)}, within a frame that was given out"
        )
        return data

    def write(self, offset_bytes: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written_bytes = os.pwrite(self._fd, view, offset_bytes)
            offset_bytes += written_bytes
            view = view[written_bytes:]


class Region:
    """A new shared-memory object, mode 0600, never on top of one that exists.

    Raises OSError: EEXIST, or what shm_open(3) and ftruncate(2) give.
    """

    def __init__(self, name: str, superblock: Superblock) -> None:
        self.name = name
        self.superblock = superblock
        self.fd = _create(name)
        try:
            os.ftruncate(self.fd, superblock.length_bytes)
            self.memory = FileMemory(self.fd)
            self.memory.write(0, superblock.pack())
        except OSError as error:
            self.remove()
            raise os_error(error.errno or errno.EIO, f"cannot make a region: {error.strerror}", name) from error

    def reserve(self, between_chunks: Callable[[], None]) -> None:
        """Take all of the region's memory now, so that none of it can be missing later.

        between_chunks: called now and then; what it raises ends this. Raises OSError (ENOSPC) with what can be done.
        """
        length_bytes = self.superblock.length_bytes
        status = os.fstatvfs(self.fd)
        # Asked first: where the machine has less memory than /dev/shm promises, trying is what would hurt. A tmpfs
        # without a limit says that it has no blocks at all.
        free_bytes = status.f_bavail * status.f_frsize if status.f_blocks else length_bytes
        free_bytes = min(free_bytes, _available_memory_bytes())
        if length_bytes > free_bytes:
            raise self._no_space(free_bytes)
        try:
            for offset_bytes in range(0, length_bytes, RESERVE_CHUNK_BYTES):
                between_chunks()
                os.posix_fallocate(self.fd, offset_bytes, min(RESERVE_CHUNK_BYTES, length_bytes - offset_bytes))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise self._no_space(free_bytes) from error
            raise

    def remove(self) -> None:
        """Unlink the object. Clients that have it mapped keep their memory until they unmap it."""
        unlink_region(self.name)
        os.close(self.fd)

    def _no_space(self, free_bytes: int) -> OSError:
        needed = format_size(self.superblock.length_bytes)
        return os_error(
            errno.ENOSPC,
            f"/dev/shm has {format_size(free_bytes)} free, and the {self.superblock.kind} region takes {needed}; take "
            "a smaller --size, a larger /dev/shm (docker run --shm-size), or no reservation (--no-reserve)",
        )


def _create(name: str) -> int:
    """Raises OSError: EEXIST, EACCES, EMFILE, ENFILE, ENOENT where there is no shared memory at all."""
    try:
        fd: int = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600).fd
    except posix_ipc.ExistentialError as error:
        if os.path.isdir(SHARED_MEMORY):
            raise _os_error(error, "cannot make a region", name) from error
        text = f"this system has no {SHARED_MEMORY}, where regions are made (mount -t tmpfs tmpfs {SHARED_MEMORY})"
        raise os_error(errno.ENOENT, text) from error
    except posix_ipc.PermissionsError as error:
        raise _os_error(error, "cannot make a region", name) from error
    except OSError as error:
        # posix_ipc says EMFILE and ENFILE in words alone.
        raise os_error(error.errno or errno.EMFILE, f"cannot make a region: {error.strerror or error}", name) from error
    return fd


def _available_memory_bytes() -> int:
    """What can be taken without swapping, as the kernel estimates it (proc_meminfo(5), MemAvailable)."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        available_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return available_kib * 1024


def unlink_region(name: str) -> None:
    """Remove the object if it is there. Raises OSError (EACCES)."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        pass
    except posix_ipc.PermissionsError as error:
        raise _os_error(error, "cannot remove a region", name) from error


def _os_error(error: Exception, text: str, name: str) -> OSError:
    """posix_ipc's own exceptions are not OSErrors."""
    code = errno.EACCES if isinstance(error, posix_ipc.PermissionsError) else errno.EEXIST
    return os_error(code, f"{text}: {error}", name)
