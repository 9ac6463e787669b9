"""Operations of several steps, and what they wait for.

An operation (a fault, a truncate, a write) is one generator that reads from top to bottom like the kernel's function.
Where it has to wait it yields a `Completion`: a lock's grant, or the last acknowledgement of an unmap. The `Scheduler`
runs each generator until it waits for something that is not done.

Rules:
- A completion has one waiter. Completing it makes the waiter ready; it runs from the scheduler's loop, never inside the
  event that completed it, so no operation sees another's half-done step.
- Ready operations run in the order in which they became ready. Nothing here depends on time or on the order of a set.
"""

from collections import deque
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


class Completion:
    """Something that will be done once."""

    __slots__ = ("_scheduler", "_waiter", "done")

    def __init__(self, scheduler: "Scheduler") -> None:
        self._scheduler = scheduler
        self._waiter: Steps[None] | None = None
        self.done = False

    def complete(self) -> None:
        assert not self.done, "completed twice"
        self.done = True
        if self._waiter is not None:
            self._scheduler.ready.append(self._waiter)
            self._waiter = None

    def wait(self, waiter: "Steps[None]") -> None:
        assert self._waiter is None, "a completion has one waiter"
        self._waiter = waiter


Steps = Generator[Completion, None, T]


class Scheduler:
    """Runs operations until they wait."""

    __slots__ = ("ready",)

    def __init__(self) -> None:
        self.ready: deque[Steps[None]] = deque()

    def start(self, steps: Steps[None]) -> None:
        """Run a new operation until it waits or ends."""
        for completion in steps:
            if not completion.done:
                completion.wait(steps)
                return

    def run(self) -> None:
        """Run whatever has become ready, and what that makes ready, until nothing is."""
        while self.ready:
            self.start(self.ready.popleft())
