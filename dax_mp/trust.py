"""Whose things are believed: those that our user alone can have made, and nobody else can change.

A directory in /tmp has the name that everybody knows, so anybody can make it first. Who connects to what he finds there
hands his data to its owner, and who serves in it serves everybody who can enter. So both sides look at what they have
*opened*, by its descriptor, before they use it: a name can be given to another thing between a look and a use, and a
descriptor cannot. They open without following links and without waiting (a FIFO has an open that does).

There is no exception for root. Root can read everything, but a session of root's at another user's endpoint would put
root's data there, and that user's coordinator could not watch root's process: `sudo -u` is the way to go there.
"""

import errno
import stat
from typing import Protocol

from dax_mp.errors import os_error


class Status(Protocol):
    """What fstat(2) said of an open file."""

    @property
    def st_mode(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_nlink(self) -> int: ...


def check_directory(path: str, status: Status, uid: int) -> None:
    """Raises OSError (ELOOP, ENOTDIR, EPERM) where it is not a directory that user `uid`, its owner, alone can enter.

    Who can enter an endpoint can connect to its sockets, and who can connect can truncate everyone's files.
    """
    if stat.S_ISLNK(status.st_mode):
        raise os_error(errno.ELOOP, "the endpoint is a symbolic link; name the directory itself", path)
    if not stat.S_ISDIR(status.st_mode):
        raise os_error(errno.ENOTDIR, "the endpoint is not a directory", path)
    _check_owner("the endpoint", path, status, uid)
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise os_error(errno.EPERM, f"the endpoint's mode is {mode:04o}, open to other users; chmod it to 0700", path)


def check_file(path: str, status: Status, uid: int) -> None:
    """Raises OSError (EPERM) where it is not a plain file of user `uid`, under one name.

    A second name would be that of another file, which a write through this one destroys.
    """
    if not stat.S_ISREG(status.st_mode):
        raise os_error(errno.EPERM, "it is not a plain file, and no coordinator made it; remove it", path)
    _check_owner("it", path, status, uid)
    if status.st_nlink > 1:
        raise os_error(errno.EPERM, "it has another name too (a hard link), as no coordinator's has; remove it", path)


def check_peer(path: str, peer_uid: int, uid: int) -> None:
    """Raises OSError (EPERM) where the process at the other end of a socket is not of user `uid`."""
    if peer_uid != uid:
        text = f"the process that listens there belongs to user {peer_uid}, not to {uid}; nothing was sent to it"
        raise os_error(errno.EPERM, text, path)


def _check_owner(what: str, path: str, status: Status, uid: int) -> None:
    owner = status.st_uid
    if owner == uid:
        return
    advice = f"for user {owner}'s coordinator: sudo -u '#{owner}'" if uid == 0 else "take a directory of your own"
    raise os_error(errno.EPERM, f"{what} belongs to user {owner}, not to {uid}; {advice}", path)
