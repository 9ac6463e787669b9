"""Every order of the events of a small world.

`explore` goes depth first through all orders. Where it has to come back to a state it makes it again from a pickle. A
generator cannot be pickled, so a state with suspended operations is made from an earlier one and the events since.

Two orders that lead to the same state are followed further only once. That loses nothing: all code here and in the core
is a function of the state, and the fingerprint (`freeze`) takes in the whole state: every object that can be reached
from the world, how they refer to each other, where each suspended operation stands and with which variables, what all
threads have seen so far and in which order. Left out are the coordinator's counters, which nothing reads, and the order
in the history of neighbouring beginnings, and of neighbouring ends: the judge (`spec`) asks only whether an end comes
before a beginning. The number of orders is counted exactly all the same: those from a state are the sum of those from
the states that follow it. `test_exhaustive` compares this with a run that merges nothing.
"""

import hashlib
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import GeneratorType
from typing import Any, NamedTuple

from simulation.world import FATES, Event, Moment, World


class Explored(NamedTuple):
    """orders: how many there are, from start to end. states: how many different ones they pass."""

    orders: int
    states: int


class OrderError(AssertionError):
    """Something does not hold in one of the orders. events: those that led there."""

    def __init__(self, events: list[Event], problem: BaseException) -> None:
        self.events = events
        steps = "\n".join(
            f"  {number:2} {event.kind} {event.client}.{event.thread}" for number, event in enumerate(events)
        )
        super().__init__(f"{problem!r}\nafter these events (client.thread):\n{steps}")


def explore(
    start: World, at_end: Callable[[World], None], *, first: Sequence[Event] = (), merge: bool = True
) -> Explored:
    """Go through every order of events; check the world after each event, and with `at_end` where nothing is left.

    start: a world without suspended operations. first: the events that every order begins with. merge: follow equal
    states once. Raises OrderError for the first order in which a check fails.
    """
    search = _Search(at_end, merge)
    reached = _Reached(pickle.dumps(start), tuple(first))
    return Explored(search.follow(reached.again(), reached, list(first)), search.states)


class _Reached(NamedTuple):
    """How a state can be reached again: `events` after the world in `pickled`."""

    pickled: bytes
    events: tuple[Event, ...]

    def again(self) -> World:
        world: World = pickle.loads(self.pickled)
        for event in self.events:
            world.step(event)
        return world


class _Search:
    def __init__(self, at_end: Callable[[World], None], merge: bool) -> None:
        self._at_end = at_end
        self._merge = merge
        self._orders_from: dict[bytes, int] = {}
        self.states = 0

    def follow(self, world: World, reached: _Reached, events: list[Event]) -> int:
        """The number of orders from here to the end. Uses the world up."""
        possible = world.events()
        key = None
        if self._merge and len(possible) > 1:  # where there is no choice there is nothing to save
            key, pickled = freeze(world)
            if key in self._orders_from:
                return self._orders_from[key]
            if pickled is not None:
                reached = _Reached(pickled, ())
        self.states += 1
        with _told_with(events):
            world.check()
        orders = 0
        if not any(event.kind not in FATES for event in possible):
            # Nothing is left but fates that may never come.
            with _told_with(events):
                self._at_end(reached.again())
            orders = 1
        for index, event in enumerate(possible):
            following = world if index == len(possible) - 1 else reached.again()
            with _told_with([*events, event]):
                following.step(event)
            orders += self.follow(following, reached._replace(events=(*reached.events, event)), [*events, event])
        if key is not None:
            self._orders_from[key] = orders
        return orders


@contextmanager
def _told_with(events: list[Event]) -> Iterator[None]:
    try:
        yield
    except AssertionError as problem:
        raise OrderError(events, problem) from problem


# --- the fingerprint of a state ---------------------------------------------------------------------------------------


def freeze(world: World) -> tuple[bytes, bytes | None]:
    """A fingerprint, and the pickle that it is made of; None where an operation is suspended, which cannot be pickled.

    Two worlds of one fingerprint are in the same state (but for a collision of 16 bytes of BLAKE2): a pickle says of
    every object that can be reached what it is and which others it refers to.
    """
    for name in world.coordinator.fs.counters:
        world.coordinator.fs.counters[name] = 0
    world.history = partial_order(world.history)
    suspended: list[Any] = []

    def reduce_generator(steps: Any) -> tuple[Any, ...]:
        suspended.append(steps)
        return object, (), _position(steps)

    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = {GeneratorType: reduce_generator}
    pickler.dump(world)
    pickled = buffer.getvalue()
    return hashlib.blake2b(pickled, digest_size=16).digest(), None if suspended else pickled


def _position(steps: Any) -> tuple[Any, ...]:
    """Where a suspended operation stands. Iterators of its loops are not seen, but their loop variables are."""
    frame = steps.gi_frame
    assert frame is not None, "an operation that has ended is still referred to"
    return steps.__qualname__, frame.f_lasti, dict(frame.f_locals), steps.gi_yieldfrom


def partial_order(history: list[Moment]) -> list[Moment]:
    """The history, with each run of beginnings and each run of ends in an order of its own.

    Equal for two histories where every operation has the same outcome, and begins after the end of the same others.
    """
    ordered: list[Moment] = []
    run: list[Moment] = []
    for moment in history:
        if run and run[0].ends != moment.ends:
            ordered += sorted(run, key=_thread_and_ordinal)
            run = []
        run.append(moment)
    return ordered + sorted(run, key=_thread_and_ordinal)


def _thread_and_ordinal(moment: Moment) -> tuple[int, ...]:
    return moment.client, moment.thread, moment.ordinal
