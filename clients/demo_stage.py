"""The stage of the demo: it has the actors do their steps, prints what they did and saw, and judges it.

Each step is printed in a line: who, what, what came of it, and which events the coordinator counted meanwhile. What
came is compared with what was expected, value and events; every difference is printed where it shows, and the demo has
failed.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dax_mp.clients.demo_actor import ActorProcess
from dax_mp.clients.launch import Daemon, launch
from dax_mp.clients.session import connect

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from dax_mp.clients.page_table import PageTableEntry

EVENTS: Final = {
    "read_holes": "hole read",
    "read_blocks": "block read",
    "write_holes": "hole write",
    "write_blocks": "block write",
    "bus_errors": "past the end",
    "unmaps": "unmap",
    "evictions": "eviction",
    "reclaims": "page reclaimed",
}
"""The coordinator's counters that a step may change: faults by kind, and what the coordinator did."""

_FAULTS: Final = ("read_holes", "read_blocks", "write_holes", "write_blocks", "bus_errors")
_ACTION_COLUMNS: Final = 32
_OUTCOME_COLUMNS: Final = 23


class Judge:
    """What was expected and what was seen, of the whole demo."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.checks = 0
        self.failures: list[str] = []

    def expect(self, what: str, expected: object, seen: object) -> None:
        self.checks += 1
        if expected != seen:
            self.failures.append(f"{what}: expected {expected}, saw {seen}")
            self._console.print(f"   [bold red]not as expected[/]: {escape(self.failures[-1])}")


class Stage:
    """A coordinator, its actors, and a session of the director's own, for as long as the `with` block lasts.

    names: of the actors, one letter each. timeout_s: how long one of them may take for one step.
    """

    def __init__(
        self,
        console: Console,
        judge: Judge,
        names: str,
        size_bytes: int,
        hole_policy: str,
        page_cache_bytes: int | None,
        timeout_s: float,
    ) -> None:
        self.console = console
        self.judge = judge
        with ExitStack() as stack:
            self.daemon: Daemon = stack.enter_context(launch(size_bytes, hole_policy, page_cache_bytes))
            self.session = stack.enter_context(connect(self.daemon.endpoint))
            self.actors: list[ActorProcess] = []
            for name in names:
                self.actors.append(ActorProcess(name, self.daemon.endpoint, timeout_s))
                stack.callback(self.actors[-1].close)
            self._undo = stack.pop_all()

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: "TracebackType | None"
    ) -> None:
        self._undo.close()

    @property
    def page_size(self) -> int:
        return self.session.page_size

    def cast(self) -> str:
        """Who is who."""
        return f"coordinator {self.daemon.pid}, " + ", ".join(f"{actor.name} {actor.pid}" for actor in self.actors)

    # --- steps -----------------------------------------------------------------------------------------------------

    def step(
        self,
        actor: ActorProcess,
        action: str,
        command: str,
        *arguments: object,
        expect: object = None,
        **events: int,
    ) -> Any:
        """Have the actor do one thing; print and judge it. events: what the coordinator is to count, by counter."""
        before = self.session.statfs().counters
        seen = actor.tell(command, *arguments)
        after = self.session.statfs().counters
        counted = {name: after[name] - before[name] for name in EVENTS if after[name] != before[name]}
        self._print_step(actor.name, action, _outcome(seen), _event_text(counted))
        self.judge.expect(f"{actor.name} {action}", _outcome(expect), _outcome(seen))
        self.judge.expect(f"{actor.name} {action}, events", events, counted)
        return seen

    def question(self, number: int, *lines: str) -> None:
        """Print what is to be found out, and the head of the steps' columns."""
        self.console.print(f"\n[bold]Question {number}.[/] " + "\n".join(lines))
        self.console.print(f"[dim]{_columns('     step', 'sees', 'faults and unmaps', indent=5)}[/]")

    def note(self, text: str) -> None:
        """Print what the director has found out by itself."""
        self.console.print(f"     {text}", soft_wrap=True)

    def _print_step(self, who: str, action: str, outcome: str, events: str) -> None:
        self.console.print(f"   [bold cyan]{who}[/] {_columns(action, outcome, events)}", soft_wrap=True)

    # --- page tables -----------------------------------------------------------------------------------------------

    def page_tables(self, when: str, pages: int) -> "list[dict[int, PageTableEntry]]":
        """Print what the kernel has mapped in the first two actors; return it by page."""
        tables = [actor.tell("page_table") for actor in self.actors[:2]]
        by_page = [{entry.pgoff: entry for entry in _single_pages(table)} for table in tables]
        view = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        view.add_column(f"     {when}", width=18)
        for actor in self.actors[:2]:
            view.add_column(f"{actor.name} has mapped", width=27)
        for first, end in pairwise(_boundaries(tables, pages)):
            name = f"page {first}" if end == first + 1 else f"pages {first}-{end - 1}"
            view.add_row(f"     {name}", *(_entry_text(table.get(first), end - first) for table in by_page))
        self.console.print(view)
        return by_page


def _columns(action: str, outcome: str, events: str, indent: int = 0) -> str:
    return f"{action:{_ACTION_COLUMNS + indent}} {outcome:{_OUTCOME_COLUMNS}} {events}".rstrip()


def _outcome(value: object) -> str:
    """What an actor saw, in a word or two."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return f'"{value.decode("ascii", "backslashreplace")}"' if any(value) else "zeros"
    return str(value)


def _event_text(counted: dict[str, int]) -> str:
    faults = [EVENTS[name] for name in _FAULTS if name in counted]
    others = [f"{count} {EVENTS[name]}{'s' * (count > 1)}" for name, count in counted.items() if name not in _FAULTS]
    return ", ".join(faults + others)


def _single_pages(table: "list[PageTableEntry]") -> "Iterator[PageTableEntry]":
    for entry in table:
        for step in range(entry.length_pages):
            pfn = entry.pfn + step if entry.target in ("pmem", "dram") else 0
            yield entry._replace(pgoff=entry.pgoff + step, length_pages=1, pfn=pfn)


def _boundaries(tables: "list[list[PageTableEntry]]", pages: int) -> list[int]:
    """Where in [0, pages) any of the tables changes."""
    edges = {0, pages}
    for table in tables:
        for entry in table:
            edges |= {entry.pgoff, entry.pgoff + entry.length_pages}
    return sorted(edges)


def _entry_text(first: "PageTableEntry | None", pages: int) -> str:
    """What `pages` pages are mapped to, of which this is the first."""
    if first is None:
        return "-"
    frames = f"frame {first.pfn}" if pages == 1 else f"frames {first.pfn}-{first.pfn + pages - 1}"
    name = {"pmem": f"PMem {frames}", "dram": f"page cache {frames}", "zero": "zero page"}.get(
        first.target, first.target
    )
    return f"{name}, {'rw' if first.writable else 'ro'}"
