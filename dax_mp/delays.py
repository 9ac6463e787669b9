"""Delays at named steps of an operation, for tests of what may happen there.

An operation runs without interruption from one wait to the next, so a race that needs something to happen between two
of its steps has no room. A delay makes room: a step of that name then waits, as if for a lock, and everything else goes
on. Nothing is delayed by default, and a step costs a look into an empty dictionary.

Two ways: a test *holds* a step and lets it go by hand; `dax-mp serve --delay STEP=SECONDS` lets it go by the clock.
"""

from typing import Final

from dax_mp.timers import Timers
from dax_mp.transaction import Completion, Scheduler

STEPS: Final = (
    "fault.entry_locked",  # the page is locked, and not looked up yet
    "fault.block_allocated",  # the hole has its block, and its hole page is still mapped
    "fault.before_map",  # the hole page is gone, and the Map not sent
    "fill.allocated",  # a write, or a pin: the holes have their blocks, and their hole pages are still mapped
    "write.before_copy",  # the hole pages are gone, and the data not stored
    "truncate.size_set",  # nothing is unmapped yet
    "truncate.unmapped",  # nobody maps the blocks, and they are not free yet
    "punch.unmapped",
    "shift.unmapped",
)
"""The steps that can be delayed, and how things stand there."""


def check_delay(step: str, seconds: float | None) -> None:
    """Raises ValueError where that is no step, or no time. seconds: None for a step that is held."""
    if step not in STEPS:
        raise ValueError(f"{step!r} is no step: {', '.join(STEPS)}")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"{step} cannot be delayed by {seconds} s")


class Delays:
    """Which steps are delayed, and the operations that a test holds at one."""

    def __init__(self, scheduler: Scheduler, timers: Timers) -> None:
        self._scheduler = scheduler
        self._timers = timers
        self._seconds: dict[str, float | None] = {}
        self._held: dict[str, list[Completion]] = {}

    def hold(self, step: str) -> None:
        """Let every operation wait at this step until `let_go`."""
        check_delay(step, None)
        self._seconds[step] = None

    def delay(self, step: str, seconds: float) -> None:
        """Let every operation wait at this step for so long. Raises ValueError: no such step, or no such time."""
        check_delay(step, seconds)
        self._seconds[step] = seconds

    def __bool__(self) -> bool:
        """Is any step delayed?"""
        return bool(self._seconds)

    def at(self, step: str) -> Completion | None:
        """What an operation that is at this step has to wait for; None where it goes on."""
        if step not in self._seconds:
            return None
        seconds = self._seconds[step]
        if seconds is not None:
            return self._timers.at(self._timers.now_s + seconds)
        held = Completion(self._scheduler)
        self._held.setdefault(step, []).append(held)
        return held

    def pass_by(self, step: str) -> None:
        """Let who comes to this step from now on pass it; who is held there stays."""
        self._seconds.pop(step, None)

    def let_go(self, step: str) -> int:
        """Delay this step no more, and let those that are held at it go on. Returns how many did."""
        self.pass_by(step)
        held = self._held.pop(step, [])
        for completion in held:
            completion.complete()
        return len(held)
