"""The newcomer's first line: Python, started in the checkout, imports dax_mp, or says what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import dax_mp

REPOSITORY: Final = Path(__file__).parents[2]
TIMEOUT_S: Final = 60

FIRST_LINES: Final = """
import dax_mp
with dax_mp.launch("4MiB") as daemon, dax_mp.connect(daemon.endpoint) as session:
    print(session.listdir(), dax_mp.__file__)
"""


def python(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Python as a user starts it: what lies in the current directory is imported first."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def copy_of_the_checkout(directory: Path) -> Path:
    """Its package alone, with nothing built in it."""
    for name in ("dax_mp", "clients", "daemons"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(REPOSITORY / name, directory / name, symlinks=True, ignore=ignore)
    return directory


def test_the_newcomers_first_line_in_the_checkout_works(tmp_path: Path) -> None:
    checkout = copy_of_the_checkout(tmp_path)
    done = python("-c", FIRST_LINES, cwd=checkout)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"[] {dax_mp.__file__}\n"


def test_a_checkout_that_is_not_installed_says_what_to_do(tmp_path: Path) -> None:
    """-S: without the environment's packages."""
    checkout = copy_of_the_checkout(tmp_path)
    done = python("-S", "-c", "import dax_mp", cwd=checkout)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: dax_mp is not installed for this Python")
    assert f"pip install {checkout}" in last
    assert "make demo" in last


def test_python_m_dax_mp_is_dax_mp(tmp_path: Path) -> None:
    for directory in (copy_of_the_checkout(tmp_path), Path("/")):
        done = python("-m", "dax_mp", "--version", cwd=directory)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"dax-mp, version {dax_mp.__version__}\n"
        assert python("-m", "dax_mp", "no-command", cwd=directory).returncode == 2
