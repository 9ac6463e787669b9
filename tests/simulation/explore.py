"""Every order of the events of a small world.

`explore` goes depth first through all orders. A generator cannot be copied, so a state is reached again by replaying the
events that led to it, from a pickle of the start.

Two orders that lead to the same state are followed further only once. That loses nothing: all code here and in the core
is a function of the state, and `fingerprint` takes in the whole state: every object that can be reached from the world, how
they refer to each other, where each suspended operation stands and with which variables, what all threads have seen so
far and in which order. Left out are the coordinator's counters, which nothing reads, and the order in the history of
neighbouring beginnings, and of neighbouring ends: the judge (`spec`) asks only whether an end comes before a beginning. The
number of orders is counted exactly all the same: those from a state are the sum of those from the states that follow it.
`test_exhaustive` compares this with a run that merges nothing.
"""

import hashlib
import io
import pickle
from collections.abc import Callable
from types import GeneratorType
from typing import Any, NamedTuple

from dax_mp.file_system import FileSystem
from simulation.world import Event, Moment, World


class Explored(NamedTuple):
    """orders: how many there are, from start to end. states: how many different ones they pass."""

    orders: int
    states: int


class OrderError(AssertionError):
    """Something does not hold in one of the orders. events: those that led there."""

    def __init__(self, events: list[Event], problem: BaseException) -> None:
        self.events = events
        steps = "\n".join(f"  {number:2} {event.kind} {event.client}.{event.thread}" for number, event in enumerate(events))
        super().__init__(f"{problem!r}\nafter these events (client.thread):\n{steps}")


def explore(start: World, at_end: Callable[[World], None], merge: bool = True) -> Explored:
    """Go through every order of events; check the world after each event, and with `at_end` where nothing is left.

    merge: follow equal states once. Raises OrderError for the first order in which a check fails.
    """
    return _Search(start, at_end, merge).run()


class _Search:
    def __init__(self, start: World, at_end: Callable[[World], None], merge: bool) -> None:
        self._start = pickle.dumps(start)
        self._at_end = at_end
        self._merge = merge
        self._orders_from: dict[bytes, int] = {}
        self._states = 0

    def run(self) -> Explored:
        orders = self._follow(self._replay([]), [])
        return Explored(orders, self._states)

    def _replay(self, events: list[Event]) -> World:
        world: World = pickle.loads(self._start)
        for event in events:
            world.step(event)
        return world

    def _follow(self, world: World, events: list[Event]) -> int:
        """The number of orders from here to the end. Uses the world up."""
        possible = world.events()
        merge = self._merge and len(possible) > 1  # where there is no choice there is nothing to save
        key = fingerprint(world) if merge else b""
        if key in self._orders_from:
            return self._orders_from[key]
        self._states += 1
        orders = 0
        for index, event in enumerate(possible):
            last = index == len(possible) - 1
            following = world if last else self._replay(events)
            self._check(lambda following=following, event=event: _step(following, event), [*events, event])  # type: ignore[misc]
            orders += self._follow(following, [*events, event])
        if not any(event not in world.fates for event in possible):
            # Nothing is left but fates that may never come.
            following = self._replay(events)
            self._check(lambda: self._at_end(following), events)
            orders += 1
        if merge:
            self._orders_from[key] = orders
        return orders

    @staticmethod
    def _check(act: Callable[[], object], events: list[Event]) -> None:
        try:
            act()
        except AssertionError as problem:
            raise OrderError(events, problem) from problem


def _step(world: World, event: Event) -> None:
    world.step(event)
    world.check()


# --- the fingerprint of a state ------------------------------------------------------------------------------------------


def fingerprint(world: World) -> bytes:
    """Two worlds that have the same one are in the same state (but for a collision of 16 bytes of BLAKE2).

    It is made of a pickle, which says of every object that can be reached what it is and which others it refers to.
    """
    buffer = io.BytesIO()
    _Fingerprinter(buffer, pickle.HIGHEST_PROTOCOL).dump(world)
    return hashlib.blake2b(buffer.getbuffer(), digest_size=16).digest()


class _Fingerprinter(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if kind is GeneratorType:
            return object, (), _position(value)
        if kind is FileSystem:
            return object, (), {**vars(value), "counters": None}
        if kind is World:
            return object, (), {**vars(value), "history": _partial_order(value.history)}
        return NotImplemented


def _position(steps: Any) -> tuple[Any, ...]:
    """Where a suspended operation stands. Iterators of its loops are not seen, but their loop variables are."""
    frame = steps.gi_frame
    assert frame is not None, "an operation that has ended is still referred to"
    return steps.__qualname__, frame.f_lasti, dict(frame.f_locals), steps.gi_yieldfrom


def _partial_order(history: list[Moment]) -> list[Moment]:
    """The history, with each run of beginnings and each run of ends in an order of its own."""
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
