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
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

import fault_latency
import fault_ways
import file_io
import footprint
import import_time
import memory_speed
import shared_memory
import system_calls
import truncate
from rows import Row

MIB: Final = 1 << 20
COLUMNS: Final = 100
"""Of the table, where the output is no terminal."""


class Benchmark(NamedTuple):
    title: str
    run: Callable[[], Iterator[Row]]


def main() -> int:
    options = _options()
    divisor = 8 if options.quick else 1
    memory_bytes, file_bytes = 256 * MIB // divisor, 1024 * MIB // divisor
    benchmarks = {
        "memory": Benchmark(
            f"{memory_bytes // MIB} MiB, beside plain mmap",
            lambda: memory_speed.run(memory_bytes),
        ),
        "fault": Benchmark("a fault, beside a pyzmq ping-pong", fault_latency.run),
        "ways": Benchmark("userfaultfd, beside signals", fault_ways.run),
        "footprint": Benchmark("faults, and the coordinator", lambda: footprint.run(file_bytes)),
        "shared": Benchmark("SharedMemory, beside the standard one", lambda: shared_memory.run(file_bytes)),
        "io": Benchmark("read and write, beside /dev/shm and pyzmq", file_io.run),
        "truncate": Benchmark(
            "truncate, beside ftruncate",
            lambda: truncate.run([file_bytes // 16, file_bytes // 4, file_bytes]),
        ),
        "calls": Benchmark("system calls, beside those of a process that is left alone", system_calls.run),
        "import": Benchmark("imports, beside zmq, msgpack", import_time.run),
    }
    chosen = [benchmark for name, benchmark in benchmarks.items() if options.only in name]
    results: list[tuple[str, list[Row]]] = []
    progress = Console(stderr=True)
    for benchmark in chosen:
        with progress.status(f"measuring: {benchmark.title}"):
            results.append((benchmark.title, list(benchmark.run())))
    rows = [row for _, rows in results for row in rows]
    if options.json:
        print(json.dumps([row.as_json() for row in rows], indent=2))
    else:
        Console(highlight=False, width=None if sys.stdout.isatty() else COLUMNS).print(_table(results))
    return 1 if options.check and any(row.verdict == "over" for row in rows) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what was promised of speed and size.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bound is not kept")
    parser.add_argument(
        "--only",
        default="",
        metavar="WORD",
        help="memory, fault, ways, footprint, shared, io, truncate, calls or import",
    )
    parser.add_argument("--quick", action="store_true", help="with an eighth of the memory")
    return parser.parse_args()


def _table(results: list[tuple[str, list[Row]]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), expand=False)
    table.add_column("", no_wrap=True, width=33)
    for column, width in (("here", 15), ("beside", 11), ("ratio", 5), ("bound", 8)):
        table.add_column(column, justify="right", no_wrap=True, width=width)
    table.add_column("", no_wrap=True, width=4)
    table.add_column("min-max, runs", no_wrap=True)
    for title, rows in results:
        table.add_section()
        table.add_row(f"[bold]{title}[/]")
        for row in rows:
            color = {"pass": "green", "over": "bold red"}.get(row.verdict)
            table.add_row(
                row.name,
                f"{_number(median(row.here))} {row.unit}",
                f"{_number(median(row.reference))} {row.unit}" if row.reference else "",
                f"{row.value:.3f}" if row.reference else "",
                "" if row.bound is None else str(row.bound),
                f"[{color}]{row.verdict}[/]" if color else "",
                f"{_number(min(row.here))}-{_number(max(row.here))}, {len(row.here)}" if len(row.here) > 1 else "",
            )
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
