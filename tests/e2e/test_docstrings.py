"""Every example in a docstring runs as it stands, with a coordinator `daemon` and a session `session` at it."""

import csv
import doctest
import errno
import importlib
import mmap
import pickle
import pkgutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Final

import pytest

import dax_mp

OPTIONS: Final = doctest.REPORT_ONLY_FIRST_FAILURE
WITH_EXAMPLES: Final = {
    "BusError",
    "DaxFile",
    "Mapping",
    "Session",
    "ShareableList",
    "SharedMemory",
    "SharedMemoryManager",
    "bus_errors",
    "check",
    "connect",
    "launch",
    "ndarray",
    "shared_session",
}
"""What people will use by hand. (The other public names are constants, and what these give.)"""


def modules() -> Iterator[ModuleType]:
    for package in (dax_mp, importlib.import_module("dax_mp.clients"), importlib.import_module("dax_mp.daemons")):
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            yield importlib.import_module(found.name)


EXAMPLES: Final = {
    test.name: test for module in modules() for test in doctest.DocTestFinder().find(module) if test.examples
}


def test_the_public_names_have_examples() -> None:
    assert {name.rpartition(".")[2] for name in EXAMPLES} >= WITH_EXAMPLES
    assert set(dax_mp.__all__) >= WITH_EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(daemon: dax_mp.Daemon, session: dax_mp.Session, name: str) -> None:
    names: dict[str, Any] = {
        "dax_mp": dax_mp,
        "csv": csv,
        "errno": errno,
        "mmap": mmap,
        "pickle": pickle,
        "daemon": daemon,
        "session": session,
    }
    test = EXAMPLES[name]
    test.globs = names
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=said.append)
    assert result.failed == 0, "".join(said)
    assert result.attempted == len(test.examples)
    dax_mp.shared_session(daemon.endpoint).close()
    assert daemon_has_no_mappings(session)


def daemon_has_no_mappings(session: dax_mp.Session) -> bool:
    """What an example opens it closes, or it is garbage by now."""
    return session.statfs().vmas == 0


def test_the_packages_example() -> None:
    """The one that the package's docstring begins with."""
    assert dax_mp.__doc__ is not None
    paragraphs = dax_mp.__doc__.split("\n\n")
    code = "\n\n".join(paragraph for paragraph in paragraphs if paragraph.startswith("    "))
    assert "mapping[4096:4101]" in code
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
