"""faulthandler and the fault handler, both installed for SIGSEGV and SIGBUS.

A handler that comes first and is not ours would take every page fault for a crash. Two things put faulthandler's there:

- It was enabled before us (`python -X faulthandler`, pytest). Then `claim_signals` puts ours in front and keeps
  faulthandler's behind it: a fault outside every window still ends in its traceback.
- It is enabled or disabled after us. `enable` puts its handler in front of ours. `disable` is worse: it puts back what
  was there before `enable`, so that ours is gone without a sign.

So both calls are made as if we were not there: release the signals, call, claim them again. (A page fault of another
thread in between is a crash: enable and disable are not for the middle of the work.) The two functions of the module
are replaced by such wrappers; who has imported the originals by name before the first session has to call
`claim_signals` after them.
"""

import faulthandler
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from dax_mp import mmu

P = ParamSpec("P")
R = TypeVar("R")

_wrapped = False


def keep_fault_handler_first() -> None:
    """Put the fault handler in front now, and let no later faulthandler.enable() or disable() change that."""
    global _wrapped
    if not _wrapped:
        _wrapped = True
        faulthandler.enable = _around(faulthandler.enable)
        faulthandler.disable = _around(faulthandler.disable)
    mmu.claim_signals()


def _around(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        mmu.release_signals()
        try:
            return function(*args, **kwargs)
        finally:
            mmu.claim_signals()

    return call
