"""Random orders of thousands of events, from a seed."""

import os
import subprocess
import sys

import pytest

from dax_mp.device import HolePolicyName
from dax_mp.frames import FrameAllocator
from dax_mp.inode import Inode
from dax_mp.locks import EntryLocks
from dax_mp.ranges import PageRange
from dax_mp.transaction import Completion, Steps
from dax_mp.unmap import Unmapper
from simulation.soak import Soak

EVENTS = 3000
UNMAP = Unmapper.unmap_mapping_range

both_policies = pytest.mark.parametrize("policy", ["zero", "page-cache"])


def soaked(seed: int, policy: HolePolicyName, events: int = EVENTS) -> Soak:
    soak = Soak(seed, policy)
    soak.run(events)
    soak.finish()
    return soak


@both_policies
@pytest.mark.parametrize("seed", range(5))
def test_what_everybody_sees_is_what_was_stored(seed: int, policy: HolePolicyName) -> None:
    soaked(seed, policy)


@both_policies
def test_everything_happens(policy: HolePolicyName) -> None:
    """The tests above go where they should: each kind of operation, failure and end, in some seed."""
    done: set[str] = set()
    counters: dict[str, int] = {}
    evicted_late = 0
    for seed in range(100, 105):
        soak = soaked(seed, policy)
        done |= set(soak.operations_done)
        evicted_late += soak.evicted_late
        for name, count in soak.coordinator.fs.counters.items():
            counters[name] = counters.get(name, 0) + count
    assert done >= {
        "Load",
        "Store",
        "Read",
        "Write",
        "Truncate",
        "Fallocate",
        "Open",
        "Mmap",
        "Munmap",
        "Unlink",
        "Rename",
        "Link",
        "DirectRead",
        "DirectWrite",
        "Pin",
        "Unpin",
    }
    assert done & {"Truncate EBUSY", "Fallocate EBUSY"}, "nobody has waited for a pin in vain"
    assert done >= {"Load EFAULT", "Store EFAULT", "Store ENOSPC", "Write ENOSPC", "Load ESTALE", "Load EPROTO"}
    assert evicted_late > 0 and counters["protocol_errors"] > 0
    assert counters["unmaps"] > 100 and counters["write_holes"] > 50
    assert (counters["reclaims"] > 0) == (policy == "page-cache")


@both_policies
def test_the_same_seed_gives_the_same_bytes(policy: HolePolicyName) -> None:
    """In two processes whose sets and dicts of bytes and strings are in different orders."""
    code = f"""if True:
        from simulation.soak import Soak
        soak = Soak(7, {policy!r})
        soak.run(1500)
        soak.finish()
        print(soak.digest(), len(soak.clients))"""
    outputs = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=120
        )
        outputs.append(process.stdout)
    assert outputs[0] == outputs[1]
    assert len(outputs[0].split()[0]) == 128


def test_another_seed_gives_others() -> None:
    assert soaked(1, "zero", 300).digest() != soaked(2, "zero", 300).digest()


def expect_bug(events: int = 2000, match: str | None = None, seeds: int = 10) -> None:
    with pytest.raises((AssertionError, KeyError), match=match):  # noqa: PT012
        for seed in range(seeds):
            for policy in ("zero", "page-cache"):
                soaked(seed, policy, events)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestItFindsTheBug:
    """... when the core has one."""

    def test_that_nobody_waits_for_acknowledgements(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def do_not_wait(
            self: Unmapper, inode: Inode, page_ranges: list[PageRange], even_cows: bool = False
        ) -> Steps[None]:
            for _ in UNMAP(self, inode, page_ranges):
                break
            return
            yield Completion(self._scheduler)

        monkeypatch.setattr(Unmapper, "unmap_mapping_range", do_not_wait)
        expect_bug()

    def test_that_the_evicted_hold_nothing_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FrameAllocator, "hold", lambda self, token, extents: None)
        expect_bug()

    def test_that_waiters_for_a_page_are_not_woken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(EntryLocks, "release", lambda self, pgoff: self._held.pop(pgoff))
        expect_bug(events=1200)

    def test_that_a_punched_block_is_not_freed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dax_mp.device.Device.release", lambda self, extents: None)
        expect_bug()

    def test_that_a_truncate_leaves_private_copies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(self: Unmapper, inode: Inode, page_ranges: list[PageRange], even_cows: bool = False) -> Steps[None]:
            yield from UNMAP(self, inode, page_ranges)

        monkeypatch.setattr(Unmapper, "unmap_mapping_range", none)
        expect_bug(match="private|can only be", seeds=40)

    def test_that_everything_takes_private_copies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def all_of_it(
            self: Unmapper, inode: Inode, page_ranges: list[PageRange], even_cows: bool = False
        ) -> Steps[None]:
            yield from UNMAP(self, inode, page_ranges, even_cows=True)

        monkeypatch.setattr(Unmapper, "unmap_mapping_range", all_of_it)
        expect_bug(match="lost its private copy")

    def test_that_pins_hold_nobody_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PageRange, "overlaps", lambda self, other: False)
        expect_bug(match="I9|has moved")

    def test_that_a_fault_may_fill_what_is_lent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def take_none(inode: Inode, pages: PageRange, locked: list[int]) -> Steps[None]:
            yield from ()

        monkeypatch.setattr("dax_mp.blocks.lock_holes", take_none)
        expect_bug()
