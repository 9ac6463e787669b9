"""The stress program, run: it ends well when all is well, and says what it saw when not."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

import dax_mp
from coordinator_process import Serve
from dax_mp.clients.launch import module_command, module_environment
from dax_mp.clients.stress import Failure, Stress
from dax_mp.clients.stress_cells import WORD_BYTES

PAGE = os.sysconf("SC_PAGESIZE")


def start_stress(*options: str) -> "subprocess.Popen[str]":
    command = module_command("dax_mp", "stress", *options)
    return subprocess.Popen(
        command, env=module_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("policy", ["zero", "page-cache"])
def test_a_run(policy: str) -> None:
    options = ["--processes", "3", "--seconds", "3", "--seed", "11", "--hole-policy", policy, "--json"]
    with start_stress(*options) as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, ""), output
    result = json.loads(output)
    assert result["verdict"] == "coherent"
    assert (result["seed"], result["processes"], result["hole_policy"]) == (11, 3, policy)
    assert result["operations_of_each_kind"]["load"] and result["operations_of_each_kind"]["store"]
    assert result["events"]["faults"] and result["events"]["unmaps"]
    assert result["killed"]


def test_a_run_for_people() -> None:
    with start_stress("--processes", "2", "--seconds", "1") as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, ""), output
    for text in ("seed", "operations", "faults", "unmaps", "evictions", "per second", "coherent"):
        assert text in output


def test_every_invariant_holds_all_along(serve: Serve, endpoint: str) -> None:
    """The coordinator of `serve` checks them after each event (--debug), and would have ended."""
    coordinator = serve("--hole-policy", "page-cache", size=f"{64 * PAGE}")
    result = Stress(endpoint, processes=2, seconds=1.0, seed=3).run()
    assert result["operations"]
    assert coordinator.end() == 0


class Run(threading.Thread):
    """A run, in a thread of its own, and the failure that it ended with."""

    def __init__(self, endpoint: str, grace_s: float = 60.0) -> None:
        super().__init__()
        self._stress = Stress(endpoint, processes=2, seconds=300.0, seed=5, kill=False, grace_s=grace_s)
        self.failure: Failure | None = None

    def run(self) -> None:
        try:
            self._stress.run()
        except Failure as failure:
            self.failure = failure


def mapped_file(session: dax_mp.Session, run: Run) -> dax_mp.VmaMaps | None:
    """A mapping that a worker has; None when the run has ended before there was one."""
    while run.is_alive():
        for name in session.listdir():
            for vma in session.maps(name):
                return vma
    return None


def test_bytes_of_another_are_evidence(serve: Serve, endpoint: str) -> None:
    serve()
    run = Run(endpoint)
    run.start()
    with dax_mp.connect(endpoint) as session:
        assert mapped_file(session, run)
        name = next(name for name in session.listdir() if name.endswith("-0"))
        with session.open(name, "r+") as file, file.mmap(PAGE, past_eof=True) as mapping:
            while run.is_alive():
                try:
                    mapping[0:WORD_BYTES] = b"somebody"
                except dax_mp.BusError:
                    pass  # the file is empty now and then
    run.join()
    assert run.failure is not None
    evidence = run.failure.evidence
    foreign = int.from_bytes(b"somebody", sys.byteorder)
    assert (evidence["file"], evidence["page"]) == (0, 0)
    assert f"{foreign:#x}" in evidence["seen"]
    assert evidence["ledger_before"]["cell"] == 0


@pytest.mark.parametrize(
    ("number", "grace_s", "what"), [(signal.SIGKILL, 60.0, "was killed by SIGKILL"), (signal.SIGSTOP, 1.0, "hangs at")]
)
def test_a_worker_that_dies_or_hangs_is_reported(
    serve: Serve, endpoint: str, number: signal.Signals, grace_s: float, what: str
) -> None:
    serve("--ack-timeout", "0.5")
    run = Run(endpoint, grace_s)
    run.start()
    with dax_mp.connect(endpoint) as session:
        vma = mapped_file(session, run)
        assert vma is not None
        while run.is_alive():  # it is at work when it has taken a fault or two
            if session.statfs().counters["faults"] > 20:
                os.kill(vma.pid, number)
                break
        run.join()
    assert run.failure is not None
    assert what in str(run.failure)
    assert " of file " in str(run.failure)


def test_ctrl_c_leaves_nothing() -> None:
    """What is left would be an error of the whole test run."""
    with start_stress("--processes", "2", "--seconds", "600") as process:
        assert process.stdout is not None
        assert "seed" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
