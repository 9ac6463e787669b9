"""What the commands' arguments and options have in common: sizes, names of files and their completion, the endpoint."""

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click

import dax_mp
from dax_mp.clients.standard_streams import printable
from dax_mp.sizes import parse_size

if TYPE_CHECKING:
    from types import FrameType

    from click.shell_completion import CompletionItem

Command = TypeVar("Command", bound=Callable[..., Any])

COMPLETION_TIMEOUT_S: Final = 2.0
"""How long the shell waits for names from a coordinator that does not answer."""

ENDPOINT_TEXT: Final = "Directory where the coordinator serves. [default: $DAX_MP_ENDPOINT, else the user's own]"


def as_size(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """The callback of an argument that is a number of bytes: 4096, 4KiB, 1.5GiB."""
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


def endpoint_option(command: Command) -> Command:
    return click.option("--endpoint", metavar="DIR", help=ENDPOINT_TEXT)(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "json_output", is_flag=True, help="Print JSON.")(command)


def name_argument(variable: str = "name", metavar: str = "NAME", **options: Any) -> Callable[[Any], Any]:
    """An argument that names a file on the device."""
    return click.argument(variable, metavar=metavar, shell_complete=complete_name, **options)


def complete_name(context: click.Context, _: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """The names of files on the device that begin so; none where there is no coordinator that answers at once.

    A name that the shell would take apart, or a terminal obey, is left out.
    """
    from click.shell_completion import CompletionItem

    def give_up(_number: int, _frame: "FrameType | None") -> NoReturn:
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, COMPLETION_TIMEOUT_S)
    try:
        with dax_mp.connect(context.params.get("endpoint")) as session:
            names = session.listdir()
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (OSError, ValueError):
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete) and printable(name) == name]
