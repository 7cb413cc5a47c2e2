"""plan_call: from padded rows to packed windows, and what is kept for the next call."""

import pytest
import torch

from casa.errors import UserError
from casa.layers import WindowExtent, WindowState, plan_call
from casa.windows import WindowLayout

ALL = torch.ones(1, 6, dtype=torch.bool)


def padded(*real):
    """bool rows, `real` tokens each, padded on the left."""
    length = max(real)
    return torch.tensor([[False] * (length - n) + [True] * n for n in real])


def test_a_row_without_padding_is_taken_as_it_is():
    plan = plan_call(ALL, [(0, 2), (0, 5)], [3, 1])
    assert plan.layout == WindowLayout.from_insertions([6], [[(2, 3), (5, 1)]])
    assert plan.tokens is None
    assert plan.new_images.tolist() == [0, 1, 2, 3]
    assert plan.join is None
    assert plan.keep is None


def test_padding_is_left_out():
    plan = plan_call(padded(2, 4), [(0, 3), (1, 0)], [1, 2])
    assert plan.layout == WindowLayout.from_insertions([2, 4], [[(1, 1)], [(0, 2)]])
    assert plan.tokens is not None
    assert plan.tokens.tolist() == [2, 3, 4, 5, 6, 7]


def test_packed_samples_and_the_image_at_their_border():
    plan = plan_call(ALL, [(0, 1), (0, 3), (0, 6)], [1, 1, 1], sample_starts=[[0, 3]])
    assert plan.layout == WindowLayout.from_insertions([3, 3], [[(1, 1)], [(0, 1), (3, 1)]])


def test_what_is_kept_is_the_visible_windows():
    places, lengths = [(0, 0), (0, 2), (0, 4)], [3, 1, 2]
    wanted = {0: [(2, 2, 2)], 1: [(1, 2, 2), (2, 2, 2)], -1: [(3, 2, 2), (1, 2, 2), (2, 2, 2)]}
    for history, extents in wanted.items():
        keep = plan_call(ALL, places, lengths, history=history, keep=True).keep
        assert keep is not None
        assert keep.windows == [[WindowExtent(*extent) for extent in extents]]
        assert keep.image_index.tolist() == [list(range(6))[-sum(extent[0] for extent in extents) :]]
        assert keep.text_index.tolist() == [[4, 5]]


def test_a_call_goes_on_in_the_window_that_is_open():
    state = WindowState([[WindowExtent(3, 2, 2)]])
    plan = plan_call(torch.ones(1, 2, dtype=torch.bool), [(0, 1)], [4], state=state, keep=True)
    assert plan.layout == WindowLayout.from_insertions([4], [[(0, 3), (3, 4)]], past=[2])
    assert plan.new_images.tolist() == [3, 4, 5, 6]
    assert plan.keep is not None
    assert plan.keep.windows == [[WindowExtent(4, 1, 1)]]


def test_an_image_joins_a_window_that_has_no_text_yet():
    state = WindowState([[WindowExtent(3, 0, 0)]])
    plan = plan_call(torch.ones(1, 2, dtype=torch.bool), [(0, 0)], [4], state=state, keep=True)
    assert plan.layout.num_windows == 1
    assert plan.keep is not None
    assert plan.keep.windows == [[WindowExtent(7, 2, 2)]]


def test_text_behind_the_last_image_is_counted_over_calls():
    row = torch.ones(1, 3, dtype=torch.bool)
    first = plan_call(row, [(0, 1)], [4], split="sample", keep=True).keep
    assert first is not None
    assert first.windows == [[WindowExtent(4, 3, 2)]]
    later = plan_call(row, [], [], split="sample", state=WindowState(first.windows), keep=True).keep
    assert later is not None
    assert later.windows == [[WindowExtent(4, 6, 5)]]
    last = plan_call(row, [(0, 3)], [1], split="sample", state=WindowState(later.windows), keep=True).keep
    assert last is not None
    assert last.windows == [[WindowExtent(5, 9, 0)]]


@pytest.mark.parametrize(
    ("places", "lengths", "words"),
    [
        ([(0, 2)], [1, 1], "2 images but 1 image_positions"),
        ([(0, 3), (0, 2)], [1, 1], "out of order"),
        ([(1, 0), (0, 3)], [1, 1], "out of order"),
        ([(2, 0)], [1], "row 2, but the batch has rows 0..1"),
        ([(0, 5)], [1], "out of range 0..4"),
        ([(0, 1)], [1], "inside its padding"),
    ],
)
def test_images_that_cannot_stand_there(places, lengths, words):
    with pytest.raises(UserError, match=words):
        plan_call(padded(2, 4), places, lengths)


def test_images_inside_right_padding_or_a_gap_of_padding():
    with pytest.raises(UserError, match="inside its padding"):
        plan_call(torch.tensor([[True, True, False, False]]), [(0, 3)], [1])
    plan_call(torch.tensor([[True, True, False, False]]), [(0, 2)], [1])


def test_packed_rows_cannot_continue_a_state():
    with pytest.raises(UserError, match="packed rows cannot continue a cache"):
        plan_call(ALL, [], [], sample_starts=[[0, 2]], state=WindowState([[]]))


def test_text_before_the_first_image_and_windows_that_nobody_looks_at_are_left_out():
    plan = plan_call(ALL, [(0, 2), (0, 5)], [3, 1], keep=True, skip_blind=True)
    assert plan.layout == WindowLayout.from_insertions([4], [[(0, 3), (3, 1)]])
    assert plan.tokens.tolist() == [2, 3, 4, 5]
    state = WindowState([[WindowExtent(3, 2, 2)]])
    two = torch.ones(1, 2, dtype=torch.bool)
    plan = plan_call(two, [(0, 0)], [4], state=state, keep=True, skip_blind=True)
    assert plan.join is None
    assert plan.layout == WindowLayout.from_insertions([2], [[(0, 4)]])
    for change in ({"history": 1}, {"split": "sample"}):
        assert plan_call(two, [(0, 0)], [4], state=state, keep=True, skip_blind=True, **change).join is not None
    # the token before it looks at the old frame, and a frame right behind another one joins it
    assert plan_call(two, [(0, 1)], [4], state=state, keep=True, skip_blind=True).join is not None
    state = WindowState([[WindowExtent(3, 0, 0)]])
    assert plan_call(two, [(0, 0)], [4], state=state, keep=True, skip_blind=True).layout.num_image == 7


def test_a_row_without_images_is_kept_for_later_text_or_left_out():
    rows = torch.ones(2, 3, dtype=torch.bool)
    assert plan_call(rows, [(0, 1)], [2], keep=True, skip_blind=True).tokens.tolist() == [1, 2, 3, 4, 5]
    assert plan_call(rows, [(0, 1)], [2], skip_blind=True).tokens.tolist() == [1, 2]
