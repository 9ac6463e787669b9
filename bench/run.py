"""`make bench`: what is promised of speed and size, measured.

    python bench/run.py [--json] [--check] [--only WORD] [--quick]

Prints a row for each number: what was measured here, what beside it, the ratio, and the bound. Exit code 0, with
--check 1 when a bound is not kept. Nothing is left behind.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Final

import fault_latency
import footprint
import import_time
import memory_speed
from rich.console import Console
from rich.table import Table
from rows import Row

MIB: Final = 1 << 20


def main() -> int:
    options = _options()
    divisor = 8 if options.quick else 1
    benchmarks: dict[str, Callable[[], Iterator[Row]]] = {
        "memory": lambda: memory_speed.run(256 * MIB // divisor),
        "fault": fault_latency.run,
        "footprint": lambda: footprint.run(1024 * MIB // divisor),
        "import": import_time.run,
    }
    rows: list[Row] = []
    progress = Console(stderr=True)
    for name, benchmark in benchmarks.items():
        if options.only in name:
            with progress.status(f"measuring: {name}"):
                rows += benchmark()
    if options.json:
        print(json.dumps([row.as_json() for row in rows], indent=2))
    else:
        Console(highlight=False).print(_table(rows))
    return 1 if options.check and any(row.verdict == "over" for row in rows) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what was promised of speed and size.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bound is not kept")
    parser.add_argument("--only", default="", metavar="WORD", help="memory, fault, footprint or import")
    parser.add_argument("--quick", action="store_true", help="with an eighth of the memory")
    return parser.parse_args()


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "here", "reference", "ratio", "bound", "", "runs, min-max here"):
        table.add_column(column, justify="left" if column in ("", "runs, min-max here") else "right")
    for row in rows:
        color = {"pass": "green", "over": "bold red"}.get(row.verdict, "")
        runs = f"{len(row.here)}, {_number(min(row.here))}-{_number(max(row.here))}" if len(row.here) > 1 else ""
        table.add_row(
            row.name,
            f"{_number(median(row.here))} {row.unit}",
            f"{_number(median(row.reference))} {row.unit}" if row.reference else "",
            f"{row.value:.3f}" if row.reference else "",
            "" if row.bound is None else str(row.bound),
            f"[{color}]{row.verdict}[/]" if color else row.verdict,
            runs,
        )
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
