"""`dax-mp demo`: the two questions that were asked when DAX went into Linux, played by real processes.

For each hole policy a coordinator and two clients, A and B; then a real file, mapped and hashed by four. Every step's
outcome is known beforehand: what is loaded, which faults and unmaps it takes, what the kernel has mapped in A and in B.
Anything else ends in exit code 1, with what was expected and what was seen.
"""

import hashlib
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.markup import escape
from rich.table import Table

from dax_mp.clients.child import ChildError
from dax_mp.clients.cli_copy import put
from dax_mp.clients.demo_actor import PAST_THE_END, SawBusError
from dax_mp.clients.demo_stage import Judge, Stage
from dax_mp.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console

    from dax_mp.clients.file import DaxFile
    from dax_mp.clients.page_table import PageTableEntry

SIZE_BYTES: Final = 32 << 20
"""Of the device: with the page cache it fits into the 64 MB that a container's /dev/shm has."""
SIZE_BYTES_MIN: Final = 1 << 20
PAGE_CACHE_PAGES: Final = 64
STEP_TIMEOUT_S: Final = 30.0

_POLICIES: Final = {
    "zero": "a hole is read through the kernel's zero page, which takes no memory",
    "page-cache": "a hole is read through a page-cache page, kicked out by a write",
}
_HOLE_TARGETS: Final = {"zero": "zero", "page-cache": "dram"}
_PAGES: Final = 8
_PAGE: Final = 3
"""The page that the questions are about."""


def run_demo(console: "Console", *, size: int | None, step_timeout_s: float = STEP_TIMEOUT_S) -> int:
    """Play the demo and return the exit code: 0, or 1 where anything was not as expected.

    size: of the device, in bytes; None takes SIZE_BYTES. step_timeout_s: how long an actor may take for one step.
    Raises OSError where a coordinator cannot be started or ends, ValueError where the size is less than SIZE_BYTES_MIN.
    """
    size_bytes = SIZE_BYTES if size is None else size
    if size_bytes < SIZE_BYTES_MIN:
        raise ValueError(f"the demo needs a device of at least {format_size(SIZE_BYTES_MIN)}")
    judge = Judge(console)
    try:
        for policy, meaning in _POLICIES.items():
            _play_questions(console, judge, policy, meaning, size_bytes, step_timeout_s)
        _play_real_file(console, judge, size_bytes, step_timeout_s)
    except ChildError as error:
        console.print("\n[bold red]The demo cannot go on[/]:", escape(str(error)), soft_wrap=True)
        return 1
    console.print()
    console.rule("[bold]Verdict", align="left")
    if judge.failures:
        console.print(f"[bold red]{len(judge.failures)} of {judge.checks} checks failed:[/]")
        for failure in judge.failures:
            console.print(f" - {failure}", markup=False, soft_wrap=True)
        return 1
    console.print(
        f"[bold green]All as expected[/], in {judge.checks} checks: nobody saw a stale byte, or another file's."
    )
    return 0


def _play_questions(
    console: "Console", judge: Judge, policy: str, meaning: str, size_bytes: int, timeout_s: float
) -> None:
    console.print()
    console.rule(f"[bold]Hole policy {policy}", align="left")
    page_cache_bytes = PAGE_CACHE_PAGES * os.sysconf("SC_PAGESIZE") if policy == "page-cache" else None
    with Stage(console, judge, "AB", size_bytes, policy, page_cache_bytes, timeout_s) as stage:
        console.print(f"Here {meaning}.\nProcesses: {stage.cast()}. The device has {format_size(size_bytes)}.")
        _play_hole_question(stage, policy)
        _play_truncate_question(stage, policy)
        device = stage.session.statfs()
        judge.expect("free pages at the end", device.pages, device.pages_free)
        judge.expect("free pages of the page cache at the end", device.dram_pages, device.dram_pages_free)


# --- question 1 ----------------------------------------------------------------------------------------------------


def _play_hole_question(stage: Stage, policy: str) -> None:
    """A reads a hole, B reads the hole, B writes to it: A's next load must see B's byte."""
    a, b = stage.actors
    stage.question(1, "A and B read a hole, then B writes to it. What does A see?")
    with stage.session.open("hole.bin", "x+") as file:
        file.truncate(_PAGES * stage.page_size)
        stage.step(a, f"maps hole.bin, {_PAGES} pages of hole", "map", "hole.bin")
        stage.step(b, "maps hole.bin", "map", "hole.bin")
        offset, greeting = _PAGE * stage.page_size, b"B was here"
        here = (offset, len(greeting))
        stage.step(a, f"loads from page {_PAGE}", "load", *here, expect=bytes(len(greeting)), read_holes=1)
        stage.step(b, f"loads from page {_PAGE}", "load", *here, expect=bytes(len(greeting)), read_holes=1)
        before = stage.page_tables("before", _PAGES)
        stage.judge.expect(f"page {_PAGE} in A and B before", [_HOLE_TARGETS[policy]] * 2, _targets(before))
        stage.judge.expect(f"page {_PAGE} in B before", _frame(before[0]), _frame(before[1]))

        stage.step(b, f'stores "B was here" to page {_PAGE}', "store", offset, greeting, write_holes=1, unmaps=2)
        stage.step(a, f"loads from page {_PAGE}", "load", *here, expect=greeting, read_blocks=1)
        after = stage.page_tables("after", _PAGES)
        stage.judge.expect(f"page {_PAGE} in A and B after", ["pmem"] * 2, _targets(after))
        _expect_one_frame(stage, file, after)
        stage.note("A and B had to drop the hole page before B's store went on: so A's next load saw it.")
    _clear(stage, "hole.bin")


def _targets(tables: "list[dict[int, PageTableEntry]]") -> list[str]:
    return [table[_PAGE].target if _PAGE in table else "nothing" for table in tables]


def _frame(table: "dict[int, PageTableEntry]") -> int | None:
    return table[_PAGE].pfn if _PAGE in table else None


def _expect_one_frame(stage: Stage, file: "DaxFile", tables: "list[dict[int, PageTableEntry]]") -> int:
    """A and B have the page mapped to the one block that the file has. Returns its frame."""
    frames = [extent.frame for extent in file.extents()]
    stage.judge.expect(f"blocks of {file.name}", 1, len(frames))
    stage.judge.expect(f"frame of page {_PAGE} in A and B", frames * 2, [_frame(table) for table in tables])
    return frames[0] if frames else 0


# --- question 2 ----------------------------------------------------------------------------------------------------


def _play_truncate_question(stage: Stage, policy: str) -> None:
    """A and B map a block, B truncates: A gets BusError, and never sees the file that the block is given to."""
    a, b = stage.actors
    stage.question(2, "A and B map a block, B truncates, and another file gets the block.", "What does A see?")
    with stage.session.open("short.bin", "x+") as file:
        file.truncate(_PAGES * stage.page_size)
        stage.step(a, f"maps short.bin, {_PAGES} pages of hole", "map", "short.bin")
        stage.step(b, "maps short.bin", "map", "short.bin")
        offset, shared = _PAGE * stage.page_size, b"A and B's"
        here = (offset, len(shared))
        stage.step(b, f'stores "A and B\'s" to page {_PAGE}', "store", offset, shared, write_holes=1)
        stage.step(a, f"loads from page {_PAGE}", "load", *here, expect=shared, read_blocks=1)
        before = stage.page_tables("before", _PAGES)
        frame = _expect_one_frame(stage, file, before)

        stage.step(b, "truncates short.bin to 1 page", "truncate", "short.bin", stage.page_size, unmaps=2)
        stage.step(a, f"loads from page {_PAGE}", "load", *here, expect=PAST_THE_END, bus_errors=1)
        stage.page_tables("after", _PAGES)
        _give_block_away(stage, frame)
        stage.step(a, f"loads from page {_PAGE}", "load", *here, expect=PAST_THE_END, bus_errors=1)
        mappers = [vma.pid for vma in stage.session.maps("short.bin")]
        stage.judge.expect("processes with a VMA of short.bin", [a.pid, b.pid], mappers)

        stage.step(b, f"grows short.bin to {_PAGES} pages", "truncate", "short.bin", _PAGES * stage.page_size)
        stage.step(a, f"loads from page {_PAGE}", "load", *here, expect=bytes(len(shared)), read_holes=1)
        whole = a.tell("load", 0, _PAGES * stage.page_size)
        other_than_zero = whole.replace(b"\0", b"")[:99] if isinstance(whole, bytes) else whole
        stage.judge.expect("bytes other than 0 in short.bin, as A has it mapped", b"", other_than_zero)
        after = stage.page_tables("at the end", _PAGES)
        stage.judge.expect(f"page {_PAGE} in A at the end", _HOLE_TARGETS[policy], _targets(after[:1])[0])
        stage.note("The block was free only when A and B had let go of it: A saw no byte of other.bin.")
    stage.session.unlink("other.bin")
    _clear(stage, "short.bin")


def _give_block_away(stage: Stage, frame: int) -> None:
    """Have B write another file, of all that is free, and see that it has this frame."""
    free_pages = stage.session.statfs().pages_free
    action = f"writes other.bin, {free_pages} pages"
    stage.step(stage.actors[1], action, "fill", "other.bin", b"not for A's eyes", free_pages * stage.page_size)
    with stage.session.open("other.bin", "r") as other:
        for extent in other.extents():
            index = frame - extent.frame
            if 0 <= index < extent.length_bytes // stage.page_size:
                page = extent.offset_bytes // stage.page_size + index
                other.seek(page * stage.page_size)
                stage.note(f'PMem frame {frame} is now page {page} of other.bin: "{other.read(16).decode()}"')
                return
    stage.judge.expect(f"a page of other.bin in PMem frame {frame}", "one", "none")


def _clear(stage: Stage, name: str) -> None:
    for actor in stage.actors:
        actor.tell("unmap")
    stage.session.unlink(name)


# --- a real file ---------------------------------------------------------------------------------------------------


def _play_real_file(console: "Console", judge: Judge, size_bytes: int, timeout_s: float) -> None:
    """Put a real file; four processes map it, hash the memory, and agree with hashlib on the original."""
    console.print()
    console.rule("[bold]A real file", align="left")
    with Stage(console, judge, "ABCD", size_bytes, "zero", None, timeout_s) as stage:
        source = choose_real_file(size_bytes // 8 * 7)
        put(stage.session, str(source), source.name)
        length_bytes = source.stat().st_size
        original = hashlib.sha256(source.read_bytes()).hexdigest()
        console.print(f"{source}, {format_size(length_bytes)}", soft_wrap=True)
        console.print("is put on the device; four processes map it and hash what they have mapped.\n")
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
        for column in ("   process", "pages", "faults", "sha256"):
            table.add_column(column, justify="right" if column in ("pages", "faults") else "left")
        pages = f"{-(-length_bytes // stage.page_size)}"
        table.add_row("   hashlib, of the original", pages, "", _short(original))
        for actor in stage.actors:
            hashed = actor.tell("hash", source.name)
            digest = str(hashed) if isinstance(hashed, SawBusError) else hashed.sha256
            faults = "" if isinstance(hashed, SawBusError) else f"{hashed.faults}"
            judge.expect(f"{actor.name}'s sha256 of {source.name}", original, digest)
            table.add_row(f"   {actor.name}, pid {actor.pid}", pages, faults, _short(digest))
        console.print(table)


def _short(digest: str) -> str:
    """As much of a digest as fits into a line."""
    return f"{digest[:16]}..."


def choose_real_file(size_bytes_max: int) -> Path:
    """The largest of this Python's own files that is no larger: binary, shared library, archive, a module's source."""
    candidates = [
        Path(sys.executable).resolve(),
        Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("LDLIBRARY") or ""),
        *(Path(entry) for entry in sys.path if entry.endswith(".zip")),
        *Path(os.__file__).parent.glob("*.py"),
    ]
    sizes = {path: path.stat().st_size for path in candidates if path.is_file() and os.access(path, os.R_OK)}
    return max((path for path in sizes if sizes[path] <= size_bytes_max), key=lambda path: sizes[path])
