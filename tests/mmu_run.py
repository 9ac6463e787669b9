"""Runs one scenario of the native part: `python mmu_run.py NAME ENDPOINT`.

What a scenario does to its process (signals, forks, crashes) must not reach the test run, and what the test run has
done (pytest's faulthandler) must not reach it.
"""

import signal
import sys

import mmu_bus_errors
import mmu_closed
import mmu_private
import mmu_protection
import mmu_ranges
import mmu_signals
import mmu_translations
import mmu_waits
import mmu_zmtp
from mmu_rig import SCENARIOS, Rig

MODULES = (
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
TIMEOUT_S = 120

if __name__ == "__main__":
    signal.alarm(TIMEOUT_S)  # a scenario that hangs must not outlive the run
    rig = Rig(sys.argv[2])
    SCENARIOS[sys.argv[1]](rig)
    rig.close()
