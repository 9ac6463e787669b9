import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dax_mp.frames import FrameAllocator
from dax_mp.ranges import Extent

A, B = b"a" * 16, b"b" * 16


def frames_of(extents: list[Extent]) -> list[int]:
    return [frame for pfn, length in extents for frame in range(pfn, pfn + length)]


def test_a_page_goes_where_it_continues_the_file() -> None:
    allocator = FrameAllocator(1, 101)
    assert allocator.allocate(3, 40) == [Extent(40, 3)]
    assert allocator.allocate(5, 43) == [Extent(43, 5)]


def test_a_goal_that_is_taken_gives_the_next_extent_that_is_long_enough() -> None:
    allocator = FrameAllocator(1, 101)
    allocator.allocate(10, 20)
    allocator.allocate(1, 33)  # leaves [30, 33) after the goal, too short
    assert allocator.allocate(5, 25) == [Extent(34, 5)]


def test_a_goal_outside_the_device_is_laid_around_it() -> None:
    """Neighbouring pages of a sparse file that is larger than the device still come to lie side by side."""
    assert FrameAllocator(1, 11).allocate(3, 11 + 4) == [Extent(5, 3)]
    assert FrameAllocator(1, 11).allocate(3, -2) == [Extent(8, 3)]
    assert sorted(frames_of(FrameAllocator(1, 11).allocate(10, 1 << 50))) == list(range(1, 11))


def test_after_the_last_free_extent_comes_the_first() -> None:
    allocator = FrameAllocator(1, 11)
    allocator.allocate(3, 8)
    assert allocator.allocate(2, 9) == [Extent(1, 2)]


def test_a_goal_outside_the_region_is_as_far_from_its_other_end() -> None:
    """A sparse file may be larger than the device: its pages are laid out in turns around it."""
    allocator = FrameAllocator(1, 11)
    assert [allocator.allocate(1, goal) for goal in (11, 0, -1, 25)] == [[Extent(pfn, 1)] for pfn in (1, 10, 9, 5)]


def test_the_first_block_of_a_file_leaves_room_for_the_file_before() -> None:
    allocator = FrameAllocator(1, 101)
    assert allocator.allocate(1, None) == [Extent(1, 1)]
    assert allocator.allocate(1, None) == [Extent(51, 1)]  # in the middle of what is free
    assert allocator.allocate(49, 2) == [Extent(2, 49)]


def test_all_or_nothing() -> None:
    allocator = FrameAllocator(1, 11)
    allocator.allocate(1, 5)
    with pytest.raises(OSError) as caught:
        allocator.allocate(10, None)
    assert caught.value.errno == errno.ENOSPC
    assert allocator.free_pages == 9
    assert sorted(frames_of(allocator.allocate(9, None))) == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    with pytest.raises(OSError) as caught:
        allocator.allocate_extent(1, None)
    assert caught.value.errno == errno.ENOSPC


def test_a_region_without_frames() -> None:
    with pytest.raises(OSError):
        FrameAllocator(1, 1).allocate_extent(1, None)


def test_frames_are_not_freed_twice() -> None:
    allocator = FrameAllocator(1, 11)
    (extent,) = allocator.allocate(4, None)
    allocator.release([extent])
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.release([Extent(extent.pfn + 3, 1)])


def test_quarantine_ends_with_the_last_holder() -> None:
    allocator = FrameAllocator(1, 11)
    first, second = allocator.allocate(4, 1), allocator.allocate(2, 5)
    allocator.hold(A, first)
    allocator.hold(B, [*first, *second])
    allocator.release([*first, *second])
    assert (allocator.free_pages, allocator.quarantined_pages) == (4, 6)
    with pytest.raises(OSError):
        allocator.allocate(5, None)
    allocator.holder_gone(A)
    assert (allocator.free_pages, allocator.quarantined_pages) == (4, 6)
    allocator.holder_gone(B)
    assert (allocator.free_pages, allocator.quarantined_pages) == (10, 0)
    assert list(allocator.free) == [(1, 11, None)]


def test_only_the_frames_that_it_may_reach_are_in_quarantine() -> None:
    allocator = FrameAllocator(1, 11)
    extents = allocator.allocate(8, 1)
    allocator.hold(A, [Extent(3, 2), Extent(2, 2), Extent(6, 1)])
    allocator.release(extents)
    assert list(allocator.quarantine) == [(2, 5, None), (6, 7, None)]
    assert list(allocator.free) == [(1, 2, None), (5, 6, None), (7, 11, None)]
    assert allocator.free_pages == 6


def test_what_it_may_reach_is_held_once() -> None:
    """However often a page is punched and written again: its frame is another one each time."""
    allocator = FrameAllocator(1, 11)
    (extent,) = allocator.allocate(1, 1)
    allocator.hold(A, [extent])
    for _ in range(20):
        allocator.release([extent])
        (extent,) = allocator.allocate(1, 1)
        assert (allocator.free_pages, allocator.quarantined_pages) == (8, 1)
    allocator.holder_gone(A)
    allocator.holder_gone(A)
    assert (allocator.free_pages, allocator.quarantined_pages) == (9, 0)


@settings(database=None, deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 12), st.none() | st.integers(0, 60), st.integers(0, 5)), max_size=40))
def test_no_frame_is_in_two_places(requests: list[tuple[int, int | None, int]]) -> None:
    allocator, taken = FrameAllocator(1, 41), list[list[Extent]]()
    for length, goal, release in requests:
        try:
            extents = allocator.allocate(length, goal)
        except OSError:
            assert length > allocator.free_pages
        else:
            assert len(frames_of(extents)) == length
            taken.append(extents)
        if taken and release == 0:
            allocator.release(taken.pop(0))
        allocator.free.check()
        free = [frame for start, end, _ in allocator.free for frame in range(start, end)]
        assert sorted(free + [frame for extents in taken for frame in frames_of(extents)]) == list(range(1, 41))
        assert len(free) == allocator.free_pages
