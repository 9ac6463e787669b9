"""dax-mp: the command line.

Every command is a few calls of the library. What can go wrong for a user is one line on stderr, `dax-mp: ...`, and an
exit code: 1 for what failed, 2 for wrong usage, 130 for Ctrl-C. A reader of the output that goes away (`| head`) is not
worth a line. Names come from anybody: for people they are printed with their control characters escaped.

The parts that take long to import (rich, the demo) are imported by the commands that use them.
"""

import os
import sys
from typing import Final, NoReturn

import click

import dax_mp
from dax_mp.clients import cli_files, cli_show, standard_streams
from dax_mp.clients.cli_names import EXIT_ERROR, complain, matches, one_line
from dax_mp.clients.cli_options import as_size, endpoint_option, json_option, name_argument
from dax_mp.clients.interrupts import EXIT_INTERRUPTED, end_on_interrupt
from dax_mp.clients.launch import HOLE_POLICIES, module_command, module_environment
from dax_mp.clients.standard_streams import OutputError

EXIT_USAGE: Final = 2
SHELLS: Final = ("bash", "zsh", "fish")

SECTIONS: Final = {
    "The coordinator": ("serve", "df"),
    "Files": ("put", "get", "ls", "stat", "maps", "cat", "cp", "mv", "rm", "touch", "xattr"),
    "Their space": ("truncate", "fallocate", "punch"),
    "Seeing it work": ("demo", "stress"),
    "The shell": ("completion",),
}


class _Commands(click.Group):
    """Its help lists the commands by section."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(60)) for name in names])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(dax_mp.__version__, prog_name="dax-mp")
@click.pass_context
def commands(context: click.Context) -> None:
    """A DAX file system in user space, for many processes on one machine.

    `dax-mp COMMAND --help` says more of each command.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(EXIT_USAGE)


for _command in (
    *(cli_files.put, cli_files.get, cli_files.cat, cli_files.cp, cli_files.mv, cli_files.rm, cli_files.touch),
    *(cli_files.truncate, cli_files.fallocate, cli_files.punch, cli_files.xattr),
):
    commands.add_command(_command)


# --- the coordinator -----------------------------------------------------------------------------------------------


@commands.command(
    context_settings={"ignore_unknown_options": True}, add_help_option=False, short_help="Serve a PMem device."
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Serve a PMem device to the processes of one user, until SIGTERM or Ctrl-C."""
    standard_streams.silence_closed()
    command = module_command("dax_mp.daemons.serve", *arguments)
    os.execve(command[0], command, module_environment())


# --- what is there -------------------------------------------------------------------------------------------------


@commands.command()
@name_argument("names", "[NAME]...", nargs=-1)
@json_option
@endpoint_option
def ls(names: tuple[str, ...], json_output: bool, endpoint: str | None) -> int:
    """List files, with their sizes and the number of processes that have them mapped.

    ALLOCATED is what a file takes on the device: its holes take nothing. A NAME may be a pattern ('*.log', quoted).
    Without a NAME all files are listed.
    """
    exit_code = 0
    with dax_mp.connect(endpoint) as session:
        files = session.scandir()
        if names:
            by_name = {file.name: file for file in files if file.name is not None}
            chosen = dict.fromkeys(name for argument in names for name in matches(argument, list(by_name)))
            files = [by_name[name] for name in chosen]
            for argument in names:
                if not matches(argument, list(by_name)):
                    complain(f"{argument}: {os.strerror(2)}")
                    exit_code = EXIT_ERROR
        if files or not names:
            cli_show.show_files(files, session.page_size, json_output)
    return exit_code


@commands.command()
@name_argument()
@json_option
@endpoint_option
def stat(name: str, json_output: bool, endpoint: str | None) -> None:
    """Print the metadata of a file, and which processes have it mapped."""
    with dax_mp.connect(endpoint) as session:
        cli_show.show_file(session.stat(name), session.page_size, json_output)


@commands.command()
@name_argument()
@json_option
@endpoint_option
def maps(name: str, json_output: bool, endpoint: str | None) -> None:
    """Print the rmap of a file.

    That is every process and VMA that has the file mapped, and which pages.
    """
    with dax_mp.connect(endpoint) as session:
        cli_show.show_maps(session.maps(name), json_output)


@commands.command()
@json_option
@endpoint_option
def df(json_output: bool, endpoint: str | None) -> None:
    """Print how full the device is.

    And how many sessions use it, and what has happened on it.
    """
    with dax_mp.connect(endpoint) as session:
        cli_show.show_device(session.statfs(), json_output)


# --- seeing it work ------------------------------------------------------------------------------------------------


@commands.command()
@click.option("--size", metavar="SIZE", callback=as_size, help="Size of the device. [default: 32MiB]")
def demo(size: int | None) -> int:
    """Watch processes share a sparse file.

    Holes are filled and files truncated; each step shows which processes lose which page.
    """
    from rich.console import Console

    from dax_mp.clients.demo import run_demo

    return run_demo(Console(highlight=False), size=size)


@commands.command()
@click.option("--processes", metavar="NUMBER", type=click.IntRange(1, 256), default=8, help="How many. [default: 8]")
@click.option(
    "--seconds", metavar="SECONDS", type=click.FloatRange(0.1, 86400), default=10.0, help="How long. [default: 10]"
)
@click.option(
    "--seed", metavar="NUMBER", type=int, help="Seed of the random choices. [default: a new one, which is printed]"
)
@click.option(
    "--hole-policy", type=click.Choice(HOLE_POLICIES), default="zero", help="What holes are read from. [default: zero]"
)
@click.option("--no-kill", is_flag=True, help="Let every process live. [default: one is killed now and then]")
@json_option
def stress(processes: int, seconds: float, seed: int | None, hole_policy: str, no_kill: bool, json_output: bool) -> int:
    """Let many processes use shared files at random, and check what they see.

    They do it on a device of their own. Every byte is checked.
    """
    from dax_mp.clients.stress import run_stress

    return run_stress(processes, seconds, seed, hole_policy, json_output, kill=not no_kill)


# --- the shell -----------------------------------------------------------------------------------------------------


@commands.command()
@click.argument("shell", metavar="|".join(SHELLS), type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that lets a shell complete commands, options and names.

    Names are those of files on the device.

    \b
    bash, in ~/.bashrc:  eval "$(dax-mp completion bash)"
    zsh, in ~/.zshrc:    eval "$(dax-mp completion zsh)"
    fish:                dax-mp completion fish > ~/.config/fish/completions/dax-mp.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(commands, {}, "dax-mp", "_DAX_MP_COMPLETE").source())


# --- the frame around them -----------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Run the command that the arguments name, and end the process with its exit code."""
    standard_streams.prepare()
    try:
        exit_code = _run()
        sys.stdout.flush()  # here, where it can still be said that it has failed
    except KeyboardInterrupt:
        standard_streams.drop_output()
        exit_code = EXIT_INTERRUPTED
    except BrokenPipeError:
        standard_streams.drop_output()
        exit_code = EXIT_ERROR
    except OutputError as error:
        standard_streams.drop_output()
        complain(one_line(error))
        exit_code = EXIT_ERROR
    end_on_interrupt()
    sys.exit(exit_code)


def _run() -> int:
    """Returns the exit code. Raises KeyboardInterrupt, and what stdout raises."""
    try:
        return commands.main(prog_name="dax-mp", standalone_mode=False) or 0
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "dax-mp"
        complain(" ".join(f"{error.format_message()} (see: {command} --help)".split()))
        return EXIT_USAGE
    except (BrokenPipeError, OutputError):
        raise
    except (OSError, ValueError) as error:
        complain(one_line(error))
        return EXIT_ERROR
