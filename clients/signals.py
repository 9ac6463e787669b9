"""Whatever else handles SIGSEGV and SIGBUS, and the fault handler, which has to be the first.

A handler that comes before ours takes every page fault for a crash. Two parts of the standard library install handlers:

- `signal.signal`. What the program sets there comes behind our handler: a callable gets the signals that are no page
  faults of ours, SIG_DFL and SIG_IGN say what becomes of those. `signal.signal` and `signal.getsignal` know nothing of
  our handler, so they return what the program has set before.
- faulthandler. Where it was enabled before us (`python -X faulthandler`, pytest), `claim_signals` puts ours in front
  and keeps faulthandler's behind it: a fault outside every window still ends in its traceback. `enable` after that puts
  its handler in front of ours; `disable` puts back what was there before `enable`, so that ours is gone without a sign.

So these calls are made as if we were not there. Around faulthandler's, which look at what is installed, the signals are
released before and claimed again behind; `signal.signal` only installs, and the signals are claimed again behind it.
(A page fault of another thread in between is a crash: none of this is for the middle of the work.) The functions are
replaced in their modules. `signal.signal` finds the one that it is made of, `_signal.signal`, at each call, so that it
does not matter who has imported it by name; who has imported faulthandler's by name before the first session has to
call `claim_signals` after them.

What C code installs by sigaction(2) stands in front of ours until the next mapping is made, which claims the signals.
Then it is the next in the chain.
"""

import faulthandler
import functools
import importlib
import signal
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

from dax_mp import mmu

P = ParamSpec("P")
R = TypeVar("R")

_SIGNALS: Final = (signal.SIGSEGV, signal.SIGBUS)

_wrapped = False


def keep_fault_handler_first() -> None:
    """Put the fault handler in front now, and let no later call of the standard library change that."""
    global _wrapped
    if not _wrapped:
        _wrapped = True
        faulthandler.enable = _around(faulthandler.enable)
        faulthandler.disable = _around(faulthandler.disable)
        module: Any = importlib.import_module("_signal")
        module.signal = _behind_ours(module.signal)
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


def _behind_ours(set_handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(set_handler)
    def call(*args: Any) -> Any:
        try:
            return set_handler(*args)
        finally:
            if args and args[0] in _SIGNALS:
                mmu.claim_signals()

    return call
