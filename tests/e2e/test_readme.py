"""Every example in the README runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dax_mp

README = (Path(__file__).parents[2] / "README.md").read_text()
PYTHON_EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CONSOLE_COMMANDS = re.findall(r"^\$ (.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("number", range(len(PYTHON_EXAMPLES)))
def test_python_example(number: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(PYTHON_EXAMPLES[number])
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True, timeout=60)


def test_there_are_examples() -> None:
    assert len(PYTHON_EXAMPLES) >= 4
    assert len(PYTHON_EXAMPLES[0].splitlines()) <= 12


def test_console_example(tmp_path: Path) -> None:
    """The commands after `serve`, against a coordinator as `serve` starts it."""
    (tmp_path / "README.md").write_text(README)
    assert CONSOLE_COMMANDS[0] == "dax-mp serve --size 256MiB &"
    command = [sys.executable, "-m", "dax_mp.clients.cli"]
    with dax_mp.launch(size="16MiB") as daemon:
        environment = {**os.environ, "DAX_MP_ENDPOINT": daemon.endpoint}
        for line in CONSOLE_COMMANDS[1:]:
            program, *arguments = line.split()
            assert program == "dax-mp"
            subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "copy.md").read_text() == README
