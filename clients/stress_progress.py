"""How far `dax-mp stress` is, on stderr where that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[float, int, int], None]
"""(seconds since the start, operations so far, processes killed so far)"""


@contextmanager
def shown_progress(seconds: float) -> Iterator[Show]:
    """A bar for as long as the block lasts; it leaves nothing on the screen. seconds: how long the run is to take."""
    if not sys.stderr.isatty():
        yield lambda elapsed_s, operations, killed: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("stress"),
        BarColumn(None),
        TextColumn("{task.completed:.0f}/{task.total:g} s"),
        TextColumn("{task.fields[operations]:,} operations, {task.fields[killed]} killed"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=seconds, operations=0, killed=0)
        yield lambda elapsed_s, operations, killed: progress.update(
            task, completed=min(elapsed_s, seconds), operations=operations, killed=killed
        )
