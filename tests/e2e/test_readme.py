"""Every example in the README runs as it stands, and in the 64 MB of /dev/shm that a container has."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import dax_mp

README = (Path(__file__).parents[2] / "README.md").read_text()
PYTHON_EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CONSOLE_COMMANDS = re.findall(r"^\$ (.*)$", README, re.MULTILINE)

SMALL_SHM: Final = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'


@functools.cache
def in_small_shm() -> list[str]:
    """The command that runs another one with a /dev/shm of 64 MB; empty where this user may have no mount namespace."""
    options = "-m" if os.geteuid() == 0 else "-rm"
    command = ["unshare", options, "sh", "-c", SMALL_SHM, "sh"]
    try:
        done = subprocess.run([*command, "true"], check=False, capture_output=True)
    except FileNotFoundError:
        return []
    return [] if done.returncode else command


@pytest.mark.parametrize("number", range(len(PYTHON_EXAMPLES)))
def test_python_example_in_64_mb_of_shm(number: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(PYTHON_EXAMPLES[number])
    subprocess.run([*in_small_shm(), sys.executable, script], cwd=tmp_path, check=True, timeout=60)


def test_there_are_examples() -> None:
    assert len(PYTHON_EXAMPLES) >= 4
    assert len(PYTHON_EXAMPLES[0].splitlines()) <= 12


def test_a_device_of_the_console_example_fits_into_64_mb_of_shm() -> None:
    size = CONSOLE_COMMANDS[0].partition("--size ")[2].split()[0]
    code = f"import dax_mp; dax_mp.launch({size!r}).close()"
    subprocess.run([*in_small_shm(), sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_console_example(tmp_path: Path) -> None:
    """The commands after `serve`, against a coordinator as `serve` starts it."""
    (tmp_path / "README.md").write_text(README)
    assert CONSOLE_COMMANDS[0].startswith("dax-mp serve --size ")
    command = [sys.executable, "-m", "dax_mp"]
    with dax_mp.launch(size="16MiB") as daemon:
        environment = {**os.environ, "DAX_MP_ENDPOINT": daemon.endpoint}
        for line in CONSOLE_COMMANDS[1:]:
            program, *arguments = line.split()
            assert program == "dax-mp"
            subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "copy.md").read_text() == README
