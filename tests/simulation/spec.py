"""What one page of a file may show: the judge of what threads have seen.

A page is a register, and every operation on it takes effect at one moment between its beginning and its end
(linearizability, Herlihy and Wing 1990). `explains` searches for such moments. If there are none, somebody has seen a
value that was not there: a stale hole page, a lost store, another file's bytes.
"""

import errno
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from simulation.client import Failed

WITHOUT_EFFECT: Final = frozenset({errno.ENOSPC, errno.ENOMEM, errno.ESTALE, errno.EPROTO, errno.EBUSY, errno.EINVAL})
"""Errors that an operation may end with whatever the page's state is. It has then done nothing."""


class Page(NamedTuple):
    """A page of a file: does it begin before the end of the file, and what does it hold?"""

    inside: bool
    value: int


class Action(NamedTuple):
    """What an operation does to one page. name: load, store, read, write, punch, cut (truncate before it), grow.

    begin, end: moments; end is None where the operation has not ended, as when its process died: it may have taken
    effect or not. outcome: a load's or read's value, None, or Failed.
    """

    name: str
    value: int
    begin: int
    end: int | None
    outcome: Any


def apply(page: Page, action: Action) -> tuple[Page, Any]:
    """The page after the action, and the outcome that the action must have had."""
    past_end = Failed(errno.EFAULT)
    match action.name:
        case "load":
            return page, page.value if page.inside else past_end
        case "store":
            return (page._replace(value=action.value), None) if page.inside else (page, past_end)
        case "read":
            return page, page.value if page.inside else None
        case "write":
            return Page(True, action.value), None
        case "punch":
            return page._replace(value=0), None
        case "cut":
            return Page(False, 0), None
        case "grow":
            return page._replace(inside=True), None
        case name:
            raise ValueError(f"no such action: {name}")


@lru_cache(maxsize=100_000)
def _search(page: Page, actions: tuple[Action, ...]) -> bool:
    """Can the actions take effect in some order that their times allow, the first of them on `page`?"""
    if all(action.end is None for action in actions):
        return True
    first_end = min(action.end for action in actions if action.end is not None)
    for index, action in enumerate(actions):
        if action.begin > first_end:
            continue  # another one has ended before this one begins
        rest = actions[:index] + actions[index + 1 :]
        if isinstance(action.outcome, Failed) and action.outcome.errno in WITHOUT_EFFECT:
            if _search(page, rest):
                return True
            continue
        after, outcome = apply(page, action)
        if (action.end is None or outcome == action.outcome) and _search(after, rest):
            return True
    return False


def explains(page: Page, actions: Sequence[Action]) -> bool:
    """Is there an order of effects, from `page` at the start, in which every outcome is as it was?"""
    return _search(page, tuple(actions))
