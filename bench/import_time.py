"""How long an import takes, each time in a fresh interpreter."""

import subprocess
import sys
from collections.abc import Iterator

from rows import Bound, Row, compared, in_turn

PAIRS = 21
RATIO_BOUND = Bound("<=", 1.5)
REFERENCE = "import zmq, msgpack"


def run() -> Iterator[Row]:
    for statement, bound in (("import dax_mp", RATIO_BOUND), ("from dax_mp import connect", None)):
        yield compared(statement, "ms", *_in_turn(statement), bound)


def _in_turn(statement: str) -> tuple[list[float], list[float]]:
    _import_ms(statement), _import_ms(REFERENCE)  # the files are in the kernel's page cache from here on
    return in_turn(lambda: _import_ms(statement), lambda: _import_ms(REFERENCE), PAIRS)


def _import_ms(statement: str) -> float:
    code = f"import time; t = time.perf_counter(); {statement}; print(1000 * (time.perf_counter() - t))"
    return float(subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout)
