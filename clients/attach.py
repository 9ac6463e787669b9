"""Finding the coordinator of an endpoint, and what a session takes from it: its lock and its regions.

Nothing here changes what it finds, but for the session's own file; and what fails leaves nothing behind.
"""

import errno
import fcntl
import os
from typing import Any

import posix_ipc

from dax_mp.clients.lane import CoordinatorProcess
from dax_mp.endpoint import LOCK_QUERY, check_endpoint, default_endpoint, lock_holder, lock_path, session_path
from dax_mp.errors import NoCoordinatorError, ProtocolError, os_error
from dax_mp.superblock import SUPERBLOCK_BYTES, Superblock


def user_endpoint() -> str:
    """The endpoint of a user who names none: $DAX_MP_ENDPOINT, else one in the runtime or the temp directory."""
    import tempfile  # slow to import, and needed by few

    return default_endpoint(os.environ, tempfile.gettempdir(), os.getuid())


def find_coordinator(endpoint: str) -> CoordinatorProcess:
    """The process that holds the endpoint's lock, with a pidfd on it.

    Raises NoCoordinatorError where there is none, OSError (ENAMETOOLONG, EACCES, ...) where the endpoint cannot be one.
    """
    check_endpoint(endpoint)
    try:
        lock_fd = os.open(lock_path(endpoint), os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise NoCoordinatorError(endpoint) from None
    try:
        while (pid := _lock_holder(lock_fd)) is not None:
            if pid <= 0:
                raise NoCoordinatorError(endpoint, "the coordinator there runs in another pid namespace")
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue  # it has died since, and its lock with it
            # Still the holder, so it was alive when the pidfd was opened: the pid cannot have been given to another.
            if _lock_holder(lock_fd) == pid:
                return CoordinatorProcess(endpoint, pid, pidfd)
            os.close(pidfd)
    finally:
        os.close(lock_fd)
    raise NoCoordinatorError(endpoint, "the coordinator there has died")


def _lock_holder(fd: int) -> int | None:
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, LOCK_QUERY)
    assert isinstance(answer, bytes)
    return lock_holder(answer)


def lock_session(endpoint: str, token: bytes) -> int:
    """Create the session's file and lock it: the coordinator takes the lock as the proof that this process lives.

    Returns its descriptor. It is to stay the only one: closing *any* descriptor of the file in this process drops the
    lock (fcntl(2), "Record locks").
    """
    fd = os.open(session_path(endpoint, token), os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def unlock_session(endpoint: str, token: bytes, fd: int) -> None:
    """Remove the session's file, where the coordinator has not done so yet, and let go of it."""
    try:
        os.unlink(session_path(endpoint, token))
    except FileNotFoundError:
        pass
    os.close(fd)


def check_welcome(welcome: Any) -> None:
    """Raises ProtocolError where this process cannot map the coordinator's pages: their size is not the system's."""
    page_size = os.sysconf("SC_PAGESIZE")
    if not isinstance(welcome, dict) or "page_size" not in welcome:
        raise ProtocolError("the coordinator's welcome does not say how large its pages are")
    if welcome["page_size"] != page_size:
        raise ProtocolError(f"the coordinator's pages have {welcome['page_size']} bytes, this system's {page_size}")


def open_region(name: str, kind: str, pages: int, welcome: dict[str, Any]) -> int:
    """The descriptor of a region's shared-memory object.

    Raises ProtocolError where the object of that name is not the one that the welcome speaks of.
    """
    try:
        fd: int = posix_ipc.SharedMemory(name).fd
    except posix_ipc.Error as error:  # not OSErrors, and without a number
        code = errno.ENOENT if isinstance(error, posix_ipc.ExistentialError) else errno.EACCES
        raise os_error(code, f"the coordinator's {kind} region cannot be opened: {error}", name) from error
    try:
        expected = Superblock(kind, welcome["page_size"], pages, welcome["uuid"])
        found = Superblock.unpack(os.pread(fd, SUPERBLOCK_BYTES, 0))
        if found != expected or os.fstat(fd).st_size != expected.length_bytes:
            raise ProtocolError(f"{name} is not the {kind} region of this coordinator")
    except BaseException:
        os.close(fd)
        raise
    return fd
