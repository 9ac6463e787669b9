"""What is to be undone, last step first, also where an exception comes between two bytecodes.

`contextlib.ExitStack` forgets a step before it takes it: one that is interrupted is lost. Here a step is forgotten when
it is done, so `close` can be called again. So each step must have nothing to do where it has been taken already.
"""

import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any


class Undo:
    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def callback(self, step: Callable[..., Any], *args: Any) -> None:
        self._steps.append(partial(step, *args))

    def close(self) -> None:
        """Take the steps that have not been taken to their end. Raises what the first of them raises that does."""
        while self._steps:
            step = self._steps[-1]
            step()
            if step in self._steps:  # another thread has not
                self._steps.remove(step)

    def close_if(self, failed: bool) -> None:
        """`close` as the conclusion of `mmu.settled`."""
        if failed:
            self.close()


def close_all(fds: list[int]) -> None:
    """Close the descriptors and take them from the list, in one bytecode: none is closed twice, none is forgotten."""
    deque(map(os.close, map(list.pop, [fds] * len(fds))), 0)
