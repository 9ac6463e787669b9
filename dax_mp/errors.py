"""The three kinds of failure, never mixed.

Expected ones are OSError with the errno that Linux gives, or a subclass. A peer's mistake is a ProtocolError and ends
its session. Our own bug is an AssertionError that says what it saw.
"""

import errno as errno_codes
import os


class ProtocolError(ConnectionError):
    """The other side sent what the protocol does not allow, or speaks another version of it."""

    def __init__(self, text: str) -> None:
        super().__init__(errno_codes.EPROTO, text)


class NoCoordinatorError(ConnectionError):
    """No coordinator serves at this endpoint; `command` starts one there."""

    def __init__(self, endpoint: str, reason: str = "no coordinator serves there", command: str | None = None) -> None:
        command = command or f"dax-mp serve --endpoint {endpoint}"
        super().__init__(errno_codes.ECONNREFUSED, f"{reason}; start one with: {command}", endpoint)


def os_error(errno: int, text: str | None = None, filename: str | None = None) -> OSError:
    """An OSError of the subclass that belongs to `errno` (FileNotFoundError for ENOENT, ...)."""
    return OSError(errno, text or os.strerror(errno), filename)
