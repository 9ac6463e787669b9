"""How many sessions and connections the limit of open files carries (RLIMIT_NOFILE), so that it is never reached.

A session has a pidfd and its pager's connection, and each control connection is a descriptor too. Room for them is
taken before they are; who comes when there is none is told so (EMFILE), over a connection that is there for such cases:
those who have not got a session yet share a few places, and the rest wait in the listener's queue.
"""

import errno
import os
import resource
from typing import Final

from dax_mp.errors import os_error

SESSION_DESCRIPTORS: Final = 2
"""Its pidfd and its pager's connection."""
CONNECTION_DESCRIPTORS: Final = 1
"""A control connection."""
MARGIN_DESCRIPTORS: Final = 24
"""For what is opened after the count (sockets, epolls), and for a moment only: a session's file, the log's new one."""
STRANGERS_MAX: Final = 64
"""Places on each socket for connections that have not got a session yet."""


def raise_limit() -> None:
    """To what this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Descriptors:
    """The descriptors that are not in use now. Raises OSError (EMFILE) where they do not carry one session."""

    def __init__(self) -> None:
        self._limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        there = self._limit - len(os.listdir("/proc/self/fd")) - MARGIN_DESCRIPTORS
        self.strangers_max: Final = min(STRANGERS_MAX, there // 8)
        self._free = there - 2 * self.strangers_max
        if self.strangers_max < 1 or self._free < SESSION_DESCRIPTORS + CONNECTION_DESCRIPTORS:
            text = f"this process may have {self._limit} files open, too few to serve anybody; raise it with ulimit -n"
            raise os_error(errno.EMFILE, text)

    def take(self, count: int) -> None:
        """Raises OSError (EMFILE) where there are not that many."""
        if count > self._free:
            text = f"the coordinator may have {self._limit} files open, and they are all taken; start it under a larger"
            raise os_error(errno.EMFILE, f"{text} limit (ulimit -n), or end other sessions")
        self._free -= count

    def give_back(self, count: int) -> None:
        self._free += count
