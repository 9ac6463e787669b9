"""The native part against a coordinator of a few lines: see mmu_run.py for how, and mmu_*.py for the scenarios."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import mmu_bus_errors
import mmu_closed
import mmu_private
import mmu_protection
import mmu_ranges
import mmu_signals
import mmu_translations
import mmu_waits
import mmu_zmtp
from dax_mp.clients.launch import module_environment
from mmu_rig import ADDRESS_SPACE, FAULTS, FORKS, SCENARIOS

TESTS: Final = Path(__file__).parent.parent
MODULES: Final = (
    mmu_bus_errors,
    mmu_closed,
    mmu_private,
    mmu_protection,
    mmu_ranges,
    mmu_signals,
    mmu_translations,
    mmu_waits,
    mmu_zmtp,
)

CRASHES: Final = {
    "crash": signal.SIGSEGV,
    "crash_in_a_thread": signal.SIGSEGV,
    "crash_with_faulthandler_before": signal.SIGSEGV,
    "crash_with_faulthandler_behind_us_and_before_us": signal.SIGSEGV,
    "store_to_a_read_only_window": signal.SIGSEGV,
    "a_sent_signal_ends_the_process": signal.SIGSEGV,
    "a_sent_bus_signal_ends_the_process": signal.SIGBUS,
    "an_ignored_crash_is_a_crash": signal.SIGSEGV,
    "sigbus_ends_the_process": signal.SIGBUS,
    "a_waiting_process_is_terminated": signal.SIGTERM,
}
"""The scenarios that are to end by a signal."""

PRIVATE: Final = {name for name, function in SCENARIOS.items() if function.__module__ == mmu_private.__name__} | {
    "a_closed_private_window",
    "an_unmap_leaves_private_copies_protected",
    "private_copies_are_protected_and_kept",
    "random_protections_are_what_the_kernel_says",
}
"""The scenarios with private windows, which there are not where faults arrive through userfaultfd(2)."""


def run(scenario: str, endpoint: str) -> "subprocess.CompletedProcess[str]":
    environment = module_environment()
    # Without an empty entry: that would be the directory, and a checkout's has no extension.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), environment.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", str(TESTS / "mmu_run.py"), scenario, f"ipc://{endpoint}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def marks_of(scenario: str) -> list[pytest.MarkDecorator]:
    return [
        mark
        for mark, scenarios in ((pytest.mark.forks, FORKS), (pytest.mark.address_space, ADDRESS_SPACE))
        if scenario in scenarios
    ]


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(name, marks=marks_of(name)) for name in sorted(SCENARIOS.keys() - CRASHES.keys())],
)
def test_scenario(scenario: str, endpoint: str) -> None:
    ended = run(scenario, endpoint)
    if FAULTS == "userfaultfd" and scenario in PRIVATE:
        assert "OSError: [Errno 95]" in ended.stderr
        return
    assert ended.returncode == 0 and not ended.stderr, f"{ended.returncode}: {ended.stderr}"


@pytest.mark.parametrize("scenario", sorted(CRASHES))
def test_crash(scenario: str, endpoint: str) -> None:
    """A signal that is none of ours does what it did without us; faulthandler's report included."""
    ended = run(scenario, endpoint)
    assert (ended.returncode, ended.stdout) == (-CRASHES[scenario], "now\n")
    if "faulthandler" in scenario or scenario == "crash_in_a_thread":
        assert ended.stderr.startswith("Fatal Python error: Segmentation fault\n")
        assert ended.stderr.count("Fatal Python error") == 1
        assert "in load" in ended.stderr
    else:
        assert ended.stderr == ""
