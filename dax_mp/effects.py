"""What the state machine wants done, in the order in which it must be done.

The daemon turns each into bytes on a socket; a simulation hands them to its clients. Effects for one token's pager are
delivered in order and never dropped while the session lives.
"""

from typing import NamedTuple

from dax_mp.messages import ControlAnswer, PagerOrder


class SendPager(NamedTuple):
    """A message to the native pager of the session `token`."""

    token: bytes
    message: PagerOrder


class SendControl(NamedTuple):
    """The answer to a request that came from `peer`, a control socket's identity."""

    peer: bytes
    message: ControlAnswer


class EndSession(NamedTuple):
    """The session holds nothing any more: its file and what watches its process can go."""

    token: bytes


Effect = SendPager | SendControl | EndSession
