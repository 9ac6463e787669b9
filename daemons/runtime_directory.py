"""The endpoint directory as the coordinator sees it: claimed, cleaned of what a dead one left, and removed at the end.

Whoever holds the record lock on `coordinator.lock` is the coordinator; everything else follows from that. The lock file
says what its writer has made, and is written before anything is made, so that a coordinator killed at any moment leaves
nothing that its successor cannot name. The file is unlinked last, while the lock is held.
"""

import errno
import fcntl
import os
import stat

from dax_mp.daemons.liveness import lock_owner, remove_file
from dax_mp.daemons.region import unlink_region
from dax_mp.endpoint import Record, check_endpoint, control_path, is_session_name, lock_path, pager_path, sessions_path
from dax_mp.errors import os_error

CLAIM_ATTEMPTS_MAX = 100
"""Each failed attempt is another coordinator's leaving between two of our system calls."""


class RuntimeDirectory:
    """A directory that this process has claimed. `claim` makes one."""

    def __init__(self, path: str, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def claim(cls, endpoint: str, *, create: bool = True) -> "RuntimeDirectory":
        """Take the directory, and remove what a dead coordinator left in it.

        create: make the directory where it is not there. Raises OSError: EADDRINUSE where a coordinator serves there,
        EPERM where the directory is not its user's alone, ENAMETOOLONG, ENOENT.
        """
        path = os.path.abspath(endpoint)
        check_endpoint(path)
        for _ in range(CLAIM_ATTEMPTS_MAX):
            if create:
                _make_directory(path)
            try:
                _check_directory(path)
                lock_fd = _lock(path)
            except FileNotFoundError:
                if not create:
                    raise
                continue
            if lock_fd is not None:
                directory = cls(path, lock_fd)
                directory._remove_leftovers()
                return directory
        raise os_error(errno.EBUSY, "coordinators come and go too fast at this endpoint", path)

    def record(self, region_names: list[str]) -> None:
        """Write down what is about to be made."""
        data = Record(os.getpid(), tuple(region_names)).encode()
        os.pwrite(self._lock_fd, data, 0)
        os.ftruncate(self._lock_fd, len(data))

    def make_sessions(self) -> None:
        os.makedirs(sessions_path(self.path), 0o700, exist_ok=True)

    def remove(self) -> None:
        """Remove the sockets, the session files, the lock file, and the directory if a coordinator made it."""
        _remove_files(self.path)
        made_by_a_coordinator = os.stat(self.path).st_mode & stat.S_ISVTX
        os.unlink(lock_path(self.path))  # from now on another one may claim the directory, and leave it again
        if made_by_a_coordinator:
            try:
                os.rmdir(self.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise
        os.close(self._lock_fd)

    def _remove_leftovers(self) -> None:
        """Precondition: the lock is held, so whoever made these is dead."""
        record = Record.decode(os.pread(self._lock_fd, 1 << 16, 0))
        if record is not None:
            for name in record.region_names:
                unlink_region(name)
        _remove_files(self.path)


def _make_directory(path: str) -> None:
    """Make the directory where nothing of that name is there.

    It gets the sticky bit: the mark, from its first moment on, of a directory that a coordinator may remove again. (In
    XDG_RUNTIME_DIR it also keeps it from being cleaned up for its age.)
    """
    try:
        os.mkdir(path, stat.S_ISVTX | 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        raise os_error(errno.ENOENT, "the endpoint's parent directory is not there", os.path.dirname(path)) from None


def _check_directory(path: str) -> None:
    """Raises OSError where `path` is not a directory that only its owner, our user, can enter.

    Who can enter it can connect to the sockets, and who can connect can truncate everyone's files.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise os_error(errno.ELOOP, "the endpoint is a symbolic link; name the directory itself", path)
    if not stat.S_ISDIR(status.st_mode):
        raise os_error(errno.ENOTDIR, "the endpoint is not a directory", path)
    if status.st_uid != os.geteuid():
        text = f"the endpoint belongs to user {status.st_uid}, not to {os.geteuid()}; take a directory of your own"
        raise os_error(errno.EPERM, text, path)
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise os_error(errno.EPERM, f"the endpoint's mode is {mode:04o}, open to other users; chmod it to 0700", path)


def _lock(path: str) -> int | None:
    """The lock file's descriptor, locked; None where another coordinator let go of it, or removed it, meanwhile.

    The descriptor is the only one that this process ever has of the file: to close any other would drop the lock.
    """
    lock = lock_path(path)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours, named = os.fstat(fd), os.stat(lock)
        if (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino):
            return fd
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, fcntl(2)
        pid = lock_owner(fd)
        os.close(fd)
        if pid is not None:
            text = f"a coordinator (pid {pid}) serves at {path}; stop it, or take another --endpoint"
            raise os_error(errno.EADDRINUSE, text) from None
        return None
    except FileNotFoundError:
        pass
    os.close(fd)
    return None


def _remove_files(path: str) -> None:
    """The sockets and the sessions. What no coordinator or client made stays."""
    for socket_path in (pager_path(path), control_path(path)):
        remove_file(socket_path)
    sessions = sessions_path(path)
    try:
        names = os.listdir(sessions)
    except FileNotFoundError:
        return
    for name in names:
        if is_session_name(name):
            remove_file(os.path.join(sessions, name))
    try:
        os.rmdir(sessions)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
