"""The locks of an inode: who gets them, in which order."""

from collections.abc import Callable
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from dax_mp.locks import EntryLocks, SharedLock
from dax_mp.ranges import PageRange
from dax_mp.transaction import Completion, Scheduler, Steps


class Holders:
    """Operations that take a lock, are recorded while they have it, and give it back when told."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.have: list[str] = []
        self.releases: dict[str, Completion] = {}

    def start(self, name: str, acquire: Callable[[], Completion | None], release: Callable[[], None]) -> None:
        self.releases[name] = Completion(self.scheduler)
        self.scheduler.start(self._hold(name, acquire, release))

    def _hold(self, name: str, acquire: Callable[[], Completion | None], release: Callable[[], None]) -> Steps[None]:
        if granted := acquire():
            yield granted
        self.have.append(name)
        yield self.releases[name]
        self.have.remove(name)
        release()

    def release(self, name: str) -> None:
        self.releases.pop(name).complete()
        self.scheduler.run()


def shared_lock() -> tuple[Holders, Callable[[str], None], SharedLock]:
    """The second starts an operation: one whose name begins with x takes the lock exclusive."""
    holders = Holders()
    lock = SharedLock(holders.scheduler)

    def start(name: str) -> None:
        if name[0] == "x":
            holders.start(name, lock.acquire_exclusive, lock.release_exclusive)
        else:
            holders.start(name, lock.acquire_shared, lock.release_shared)

    return holders, start, lock


def test_many_share_and_one_excludes() -> None:
    holders, start, lock = shared_lock()
    for name in ("s1", "s2", "x1"):
        start(name)
    assert holders.have == ["s1", "s2"]
    holders.release("s1")
    assert holders.have == ["s2"]
    holders.release("s2")
    assert holders.have == ["x1"]
    start("s3")
    start("x2")
    assert holders.have == ["x1"]
    holders.release("x1")
    assert holders.have == ["s3"]
    holders.release("s3")
    holders.release("x2")
    assert lock.idle


def test_a_stream_of_faults_does_not_starve_a_truncate() -> None:
    holders, start, _ = shared_lock()
    start("s1")
    start("x1")
    start("s2")
    assert holders.have == ["s1"], "s2 has overtaken x1"
    holders.release("s1")
    assert holders.have == ["x1"]
    holders.release("x1")
    assert holders.have == ["s2"]


def test_a_stream_of_truncates_does_not_starve_a_fault() -> None:
    holders, start, _ = shared_lock()
    for name in ("x1", "s1", "s2", "x2", "s3"):
        start(name)
    holders.release("x1")
    assert holders.have == ["s1", "s2"]
    holders.release("s2")
    holders.release("s1")
    assert holders.have == ["x2"]
    holders.release("x2")
    assert holders.have == ["s3"]


@settings(database=None, deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["s", "x", "release"]), max_size=60), st.randoms(use_true_random=False))
def test_everyone_gets_it_in_the_order_in_which_they_came(steps: list[str], random: Random) -> None:
    holders, start, lock = shared_lock()
    came: list[str] = []
    got: list[str] = []

    def note() -> None:
        kinds = [name[0] for name in holders.have]
        assert kinds in (["x"], ["s"] * len(kinds)), f"held by {holders.have} at once"
        got.extend(name for name in holders.have if name not in got)

    for number, step in enumerate(steps):
        if step == "release":
            if holders.have:
                holders.release(holders.have[random.randrange(len(holders.have))])
        else:
            start(f"{step}{number}")
            came.append(f"{step}{number}")
        note()
        assert got == came[: len(got)]
    while holders.have:
        holders.release(holders.have[0])
        note()
    assert got == came
    assert lock.idle


def test_a_page_is_locked_by_one_and_handed_on_in_order() -> None:
    holders = Holders()
    locks = EntryLocks(holders.scheduler)
    for name in ("a", "b", "c", "d"):
        holders.start(name, lambda: locks.acquire(5), lambda: locks.release(5))
    holders.start("other", lambda: locks.acquire(6), lambda: locks.release(6))
    assert holders.have == ["a", "other"]
    assert not locks.try_acquire(5)
    assert len(locks) == 2
    for name in ("a", "b", "c", "d"):
        assert name in holders.have
        holders.release(name)
    assert not locks.held(5) and locks.held(6)
    assert locks.try_acquire(5)
    locks.release(5)
    holders.release("other")
    assert len(locks) == 0, "a page that nobody holds takes memory"


def test_the_pages_around_that_nobody_else_has_locked() -> None:
    locks = EntryLocks(Scheduler())
    for pgoff in (2, 10, 11, 20):
        assert locks.try_acquire(pgoff)
    assert locks.unlocked_around(PageRange(10, 12), PageRange(0, 30)) == PageRange(3, 20)
    assert locks.unlocked_around(PageRange(10, 12), PageRange(5, 15)) == PageRange(5, 15)
    assert locks.unlocked_around(PageRange(10, 11), PageRange(5, 15)) == PageRange(5, 11)
    assert locks.unlocked_around(PageRange(25, 26), PageRange(0, 30)) == PageRange(21, 30)
