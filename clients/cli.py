"""dax-mp: the command line.

Every command is a few calls of the library. What can go wrong for a user is one line on stderr, `dax-mp: ...`, and an
exit code: 1 for what failed, 2 for wrong usage, 130 for Ctrl-C. A reader of the output that goes away (`| head`) is not
worth a line.

The parts that take long to import (rich, the demo) are imported by the commands that use them.
"""

import os
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar

import click

import dax_mp
from dax_mp.clients import cli_copy, cli_show
from dax_mp.clients.launch import HOLE_POLICIES, module_command, module_environment
from dax_mp.sizes import parse_size

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130

Command = TypeVar("Command", bound=Callable[..., Any])


def _size(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """The callback of an argument that is a number of bytes: 4096, 4KiB, 1.5GiB."""
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


def endpoint_option(command: Command) -> Command:
    text = "Where the coordinator serves ($DAX_MP_ENDPOINT, else the user's own)."
    return click.option("--endpoint", metavar="DIR", help=text)(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "json_output", is_flag=True, help="Print JSON.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(dax_mp.__version__, prog_name="dax-mp")
@click.pass_context
def commands(context: click.Context) -> None:
    """A DAX file system in user space, for many processes on one machine."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(EXIT_USAGE)


# --- the coordinator -----------------------------------------------------------------------------------------------


@commands.command(
    context_settings={"ignore_unknown_options": True}, add_help_option=False, short_help="Serve a PMem device."
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Serve a PMem device to the processes of one user, until SIGTERM or Ctrl-C."""
    command = module_command("dax_mp.daemons.serve", *arguments)
    os.execve(command[0], command, module_environment())


# --- files ---------------------------------------------------------------------------------------------------------


@commands.command()
@click.argument("file", metavar="FILE")
@click.argument("name", metavar="[NAME]", required=False)
@endpoint_option
def put(file: str, name: str | None, endpoint: str | None) -> None:
    """Copy FILE (- for stdin) in, as NAME; its holes stay holes."""
    if name is None and file == cli_copy.STREAM:
        raise click.UsageError("stdin has no name: give one (put - NAME)")
    target = os.path.basename(file) if name is None else name
    if not target or "/" in target:
        raise click.UsageError(f"{target!r} is no file name: there are no directories")
    with dax_mp.connect(endpoint) as session:
        cli_copy.put(session, file, target)


@commands.command()
@click.argument("name", metavar="NAME")
@click.argument("file", metavar="[FILE]", required=False)
@endpoint_option
def get(name: str, file: str | None, endpoint: str | None) -> None:
    """Copy NAME out, to FILE (- for stdout); its holes stay holes."""
    with dax_mp.connect(endpoint) as session:
        cli_copy.get(session, name, name if file is None else file)


@commands.command()
@click.argument("name", metavar="NAME")
@click.argument("size", metavar="SIZE", callback=_size)
@click.option("--create", is_flag=True, help="Make the file if it is not there.")
@endpoint_option
def truncate(name: str, size: int, create: bool, endpoint: str | None) -> None:
    """Make NAME SIZE long: what is past it goes, what is added is a hole."""
    with dax_mp.connect(endpoint) as session, session.open(name, "a" if create else "r+") as file:
        file.truncate(size)


@commands.command()
@click.argument("name", metavar="NAME")
@click.argument("offset", metavar="OFFSET", callback=_size)
@click.argument("length", metavar="LENGTH", callback=_size)
@endpoint_option
def punch(name: str, offset: int, length: int, endpoint: str | None) -> None:
    """Make a hole in NAME: LENGTH bytes from OFFSET on read as zero, and whole pages give their blocks back."""
    with dax_mp.connect(endpoint) as session, session.open(name, "r+") as file:
        file.punch_hole(offset, length)


@commands.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@endpoint_option
def rm(names: tuple[str, ...], endpoint: str | None) -> None:
    """Remove files. One that is mapped lives on until its last user is gone."""
    with dax_mp.connect(endpoint) as session:
        for name in names:
            session.unlink(name)


# --- what is there -------------------------------------------------------------------------------------------------


@commands.command()
@json_option
@endpoint_option
def ls(json_output: bool, endpoint: str | None) -> None:
    """List the files: size, what they take on the device, and how many processes have them mapped."""
    with dax_mp.connect(endpoint) as session:
        cli_show.show_files(session.scandir(), session.page_size, json_output)


@commands.command()
@click.argument("name", metavar="NAME")
@json_option
@endpoint_option
def stat(name: str, json_output: bool, endpoint: str | None) -> None:
    """Print what is known of a file, and who has it mapped."""
    with dax_mp.connect(endpoint) as session:
        cli_show.show_file(session.stat(name), session.page_size, json_output)


@commands.command()
@click.argument("name", metavar="NAME")
@json_option
@endpoint_option
def maps(name: str, json_output: bool, endpoint: str | None) -> None:
    """Print the rmap of a file: every process and VMA that has it mapped, and which pages."""
    with dax_mp.connect(endpoint) as session:
        cli_show.show_maps(session.maps(name), json_output)


@commands.command()
@json_option
@endpoint_option
def df(json_output: bool, endpoint: str | None) -> None:
    """Print how full the device is, who uses it, and what has happened on it."""
    with dax_mp.connect(endpoint) as session:
        cli_show.show_device(session.statfs(), json_output)


# --- seeing it work ------------------------------------------------------------------------------------------------


@commands.command()
@click.option("--size", callback=_size, help="Of the device.")
def demo(size: int | None) -> int:
    """Watch processes share a sparse file: holes and truncates, invalidated across them."""
    from rich.console import Console

    from dax_mp.clients.demo import run_demo

    return run_demo(Console(highlight=False), size=size)


@commands.command()
@click.option("--processes", type=click.IntRange(1, 256), default=8, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 86400), default=10.0, show_default=True)
@click.option("--seed", type=int, help="Of the random choices. Default: a new one, which is printed.")
@click.option("--hole-policy", type=click.Choice(HOLE_POLICIES), default="zero", show_default=True)
@click.option("--no-kill", is_flag=True, help="Let every process live: else one is killed now and then.")
@json_option
def stress(processes: int, seconds: float, seed: int | None, hole_policy: str, no_kill: bool, json_output: bool) -> int:
    """Let many processes use shared files at random, and check every byte that they see."""
    from dax_mp.clients.stress import run_stress

    return run_stress(processes, seconds, seed, hole_policy, json_output, kill=not no_kill)


# --- the frame around them -----------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Run the command that the arguments name, and end the process with its exit code."""
    try:
        exit_code = commands.main(prog_name="dax-mp", standalone_mode=False)
        sys.stdout.flush()  # here, where it can still be caught that nobody reads it
    except click.Abort:
        exit_code = EXIT_INTERRUPTED
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "dax-mp"
        _complain(f"{error.format_message()} (see: {command} --help)")
        exit_code = EXIT_USAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        exit_code = EXIT_ERROR
    except (OSError, ValueError) as error:
        _complain(_one_line(error))
        exit_code = EXIT_ERROR
    sys.exit(exit_code)


def _one_line(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    text = error.strerror or str(error)
    return f"{names}: {text}" if names else text


def _complain(text: str) -> None:
    print("dax-mp:", " ".join(text.split()), file=sys.stderr)


if __name__ == "__main__":
    main()
