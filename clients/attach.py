"""Finding the coordinator of an endpoint, and what a session takes from it: its lock and its regions.

What is found is looked at, once it is open, for whose it is (`dax_mp.trust`): a directory in /tmp may be anybody's.
Nothing here changes what it finds, but for the session's own file; and what fails leaves nothing behind.
"""

import errno
import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import posix_ipc

from dax_mp import trust
from dax_mp.clients.lane import CoordinatorProcess
from dax_mp.clients.undo import close_all
from dax_mp.endpoint import (
    LOCK_NAME,
    LOCK_QUERY,
    SESSIONS_NAME,
    check_endpoint,
    default_endpoints,
    lock_holder,
    lock_path,
    session_path,
    sessions_path,
)
from dax_mp.errors import NoCoordinatorError, ProtocolError, os_error
from dax_mp.messages import TOKEN_BYTES
from dax_mp.superblock import SUPERBLOCK_BYTES, Superblock

# Opening waits for nothing (a FIFO's open does, for its other end), and no name in it is a link's.
_OPEN_DIRECTORY: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_LOCK: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

ANSWER_TIMEOUT_S: Final = 60.0
ACK_TIMEOUTS: Final = 4
ANSWER_TIMEOUT_S_MAX: Final = 1_000_000.0
"""As milliseconds, it is an int in C."""


def user_endpoint() -> str:
    """The endpoint of a user who names none: of the default ones the first at which a coordinator serves.

    Raises NoCoordinatorError, which says where it looked.
    """
    candidates = default_endpoints(os.environ, os.geteuid())
    if len(candidates) == 1:
        return candidates[0]
    passed_over = []
    for candidate in candidates:
        try:
            os.close(find_coordinator(candidate).pidfd)
            return candidate
        except NoCoordinatorError:
            passed_over.append(candidate)
        except OSError as error:  # another's directory, most likely
            passed_over.append(f"{candidate} ({error.strerror})")
    reason = f"no coordinator of yours serves at {', nor at '.join(passed_over)}"
    raise NoCoordinatorError(candidates[-1], reason, "dax-mp serve")


def find_coordinator(endpoint: str) -> CoordinatorProcess:
    """The process that holds the endpoint's lock, with a pidfd on it.

    Raises NoCoordinatorError where there is none, OSError where the endpoint cannot be one (ENAMETOOLONG, EACCES, ...)
    or is not this user's own (EPERM, ELOOP).
    """
    check_endpoint(endpoint)
    try:
        with _open_directory(endpoint) as directory:
            lock_fd = _open_lock(endpoint, directory)
    except FileNotFoundError:
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


@contextmanager
def _open_directory(path: str, name: str | None = None, within: int | None = None) -> Iterator[int]:
    """A descriptor on the directory at `path`, which is ours alone. name, within: how it is opened from its parent.

    Raises FileNotFoundError, OSError as `trust.check_directory`.
    """
    try:
        fd = os.open(name or path, _OPEN_DIRECTORY, dir_fd=within)
    except NotADirectoryError:  # what is before the last name is none: there is nothing of that name
        raise os_error(errno.ENOENT, filename=path) from None
    try:
        trust.check_directory(path, os.fstat(fd), os.geteuid())
        yield fd
    finally:
        os.close(fd)


def _open_lock(endpoint: str, directory: int) -> int:
    """The lock file's descriptor. Raises FileNotFoundError, OSError (EPERM, ELOOP) where it is not our user's file."""
    path = lock_path(endpoint)
    try:
        fd = os.open(LOCK_NAME, _OPEN_LOCK, dir_fd=directory)
    except OSError as error:
        error.filename = path
        raise
    try:
        trust.check_file(path, os.fstat(fd), os.geteuid())
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock_holder(fd: int) -> int | None:
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, LOCK_QUERY)
    assert isinstance(answer, bytes)
    return lock_holder(answer)


def new_token() -> bytes:
    """A session's name. Random, and not beginning with a zero byte: ZeroMQ keeps such identities for itself."""
    while True:
        token = os.urandom(TOKEN_BYTES)
        if token[0]:
            return token


def lock_session(endpoint: str, token: bytes) -> int:
    """Create the session's file and lock it: the coordinator takes the lock as the proof that this process lives.

    Returns its descriptor. It is to stay the only one: closing *any* descriptor of the file in this process drops the
    lock (fcntl(2), "Record locks"). Raises NoCoordinatorError where the coordinator has left meanwhile, OSError.
    """
    path = session_path(endpoint, token)
    try:
        with (
            _open_directory(endpoint) as directory,
            _open_directory(sessions_path(endpoint), SESSIONS_NAME, directory) as sessions,
        ):
            fd = os.open(token.hex(), os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=sessions)
    except FileNotFoundError:
        raise NoCoordinatorError(endpoint, "the coordinator there has just ended") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise os_error(error.errno, f"cannot make this session's file: {error.strerror}", path) from None
        raise
    try:
        os.fchmod(fd, 0o600)  # whatever the umask: the coordinator is to open it
        fcntl.lockf(fd, fcntl.LOCK_EX)
        swept = not os.fstat(fd).st_nlink  # this process was held up, and taken for dead before it had the lock
    except BaseException:
        unlock_session(endpoint, token, [fd])
        raise
    if swept:
        os.close(fd)
        return lock_session(endpoint, token)
    return fd


def unlock_session(endpoint: str, token: bytes, fds: list[int]) -> None:
    """Remove the session's file, where the coordinator has not done so yet, and let go of it."""
    try:
        os.unlink(session_path(endpoint, token))
    except OSError:  # it or its directory is gone, or cannot be written to; the coordinator removes what is left
        pass
    close_all(fds)


def check_welcome(welcome: dict[str, Any]) -> None:
    """Raises ProtocolError where this process cannot map the coordinator's pages: their size is not the system's."""
    page_size = os.sysconf("SC_PAGESIZE")
    if welcome["page_size"] != page_size:
        raise ProtocolError(f"the coordinator's pages have {welcome['page_size']} bytes, this system's {page_size}")


def rest_s(deadline_s: float) -> float:
    """What is left until that time of time.monotonic()."""
    return max(deadline_s - time.monotonic(), 0.001)


def check_timeout(timeout_s: float | None) -> float | None:
    """Raises ValueError for what is no time to wait for an answer. None is the default."""
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"the timeout must be more than 0 seconds, not {timeout_s!r}")
    return timeout_s


def answer_timeout_s(welcome: dict[str, Any], wanted_s: float | None) -> float:
    """How long an access or a request may take; math.inf: for ever.

    By default it is longer than what any of them takes at a coordinator that answers: an operation may wait for the
    eviction of a process, and for others that wait for the same before it.
    """
    if wanted_s is None:
        return max(ANSWER_TIMEOUT_S, ACK_TIMEOUTS * float(welcome["ack_timeout_s"]))
    return wanted_s if wanted_s == math.inf else min(wanted_s, ANSWER_TIMEOUT_S_MAX)


def open_region_of(welcome: dict[str, Any], kind: str, undo: ExitStack) -> tuple[int, tuple[int, int] | None]:
    """The region's descriptor, which `undo` closes, and its file; -1 and None where the coordinator has no such region.

    Raises as `open_region`.
    """
    name = welcome[f"{kind}_name"]
    if name is None:
        return -1, None
    fd = open_region(name, kind, welcome[f"{kind}_pages"], welcome)
    undo.callback(os.close, fd)
    status = os.fstat(fd)
    return fd, (status.st_dev, status.st_ino)


def open_region(name: str, kind: str, pages: int, welcome: dict[str, Any]) -> int:
    """The descriptor of a region's shared-memory object.

    Raises ProtocolError where the object of that name is not the one that the welcome speaks of, OSError where it
    cannot be opened or is another user's.
    """
    try:
        fd: int = posix_ipc.SharedMemory(name).fd
    except posix_ipc.Error as error:  # not OSErrors, and without a number
        code = errno.ENOENT if isinstance(error, posix_ipc.ExistentialError) else errno.EACCES
        raise os_error(code, f"the coordinator's {kind} region cannot be opened: {error}", name) from error
    except OSError as error:
        if error.errno is None:  # posix_ipc says EMFILE and ENFILE in words alone
            raise os_error(errno.EMFILE, str(error), name) from error
        raise
    try:
        trust.check_file(f"/dev/shm{name}", os.fstat(fd), os.geteuid())
        expected = Superblock(kind, welcome["page_size"], pages, welcome["uuid"])
        found = Superblock.unpack(os.pread(fd, SUPERBLOCK_BYTES, 0))
        if found != expected or os.fstat(fd).st_size != expected.length_bytes:
            raise ProtocolError(f"{name} is not the {kind} region of this coordinator")
    except BaseException:
        os.close(fd)
        raise
    return fd
