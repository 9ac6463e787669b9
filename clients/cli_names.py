"""Names on the command line: patterns, and commands that take several and go on after one that fails.

A pattern is the shell's (`*`, `?`, `[a-z]`; fnmatch(3)), quoted so that the shell leaves it alone. As there, none but
one that begins with a dot matches a name that does, and a pattern that matches nothing is a name that is not there. A
file that is called like the pattern is meant before those that match it: `rm '*'` removes no more than asked for.
"""

import fnmatch
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from dax_mp.clients.standard_streams import OutputError, printable

if TYPE_CHECKING:
    from dax_mp.clients.session import Session

EXIT_ERROR: Final = 1

_WILDCARDS: Final = frozenset("*?[")


def complain(text: str) -> None:
    """Print the line on stderr that says what has failed."""
    with suppress(OSError):
        print("dax-mp:", printable(text), file=sys.stderr)


def one_line(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return " ".join(str(error).split())
    names = " -> ".join(str(name) or "''" for name in (error.filename, error.filename2) if name is not None)
    text = error.strerror or str(error)
    return f"{names}: {text}" if names else text


def for_each(names: Iterable[str], act: Callable[[str], None], ignore_missing: bool = False) -> int:
    """Call `act` with each name, also after one has failed. Returns the exit code: EXIT_ERROR where one has.

    ignore_missing: a file that is not there is no failure. Raises ConnectionError and OutputError: then all others
    would fail too.
    """
    exit_code = 0
    for name in names:
        try:
            act(name)
        except (ConnectionError, OutputError):
            raise
        except (OSError, ValueError) as error:
            if not (ignore_missing and isinstance(error, FileNotFoundError)):
                complain(one_line(error))
                exit_code = EXIT_ERROR
    return exit_code


def expand(session: "Session", arguments: Iterable[str]) -> Iterator[str]:
    """The names of `arguments`, with those that match in the place of a pattern."""
    there: list[str] | None = None
    for argument in arguments:
        if _WILDCARDS.isdisjoint(argument):
            yield argument
        else:
            there = session.listdir() if there is None else there
            yield from matches(argument, there) or [argument]


def matches(argument: str, names: list[str]) -> list[str]:
    """Those of `names` that the argument means, in order; none where none matches."""
    if argument in names:
        return [argument]
    hidden = argument.startswith(".")
    return [name for name in names if fnmatch.fnmatchcase(name, argument) and (hidden or not name.startswith("."))]
