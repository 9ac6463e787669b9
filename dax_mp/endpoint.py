"""An endpoint: the directory in which one coordinator serves, and the names of what lies in it.

    coordinator.lock    held by the coordinator for as long as it lives (POSIX record lock); says what it has made
    pager.sock          the two sockets of `dax_mp.messages`
    control.sock
    sessions/<token>    one file a session, held in the same way by the client's process

A record lock is the only witness of life that is believed: the kernel says which process holds it, and takes it away
when that process dies, however it dies. So a lock that nobody holds marks what a dead coordinator left behind.

Nothing here touches the file system; `daemons/` and `clients/` do.
"""

import errno
import json
import os
import re
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from dax_mp.errors import os_error
from dax_mp.messages import PROTOCOL_VERSION, TOKEN_BYTES

ENDPOINT_VARIABLE: Final = "DAX_MP_ENDPOINT"
LOCK_NAME: Final = "coordinator.lock"
PAGER_NAME: Final = "pager.sock"
CONTROL_NAME: Final = "control.sock"
SESSIONS_NAME: Final = "sessions"

SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path of unix(7) without its last null byte."""

REGION_NAME_PREFIX: Final = "/dax-mp-"
_REGION_NAME: Final = re.compile(REGION_NAME_PREFIX + r"[0-9a-f]{16}\.(pmem|dram)")
_SESSION_NAME: Final = re.compile(rf"[0-9a-f]{{{2 * TOKEN_BYTES}}}")


def default_endpoints(environment: Mapping[str, str], uid: int) -> tuple[str, ...]:
    """Where the coordinator of a user who names none may serve, the best place first.

    $DAX_MP_ENDPOINT and nothing else, where it is set and not empty. Else there are two places. The directory that the
    system makes for a user at login nobody else can make first, but it is not there for cron before a login, nor after
    the last logout; /tmp always is. XDG_RUNTIME_DIR and TMPDIR are not asked: cron, `su` and a login shell set them
    differently, and would not meet.
    """
    if endpoint := environment.get(ENDPOINT_VARIABLE):
        return (endpoint,)
    return (f"/run/user/{uid}/dax-mp", f"/tmp/dax-mp-{uid}")


def check_endpoint(endpoint: str) -> None:
    """Raises OSError (ENAMETOOLONG) where a socket's path in `endpoint` does not fit into a socket address.

    Raises ValueError for a NUL in it.
    """
    if "\0" in endpoint:
        raise ValueError("embedded null byte")
    path_bytes = len(os.fsencode(control_path(endpoint)))
    if path_bytes > SOCKET_PATH_BYTES_MAX:
        directory_bytes_max = SOCKET_PATH_BYTES_MAX - len(f"/{CONTROL_NAME}")
        text = f"the endpoint's path is longer than a socket's may be; take one of at most {directory_bytes_max} bytes"
        raise os_error(errno.ENAMETOOLONG, text, endpoint)


def lock_path(endpoint: str) -> str:
    return os.path.join(endpoint, LOCK_NAME)


def pager_path(endpoint: str) -> str:
    return os.path.join(endpoint, PAGER_NAME)


def control_path(endpoint: str) -> str:
    return os.path.join(endpoint, CONTROL_NAME)


def sessions_path(endpoint: str) -> str:
    return os.path.join(endpoint, SESSIONS_NAME)


def session_path(endpoint: str, token: bytes) -> str:
    """The file that the session's process creates and holds locked."""
    return os.path.join(endpoint, SESSIONS_NAME, token.hex())


def is_session_name(name: str) -> bool:
    return _SESSION_NAME.fullmatch(name) is not None


def pager_address(endpoint: str) -> str:
    """The ZeroMQ address of the pager socket."""
    return f"ipc://{pager_path(endpoint)}"


def control_address(endpoint: str) -> str:
    """The ZeroMQ address of the control socket."""
    return f"ipc://{control_path(endpoint)}"


def region_name(unique: str, kind: str) -> str:
    """The name of a region's shared-memory object. unique: 16 hex digits. kind: pmem or dram."""
    name = f"{REGION_NAME_PREFIX}{unique}.{kind}"
    assert _REGION_NAME.fullmatch(name), f"a region that would not be recognised as one: {name}"
    return name


class Record(NamedTuple):
    """What a coordinator writes into its lock file before it makes anything, so that a successor can clean up."""

    pid: int
    region_names: tuple[str, ...]
    version: int = PROTOCOL_VERSION

    def encode(self) -> bytes:
        return json.dumps(self._asdict()).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> "Record | None":
        """The record in `data`; None where there is none, or only a part of one, whatever else the bytes are.

        Names that are not a region's are left out: what is read here is unlinked.
        """
        try:
            fields = json.loads(data)
            names = [name for name in fields["region_names"] if _REGION_NAME.fullmatch(name)]
            return cls(int(fields["pid"]), tuple(names), int(fields["version"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # the last two: 1e400, [[[[...
            return None


# struct flock of a 64-bit Linux: type, whence, start, length, pid. From the start, length 0: the whole file.
_FLOCK: Final = struct.Struct("@hhqqi4x")
_F_WRLCK: Final = 1
_F_UNLCK: Final = 2

LOCK_QUERY: Final = _FLOCK.pack(_F_WRLCK, 0, 0, 0, 0)
"""The argument of fcntl(F_GETLK) that asks who holds the file."""


def lock_holder(answer: bytes) -> int | None:
    """The process that holds the lock, from what fcntl(F_GETLK) answered to LOCK_QUERY; None where nobody does.

    0 or less stands for a holder without a pid here: it lives in another pid namespace, or the lock is an OFD lock.
    """
    lock_type, _, _, _, pid = _FLOCK.unpack(answer)
    return None if lock_type == _F_UNLCK else pid
