"""An exception of a signal handler, before any bytecode of any operation: nothing is lost, left or half done.

`tests/interrupted.py` and `tests/interrupted_session.py` have the operations, and what is looked at. Here each runs in
a process of its own. `make soak` (DAX_MP_EVERY_BYTECODE=1) takes every bytecode; else it is one of some.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import interrupted
import interrupted_session
from coordinator_process import Serve
from dax_mp.clients.launch import module_environment

TESTS: Final = Path(__file__).parent.parent
ACK_TIMEOUT_S: Final = 2 * interrupted.PROMPT_S
STRIDE: Final = 1 if os.environ.get("DAX_MP_EVERY_BYTECODE") else 13
TIMEOUT_S: Final = 900


@pytest.mark.parametrize("operation", interrupted.OPERATIONS)
def test_an_interrupt_before_any_bytecode_leaves_nothing(serve: Serve, endpoint: str, operation: str) -> None:
    assert_nothing_is_left("interrupted.py", serve, endpoint, operation)


@pytest.mark.parametrize("operation", interrupted_session.OPERATIONS)
def test_a_session_that_is_interrupted_leaves_no_descriptor_and_no_thread(
    serve: Serve, endpoint: str, operation: str
) -> None:
    assert_nothing_is_left("interrupted_session.py", serve, endpoint, operation)


def assert_nothing_is_left(script: str, serve: Serve, endpoint: str, operation: str) -> None:
    serve("--ack-timeout", str(ACK_TIMEOUT_S), size="16MiB")
    command = [sys.executable, "-P", str(TESTS / script), endpoint, operation, str(STRIDE), "1"]
    environment = {**module_environment(), "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert int(done.stdout) > 50, "it has been interrupted at all"
