"""Where `get` writes to: which file a path names, and how what others have there is kept.

A regular file gets its new content at once: that is written to a file without a name (O_TMPFILE), which takes the name
when it is complete. A copy that is killed leaves nothing.

All else is opened and written to: a pipe, a terminal, a device. So is what a link of procfs leads to, whatever it is:
/dev/stdout and /dev/fd/N, which a shell's `>(command)` is, lead to a file that somebody else has open. For a descriptor
of this very process that is the descriptor itself: it goes on where it is, as the shell's own `>>` does.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from dax_mp.errors import os_error

_LINKS_MAX: Final = 40
"""As many links as Linux follows in one path."""

_DESCRIPTOR: Final = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd/(\d+)")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """An OSError that names no file is one of this file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


def open_in_place(path: str) -> int | None:
    """A descriptor to write to, where `path` is, or leads to, something that is not to be replaced; else None."""
    path = followed(path)
    if os.path.islink(path):  # of procfs
        match = _DESCRIPTOR.fullmatch(path)
        if match and int(match[1]) == os.getpid():
            return os.dup(int(match[2]))
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISREG(mode) else os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)


def followed(path: str) -> str:
    """The path without links, but for a last one of procfs, which leads where no path need lead.

    It is the path of a file that is not there, where a link leads to none. Raises OSError: ELOOP, ENOENT for no path.
    """
    if not path:
        raise os_error(errno.ENOENT)
    for _ in range(_LINKS_MAX):
        directory = os.path.realpath(os.path.dirname(path))
        path = os.path.join(directory, os.path.basename(path))
        if not os.path.islink(path) or directory.startswith("/proc/"):
            return path
        path = os.path.join(directory, os.readlink(path))
    raise os_error(errno.ELOOP)


@contextmanager
def replacement(path: str) -> Iterator[int]:
    """A descriptor of a new file, which becomes the regular file `path` when the block ends, and never by halves.

    One that is there gives it its owner, where this user may do that, and its mode. One that this user may not write
    to is not replaced either: PermissionError.
    """
    place = followed(path)
    directory = os.path.dirname(place)
    temporary = os.path.join(directory, f".get-{os.urandom(8).hex()}")
    with _errors_of(path):
        fd = _open_nameless(directory)
        named = fd is None
        if fd is None:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with _errors_of(path):
            _look_like(fd, place)
        yield fd
        with _errors_of(path):
            if not named:
                named = True
                # An absolute path, so the directory's descriptor is not looked at: it has linkat(2) follow the link.
                os.link(f"/proc/self/fd/{fd}", temporary, src_dir_fd=fd)
            os.rename(temporary, place)
    except BaseException:
        if named:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        raise
    finally:
        os.close(fd)


@contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """An OSError, whatever file it names, is one of this file."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = path, None
        raise


def _open_nameless(directory: str) -> int | None:
    """None where the file system has no such files."""
    try:
        return os.open(directory, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return None
        raise


def _look_like(fd: int, path: str) -> None:
    try:
        old = os.stat(path)
    except FileNotFoundError:
        return
    if not os.access(path, os.W_OK, effective_ids=True):
        raise os_error(errno.EACCES)
    with suppress(PermissionError):
        os.fchown(fd, old.st_uid, old.st_gid)
    os.fchmod(fd, stat.S_IMODE(old.st_mode))
