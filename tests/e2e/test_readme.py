"""Every example in the README runs as it stands, and in the 64 MB of /dev/shm that a container has."""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from coordinator_process import wait_until
from dax_mp.clients import cli

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


def test_console_example_in_64_mb_of_shm(endpoint: str, tmp_path: Path) -> None:
    """The block as it stands, pasted into a shell."""
    (tmp_path / "README.md").write_text(README)
    assert CONSOLE_COMMANDS[0] == "dax-mp serve --size 32MiB --daemonize"
    function = f'dax-mp() {{ {shlex.quote(sys.executable)} -m dax_mp "$@"; }}'
    script = "\n".join(["set -e", function, *CONSOLE_COMMANDS])
    environment = {**os.environ, "DAX_MP_ENDPOINT": endpoint}
    try:
        command = [*in_small_shm(), "bash", "-c", script]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    finally:
        lock = Path(endpoint, "coordinator.lock")
        if lock.exists():
            os.kill(json.loads(lock.read_text())["pid"], signal.SIGTERM)
            wait_until(lambda: not lock.exists())
    assert (tmp_path / "copy.md").read_text() == README


def test_each_command_is_in_the_readme() -> None:
    for name in cli.commands.commands:
        assert f"`{name}`" in README or f"dax-mp {name}" in README, name
