"""Who is alive: what the kernel says about a record lock and about a process, and nothing else.

A session's process holds its file in `sessions/` locked. The lock gives the pid, a pidfd on that pid makes the death an
event, and the lock, asked once more, says that the pidfd is of that very process and not of one that got its pid since.
"""

import errno
import fcntl
import os
import select
import stat
import time
from typing import Final

from dax_mp.endpoint import LOCK_QUERY, is_session_name, lock_holder, session_path, sessions_path
from dax_mp.errors import os_error
from dax_mp.limits import SESSIONS_MAX

SWEEP_INTERVAL_S: Final = 1.0
LOCKED_WITHIN_S: Final = 10.0
"""How long a process may take from making its session's file to locking it; if it takes longer, it makes another."""

EVENTS_MAX: Final = 64
"""How many deaths one call of `SessionProcesses.ended` reports."""


class SessionProcesses:
    """The processes behind the sessions, and what else ends: one epoll descriptor for all of them.

    endpoint: where the session files are. stop_fds: descriptors that are watched along, for `stop_requested`.
    """

    def __init__(self, endpoint: str, stop_fds: list[int]) -> None:
        self._endpoint = endpoint
        self._epoll = select.epoll()
        self._pidfds: dict[bytes, int] = {}
        self._tokens: dict[int, bytes] = {}
        self._pids: dict[bytes, int] = {}
        self._next_sweep_s = 0.0
        self.stop_requested = False
        """One of `stop_fds` has been readable."""
        for fd in stop_fds:
            self._epoll.register(fd, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when `ended` has something to tell."""
        return self._epoll.fileno()

    def open(self, token: bytes) -> int:
        """The pid of the process that holds the session's file; it is watched from now on.

        Raises OSError: ENOENT, ELOOP, EACCES where the file is not there, not a plain file of ours, or not locked by a
        process that can be watched; EMFILE.
        """
        if len(self._tokens) >= SESSIONS_MAX:
            raise os_error(errno.EMFILE, f"there are {SESSIONS_MAX} sessions already")
        self._sweep()
        pid, pidfd = _find_process(session_path(self._endpoint, token))
        self._epoll.register(pidfd, select.EPOLLIN)
        self._tokens[pidfd] = token
        self._pidfds[token] = pidfd
        self._pids[token] = pid
        return pid

    def pid_of(self, token: bytes) -> int:
        """The process of the session. Precondition: `open`, and not yet `forget`."""
        return self._pids[token]

    def ended(self) -> list[bytes]:
        """The sessions whose processes are dead. Each is told again until `forget`."""
        tokens = [self._tokens.get(fd) for fd, _ in self._epoll.poll(0, EVENTS_MAX)]
        self.stop_requested = self.stop_requested or None in tokens
        return [token for token in tokens if token is not None]

    def has_let_go(self, token: bytes) -> bool:
        """Is the session's file locked no more? Its process may live: exec() ends a session without its death."""
        try:
            fd = os.open(
                session_path(self._endpoint, token), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except OSError:
            return False
        try:
            return lock_owner(fd) is None
        finally:
            os.close(fd)

    def forget(self, token: bytes) -> None:
        """The session is over: stop watching, and unlink its file."""
        pidfd = self._pidfds.pop(token)
        del self._pids[token]
        del self._tokens[pidfd]
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        remove_file(session_path(self._endpoint, token))

    def _sweep(self) -> None:
        """Unlink the files of processes that died before they said Hello, which nobody else would ever remove."""
        if time.monotonic() < self._next_sweep_s:
            return
        self._next_sweep_s = time.monotonic() + SWEEP_INTERVAL_S
        for name in os.listdir(sessions_path(self._endpoint)):
            if is_session_name(name) and bytes.fromhex(name) not in self._pidfds:
                _unlink_if_dead(session_path(self._endpoint, bytes.fromhex(name)))

    def close(self) -> None:
        for pidfd in self._tokens:
            os.close(pidfd)
        self._epoll.close()


def _find_process(path: str) -> tuple[int, int]:
    """The process that holds the file locked: (pid, pidfd), the pidfd to be closed by the caller."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise os_error(errno.EACCES, "its file is not a plain file of the coordinator's user", path)
        pid = lock_owner(fd)
        if pid is None:
            raise os_error(errno.EACCES, "no process holds its file locked (fcntl.lockf)", path)
        if pid <= 0:
            raise os_error(errno.EACCES, "its process is in another pid namespace than the coordinator", path)
        pidfd = open_pidfd(pid)
        if lock_owner(fd) != pid:
            os.close(pidfd)
            raise os_error(errno.EACCES, "its process has died", path)
        return pid, pidfd
    finally:
        os.close(fd)


def _unlink_if_dead(path: str) -> None:
    """Unlink a session's file that nobody has locked for as long as its maker may take to do so.

    It is locked here meanwhile: who locks it after that finds that it has no name any more (`clients/attach.py`).
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if time.time() - os.fstat(fd).st_mtime >= LOCKED_WITHIN_S:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_file(path)
    except OSError:  # its process lives
        pass
    finally:
        os.close(fd)


def lock_owner(fd: int) -> int | None:
    """The process that holds the file locked, as `dax_mp.endpoint.lock_holder`. Our own lock is not seen."""
    return lock_holder(fcntl.fcntl(fd, fcntl.F_GETLK, LOCK_QUERY))


def open_pidfd(pid: int) -> int:
    """A file descriptor that becomes readable when the process dies. Raises OSError (ESRCH, EMFILE, ENOSYS)."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise os_error(errno.ENOSYS, "this kernel has no pidfd_open(2); Linux 5.3 or newer is needed") from None
        raise


def remove_file(path: str) -> None:
    """Unlink the file if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
