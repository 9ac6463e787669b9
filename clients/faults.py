"""The two ways in which page faults reach the library, of which a session has one.

`signals`: SIGSEGV, which is everywhere. `userfaultfd`: the thread sleeps in the kernel, whatever signals it blocks and
whoever handles SIGSEGV. That needs no privilege since Linux 5.11, but may be forbidden. There is no way from one to the
other behind the user's back: what cannot be had is an error.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from dax_mp.errors import os_error

ENVIRONMENT: Final = "DAX_MP_FAULTS"
WAYS: Final = ("signals", "userfaultfd")


def way(faults: str | None) -> str:
    """The way that is meant; None: what the environment says. Raises ValueError where it is none."""
    chosen = os.environ.get(ENVIRONMENT, WAYS[0]) if faults is None else faults
    if chosen not in WAYS:
        source = f"faults (from ${ENVIRONMENT})" if faults is None else "faults"
        raise ValueError(f"{source} must be one of {', '.join(map(repr, WAYS))}, not {chosen!r}")
    return chosen


_REMEDY: Final = f"or take faults='signals' ({ENVIRONMENT}=signals)"
_REASONS: Final = {
    errno.EPERM: f"userfaultfd(2) is forbidden here, by a seccomp filter as of a container: have it allowed, {_REMEDY}",
    errno.ENOSYS: f"this kernel has no userfaultfd(2): use one built with CONFIG_USERFAULTFD, {_REMEDY}",
    errno.ENOTSUP: f"this kernel's userfaultfd(2) lacks what is needed: use Linux 5.11 or newer, {_REMEDY}",
}


@contextmanager
def explained(faults: str) -> Iterator[None]:
    """Around what starts it: an OSError that says what to do."""
    try:
        yield
    except OSError as error:
        if faults == "signals" or error.errno not in _REASONS or error.filename is not None:
            raise
        raise os_error(error.errno, _REASONS[error.errno]) from None
