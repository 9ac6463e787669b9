"""The endpoint directory as the coordinator sees it: claimed, cleaned of what a dead one left, and removed at the end.

Whoever holds the record lock on `coordinator.lock` is the coordinator; everything else follows from that. The lock file
says what its writer has made, and is written before anything is made, so that a coordinator killed at any moment leaves
nothing that its successor cannot name. The file is unlinked last, while the lock is held.

The directory is opened once, without following a link, and looked at for whose it is (`dax_mp.trust`). From then on
all is done by that descriptor. So where somebody renames, removes or replaces the directory meanwhile, this process
goes on in its own, and removes nothing of what a successor has made under the same name.
"""

import errno
import fcntl
import logging
import os
import stat
from typing import Final

from dax_mp import trust
from dax_mp.daemons.liveness import lock_owner
from dax_mp.daemons.log import event
from dax_mp.daemons.region import unlink_region
from dax_mp.endpoint import (
    CONTROL_NAME,
    LOCK_NAME,
    PAGER_NAME,
    SESSIONS_NAME,
    Record,
    check_endpoint,
    is_session_name,
    lock_path,
    sessions_path,
)
from dax_mp.errors import os_error

CLAIM_ATTEMPTS_MAX = 100
"""Each failed attempt is another coordinator's leaving between two of our system calls."""

RECORD_BYTES_MAX: Final = 1 << 16

_OPEN_DIRECTORY: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN_LOCK: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class RuntimeDirectory:
    """A directory that this process has claimed. `claim` makes one.

    fd: on the directory. lock_fd: on its lock file, locked.
    """

    def __init__(self, path: str, fd: int, lock_fd: int) -> None:
        self.path = path
        self.fd = fd
        self._lock_fd = lock_fd

    @classmethod
    def claim(cls, endpoint: str, *, create: bool = True) -> "RuntimeDirectory":
        """Take the directory, and remove what a dead coordinator left in it.

        create: make the directory where it is not there. Raises OSError: EADDRINUSE where a coordinator serves there,
        EPERM, ELOOP, ENOTDIR where the directory or its lock is not its user's alone, ENAMETOOLONG, ENOENT.
        """
        path = os.path.abspath(endpoint)
        check_endpoint(path)
        for _ in range(CLAIM_ATTEMPTS_MAX):
            if create:
                _make_directory(path)
            try:
                directory = cls._open(path)
            except FileNotFoundError:
                if not create:
                    raise
                continue
            if directory is not None:
                directory._remove_leftovers()
                return directory
        raise os_error(errno.EBUSY, "coordinators come and go too fast at this endpoint", path)

    @classmethod
    def _open(cls, path: str) -> "RuntimeDirectory | None":
        """Open and lock it; None where another coordinator has left it meanwhile."""
        fd = open_directory(path)
        try:
            lock_fd = _lock(path, fd)
        except BaseException:
            os.close(fd)
            raise
        if lock_fd is None:
            os.close(fd)
            return None
        return cls(path, fd, lock_fd)

    def record(self, region_names: list[str]) -> None:
        """Write down what is about to be made. Raises OSError (ENOSPC)."""
        data = Record(os.getpid(), tuple(region_names)).encode()
        try:
            if os.pwrite(self._lock_fd, data, 0) < len(data):
                raise os_error(errno.ENOSPC)
            os.ftruncate(self._lock_fd, len(data))
        except OSError as error:
            code = error.errno or errno.EIO
            raise os_error(code, f"cannot write the lock file: {error.strerror}", lock_path(self.path)) from None

    def make_sessions(self) -> None:
        """Raises OSError where something is there that is not a directory of ours."""
        try:
            os.mkdir(SESSIONS_NAME, 0o700, dir_fd=self.fd)
        except FileExistsError:
            pass
        os.close(open_directory(sessions_path(self.path), SESSIONS_NAME, self.fd))

    def remove(self) -> None:
        """Remove the sockets, the session files, the lock file, and the directory if a coordinator made it.

        Where another lock file has taken the place of ours, what is there is a successor's: nothing is removed then.
        """
        if _is_named(self._lock_fd, LOCK_NAME, self.fd) or self._lock_anew():
            self._remove_files()
            os.unlink(LOCK_NAME, dir_fd=self.fd)  # from now on another one may claim the directory, and leave it again
            made_by_a_coordinator = os.fstat(self.fd).st_mode & stat.S_ISVTX
            if made_by_a_coordinator and _is_named(self.fd, self.path):
                try:
                    os.rmdir(self.path)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                        raise
        os.close(self._lock_fd)
        os.close(self.fd)

    def _lock_anew(self) -> bool:
        """Somebody has removed the lock file: make another, and lock it. False where a successor has made one."""
        try:
            lock_fd = _lock(self.path, self.fd)
        except OSError:
            return False
        if lock_fd is None:
            return False
        if os.fstat(lock_fd).st_size:  # of a successor that is dead: it names regions, and stays for that
            os.close(lock_fd)
            return False
        os.close(self._lock_fd)
        self._lock_fd = lock_fd
        return True

    def _remove_leftovers(self) -> None:
        """Precondition: the lock is held, so whoever made these is dead."""
        data = os.pread(self._lock_fd, RECORD_BYTES_MAX, 0)
        record = Record.decode(data)
        if record is not None:
            event(logging.INFO, "leftovers", f"removing what a dead coordinator (pid {record.pid}) left at {self.path}")
            for name in record.region_names:
                unlink_region(name)
        elif data:
            text = "what was in the lock file is no coordinator's, and is ignored"
            event(logging.WARNING, "leftovers", f"{text}: {self.path}")
        self._remove_files()

    def _remove_files(self) -> None:
        """The sockets and the sessions. What no coordinator or client made stays."""
        for name in (PAGER_NAME, CONTROL_NAME):
            _unlink(name, self.fd)
        try:
            sessions = os.open(SESSIONS_NAME, _READ_DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd)
        except OSError:  # it is not there, or no directory: nothing of a coordinator's
            return
        try:
            for name in os.listdir(sessions):
                if is_session_name(name):
                    _unlink(name, sessions)
        finally:
            os.close(sessions)
        try:
            os.rmdir(SESSIONS_NAME, dir_fd=self.fd)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise


def open_directory(path: str, name: str | None = None, within: int | None = None) -> int:
    """A descriptor on the directory at `path`, which is our user's alone. name, within: how to open it from its parent.

    Raises FileNotFoundError, OSError as `trust.check_directory`.
    """
    fd = os.open(name or path, _OPEN_DIRECTORY, dir_fd=within)
    try:
        trust.check_directory(path, os.fstat(fd), os.geteuid())
    except BaseException:
        os.close(fd)
        raise
    return fd


def serving_pid(endpoint: str) -> int | None:
    """The coordinator that serves at the endpoint; None where there is none, or the endpoint is not our user's."""
    try:
        directory = open_directory(endpoint)
    except OSError:
        return None
    try:
        lock_fd = os.open(LOCK_NAME, os.O_RDONLY | _OPEN_LOCK, dir_fd=directory)
    except OSError:
        return None
    finally:
        os.close(directory)
    try:
        return lock_owner(lock_fd)
    finally:
        os.close(lock_fd)


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
    except OSError as error:
        code = error.errno or errno.EIO
        raise os_error(code, f"cannot make the endpoint's directory: {error.strerror}", path) from None


def _lock(path: str, directory: int) -> int | None:
    """The lock file's descriptor, locked; None where another coordinator let go of it, or removed it, meanwhile.

    The descriptor is the only one that this process ever has of the file: to close any other would drop the lock.
    """
    lock = lock_path(path)
    try:
        fd = os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | _OPEN_LOCK, 0o600, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        code = error.errno or errno.EIO
        raise os_error(code, f"cannot open or make the lock file: {error.strerror}", lock) from None
    try:
        trust.check_file(lock, os.fstat(fd), os.geteuid())
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_named(fd, LOCK_NAME, directory):
            return fd
    except BlockingIOError:
        pid = lock_owner(fd)
        os.close(fd)
        if pid is not None:
            text = f"a coordinator (pid {pid}) serves at {path}; stop it, or take another --endpoint"
            raise os_error(errno.EADDRINUSE, text) from None
        return None
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _is_named(fd: int, name: str, within: int | None = None) -> bool:
    """Is what is open the very thing that has this name now?"""
    ours = os.fstat(fd)
    try:
        named = os.stat(name, dir_fd=within, follow_symlinks=False)
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)


def _unlink(name: str, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
