"""What a benchmark gives: rows, each with its samples, and its bound if it has one.

Where two things are compared, they are measured in turn, one sample each, and the order changes from pair to pair: what
the machine does meanwhile happens to both. The ratio is the median of the pairs' ratios.
"""

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

_RELATIONS: Final = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Bound:
    """What a row is held to: `relation` is >= or <=."""

    relation: str
    limit: float

    def kept_by(self, value: float) -> bool:
        kept: bool = _RELATIONS[self.relation](value, self.limit)
        return kept

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """One result. here, reference: the samples, in `unit`; reference is empty where there is nothing to compare with.

    value: what the bound is about: the ratio where there is a reference, else what was measured. None: only shown.
    """

    name: str
    unit: str
    here: Sequence[float]
    reference: Sequence[float]
    value: float
    bound: Bound | None

    @property
    def verdict(self) -> str:
        if self.bound is None:
            return "-"
        return "pass" if self.bound.kept_by(self.value) else "over"

    def as_json(self) -> dict[str, Any]:
        def summary(samples: Sequence[float]) -> dict[str, float] | None:
            if not samples:
                return None
            return {"median": median(samples), "min": min(samples), "max": max(samples), "runs": len(samples)}

        return {
            "name": self.name,
            "unit": self.unit,
            "here": summary(self.here),
            "reference": summary(self.reference),
            "value": self.value,
            "bound": None if self.bound is None else str(self.bound),
            "verdict": self.verdict,
        }


def measured(name: str, unit: str, samples: Sequence[float], bound: Bound | None = None) -> Row:
    """A row of something that has no counterpart; the bound is about the median."""
    return Row(name, unit, samples, (), median(samples), bound)


def compared(
    name: str,
    unit: str,
    here: Sequence[float],
    reference: Sequence[float],
    bound: Bound | None = None,
) -> Row:
    """A row of pairs of samples; the ratio is here to reference."""
    ratio = median(ours / theirs for ours, theirs in zip(here, reference, strict=True))
    return Row(name, unit, here, reference, ratio, bound)


def in_turn(here: Callable[[], float], reference: Callable[[], float], pairs: int) -> tuple[list[float], list[float]]:
    """Take `pairs` samples of each, in turn."""
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        order = [(samples[0], here), (samples[1], reference)]
        for taken, take in order if number % 2 == 0 else reversed(order):
            taken.append(take())
    return samples


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s
