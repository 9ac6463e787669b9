"""`dax-mp serve`: the options, and what the end of it looks like from outside.

Exit codes: 0 after a signal or the launcher's end, 1 for what the user can mend (one line on stderr), 2 for wrong
usage, 70 for a bug in here (EX_SOFTWARE, with what was seen).
"""

import argparse
import errno
import os
import sys
from typing import Any, Final

from dax_mp.daemons.daemonize import daemonize
from dax_mp.daemons.signals import Stopped, StopSignals
from dax_mp.delays import STEPS, check_delay
from dax_mp.sizes import parse_size

EXIT_ERROR: Final = 1
EXIT_BUG: Final = 70


def main() -> int:
    _open_standard_descriptors()
    signals = StopSignals()
    options = _options()
    if options.daemonize:
        launched = daemonize(options)
        if launched is not None:
            return launched
    try:
        # Imported only now that signals wait, so that Ctrl-C does not land in the middle of an import.
        from dax_mp.daemons.start import InternalError, report, serve
    except (ImportError, MemoryError, OSError) as error:
        print(f"dax-mp serve: Python cannot load what it takes: {error or 'no memory (ulimit -v)'}", file=sys.stderr)
        return EXIT_ERROR
    try:
        serve(options, signals)
    except MemoryError:
        print("dax-mp serve: there is not enough memory to start (ulimit -v)", file=sys.stderr)
        return EXIT_ERROR
    except Stopped as stopped:
        report(options.ready_fd, {"error": str(stopped), "errno": errno.EINTR})
    except OSError as error:
        text = _one_line(error)
        if options.ready_fd is None:
            print(f"dax-mp serve: {text}", file=sys.stderr)
        else:  # the launcher says it in its own way
            report(options.ready_fd, {"error": text, "errno": error.errno})
        return EXIT_ERROR
    except InternalError:
        print(
            "dax-mp serve: this is a bug in dax-mp; the coordinator has removed what it made and ends", file=sys.stderr
        )
        return EXIT_BUG
    return 0


def _open_standard_descriptors() -> None:
    """Where our parent has closed one of the first three, no file of ours may get its number: others write there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _options() -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args()
    if options.daemonize and (options.log == "-" or options.exit_with is not None or options.ready_fd is not None):
        parser.error("--daemonize: it has no stderr (--log -) and no launcher (--exit-with, --ready-fd)")
    return options


class _Help(argparse.HelpFormatter):
    """Help that looks as that of the other commands, which click makes."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=80)

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, "Usage: ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dax-mp serve",
        usage="dax-mp serve [OPTIONS]",
        description="  Serve a PMem device to the processes of one user, until SIGTERM or Ctrl-C.",
        formatter_class=_Help,
        add_help=False,
    )
    options = parser.add_argument_group("Options")
    options.add_argument("--size", type=_size, default="1GiB", help="Size of the PMem region. [default: 1GiB]")
    options.add_argument(
        "--hole-policy",
        choices=["zero", "page-cache"],
        default="zero",
        help="What holes are read from. [default: zero]",
    )
    options.add_argument(
        "--page-cache-size",
        type=_size,
        metavar="SIZE",
        help="Size of the page cache, for its hole policy. [default: an eighth of --size]",
    )
    options.add_argument(
        "--endpoint",
        metavar="DIR",
        help="Directory where to serve. [default: $DAX_MP_ENDPOINT, else the user's own]",
    )
    options.add_argument("--no-reserve", action="store_true", help="Take memory only as it is used.")
    options.add_argument("--daemonize", action="store_true", help="Return when it serves, and let it serve behind us.")
    options.add_argument(
        "--ack-timeout",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="Evict a process that does not let go of pages after that time. [default: 5]",
    )
    options.add_argument(
        "--log", metavar="FILE", help="Write what happens, a line each; SIGHUP opens FILE again. [default: -, stderr]"
    )
    options.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        help="What is worth a line. [default: info; warning where it goes to stderr]",
    )
    options.add_argument("--log-json", action="store_true", help="Write lines of JSON.")
    _add_options_for_programs(options)
    options.add_argument("-h", "--help", action="help", help="Show this message and exit.")
    return parser


def _add_options_for_programs(options: "argparse._ArgumentGroup") -> None:
    """What a launcher, a test or a debugger gives."""
    options.add_argument("--exit-with", type=int, metavar="PID", help="End when that process, our parent, has ended.")
    options.add_argument(
        "--ready-fd", type=int, metavar="FD", help="Write a line of JSON there when serving, or why not."
    )
    options.add_argument(
        "--delay",
        type=_delay,
        action="append",
        default=[],
        metavar="STEP=SECONDS",
        help=f"Let every operation wait so long at this step, to see what happens then: {', '.join(STEPS)}.",
    )
    options.add_argument("--debug", action="store_true", help="Check every invariant after every event (slow).")


def _size(text: str) -> int:
    try:
        size_bytes = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size_bytes < 1:
        raise argparse.ArgumentTypeError("a region has at least one page")
    return size_bytes


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"not a time between 0.01 and 3600 seconds: {text!r}")
    return seconds


def _delay(text: str) -> tuple[str, float]:
    step, _, time = text.partition("=")
    try:
        check_delay(step, None)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return step, _seconds(time)


def _one_line(error: OSError) -> str:
    text = error.strerror or str(error)
    return f"{text}: {error.filename}" if error.filename else text


if __name__ == "__main__":
    sys.exit(main())
