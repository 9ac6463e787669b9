"""Random operations here and in the kernel at once: no difference. See tests/exerciser.

`make soak` gives the first seed in DAX_MP_SOAK, and then there are 200,000 operations.
"""

import os
from typing import Final

import pytest

import dax_mp
from dax_mp.device import HolePolicyName
from exerciser.exercise import Difference, Exerciser, exercise, sequence, shortest_failing
from exerciser.operations import OPERATIONS, Operation

SOAK_SEED: Final = os.environ.get("DAX_MP_SOAK")
FIRST_SEED: Final = int(SOAK_SEED or 0)
SEEDS: Final = range(FIRST_SEED, FIRST_SEED + (40 if SOAK_SEED else 4))
OPERATIONS_PER_SEED: Final = 2500 if SOAK_SEED else 700


@pytest.mark.forks
@pytest.mark.parametrize("hole_policy", ["zero", "page-cache"])
@pytest.mark.parametrize("seed", SEEDS)
def test_as_the_kernel_does(seed: int, hole_policy: HolePolicyName) -> None:
    with dax_mp.launch(size="16MiB", hole_policy=hole_policy) as daemon:
        exercise(daemon.endpoint, seed, OPERATIONS_PER_SEED)


def test_every_operation_comes_up() -> None:
    assert {operation.name for operation in sequence(0, 700)} == set(OPERATIONS)


@pytest.mark.forks
def test_a_failing_sequence_is_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a punch to do nothing, one write and one punch would show it."""
    monkeypatch.setitem(OPERATIONS, "punch", lambda step: step.model.zero(step.offset, step.length) or [])
    rest = [operation for operation in sequence(3, 60) if operation.name in ("populate", "will_need", "append")]
    failing = [*rest[:8], Operation("pwrite", 0, 0, 4095, 1), *rest[8:], Operation("punch", 1, 0, 4095, 2)]
    with dax_mp.launch(size="16MiB") as daemon:
        shortest, text = shortest_failing(daemon.endpoint, failing)
    assert [operation.name for operation in shortest] == ["pwrite", "punch"]
    assert "differs at 0x0 (page 0)" in text


def test_a_process_that_ends_is_a_difference(daemon: dax_mp.Daemon) -> None:
    exerciser = Exerciser(daemon.endpoint)
    try:
        exerciser._processes[1].kill()
        with pytest.raises(Difference, match="process 1"):
            exerciser.run([Operation("append", 0, 0, 0, 0)])
    finally:
        exerciser.close()
