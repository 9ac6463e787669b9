from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dax_mp.address_space import PageTable, pack_pte, pte_fields, unpack_pte
from dax_mp.messages import Access, Target
from dax_mp.ranges import BlockMap, PageRange, RangeMap

POINTS = 24
ranges = st.tuples(st.integers(0, POINTS), st.integers(0, POINTS)).map(sorted)
steps = st.lists(st.tuples(st.sampled_from(["set", "insert", "clear", "take"]), ranges, st.integers(0, 2)), max_size=30)
checked = settings(database=None, deadline=None, max_examples=150)


def same(value: int, _steps: int) -> int:
    return value


def as_runs(model: dict[int, int], advance: Callable[[int, int], int]) -> list[tuple[int, int, int]]:
    """The model's points as the fewest pieces."""
    runs: list[tuple[int, int, int]] = []
    for point in sorted(model):
        if runs and runs[-1][1] == point and advance(runs[-1][2], point - runs[-1][0]) == model[point]:
            runs[-1] = (runs[-1][0], point + 1, runs[-1][2])
        else:
            runs.append((point, point + 1, model[point]))
    return runs


@pytest.mark.parametrize("insertions_max", [0, 1024])
@pytest.mark.parametrize("kind", [RangeMap, BlockMap, PageTable])
@checked
@given(steps=steps, window=ranges)
def test_it_is_a_dict_of_points(
    kind: type[RangeMap[int]], insertions_max: int, steps: list[tuple[str, list[int], int]], window: list[int]
) -> None:
    advance = kind.advance
    tested, model = kind(), dict[int, int]()
    for step, (start, end), number in steps:
        value = (
            pack_pte((Target.PMEM, Target.DRAM, Target.ZERO)[number], 0, Access.READ) if kind is PageTable else number
        )
        if step == "set" and start < end:
            tested.set(start, end, value)
            model |= {point: advance(value, point - start) for point in range(start, end)}
        elif step == "insert":
            pieces = [(low, high, advance(value, low - start)) for low, high in tested.gaps(start, end)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("dax_mp.ranges._INSERTIONS_MAX", insertions_max)
                tested.insert(pieces[::-1])
            model |= {point: advance(value, point - start) for low, high, _ in pieces for point in range(low, high)}
        elif step == "take" and start < end:
            run = next((run for run in as_runs(model, advance) if run[0] <= start < run[1]), None)
            taken_end = None if run is None else min(run[1], end)
            assert tested.take(start, end - start) == taken_end
            for point in range(start, taken_end or start):
                del model[point]
        elif step == "clear":
            removed = tested.clear(start, end)
            gone = {point: model.pop(point) for point in range(start, end) if point in model}
            assert {p: advance(v, p - low) for low, high, v in removed for p in range(low, high)} == gone
        tested.check()
        assert list(tested) == as_runs(model, advance)
        assert len(tested) == len(list(tested))
        assert tested.total() == len(model)
    assert [tested.get(point) for point in range(POINTS + 1)] == [model.get(point) for point in range(POINTS + 1)]
    assert_window(tested, model, advance, *window)


def assert_window(
    tested: RangeMap[int], model: dict[int, int], advance: Callable[[int, int], int], start: int, end: int
) -> None:
    inside = [point for point in range(start, end) if point in model]
    pieces = list(tested.pieces(start, end))
    assert {p: advance(v, p - low) for low, high, v in pieces for p in range(low, high)} == {
        p: model[p] for p in inside
    }
    assert all(low < high for low, high, _ in pieces)
    gaps = list(tested.gaps(start, end))
    assert [p for gap in gaps for p in range(*gap)] == [p for p in range(start, end) if p not in model]
    assert tested.span(start, end) == (PageRange(inside[0], inside[-1] + 1) if inside else None)
    runs = as_runs(model, advance)
    assert tested.before(start) == next((run for run in reversed(runs) if run[0] <= start), None)
    assert tested.after(start) == next((run for run in runs if run[0] > start), None)


@checked
@given(st.sampled_from(Target), st.integers(0, 1 << 50), st.sampled_from([1, 2, 3]))
def test_a_packed_entry_has_what_was_packed(target: Target, pfn: int, access: int) -> None:
    entry = pack_pte(target, pfn, access)
    assert pte_fields(entry) == (target, pfn, access)
    assert unpack_pte(entry) == (target, pfn, Access(access))


def test_an_empty_range_cannot_be_set() -> None:
    with pytest.raises(AssertionError, match="empty range"):
        RangeMap[int]().set(3, 3, 0)


def test_check_sees_pieces_that_should_be_one() -> None:
    broken = BlockMap()
    broken.set(0, 2, 10)
    broken.set(5, 6, 15)
    broken._starts[1], broken._ends[1], broken._values[1] = 2, 3, 12
    with pytest.raises(AssertionError, match="not merged at 2"):
        broken.check()
