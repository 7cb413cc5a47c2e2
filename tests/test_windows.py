"""WindowLayout against a pure-Python reading of the contract, on layouts drawn at random."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.errors import UserError
from casa.windows import ImageSpan, Window, WindowLayout


@st.composite
def definitions(draw):
    lengths = draw(st.lists(st.integers(0, 6), max_size=4))
    image = lambda length: st.tuples(st.integers(0, length), st.integers(1, 3))  # noqa: E731
    insertions = [sorted(draw(st.lists(image(n), max_size=4)), key=lambda pair: pair[0]) for n in lengths]
    past = [draw(st.integers(0, n)) for n in lengths] if draw(st.booleans()) else None
    return {
        "text_lengths": lengths,
        "insertions": insertions,
        "split": draw(st.sampled_from(["image", "sample"])),
        "history": draw(st.sampled_from([0, 1, 2, -1])),
        "past": past,
    }


def by_the_contract(text_lengths, insertions, split, history, past):
    """Rows of True and False, worked out one pair at a time."""
    texts = [(sample, t) for sample, n in enumerate(text_lengths) for t in range(n)]
    images = [(s, p) for s, places in enumerate(insertions) for p, tokens in places for _ in range(tokens)]

    def window(sample, position):
        """How many windows of the sample open at or before a position."""
        if split == "sample":
            return 0
        opened = {p for p, _ in insertions[sample]} | {0}
        return sum(p <= position for p in opened)

    rows = []
    for sample, t in texts:
        if past is not None and t < past[sample]:
            continue
        row = []
        for other, p in images:
            back = window(sample, t) - window(other, p)
            row.append(other == sample and p <= t and (history == -1 or back <= history))
        for other, s in texts:
            row.append(other == sample and window(sample, s) == window(sample, t) and s <= t)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(images) + len(texts))


@pytest.mark.slow
@given(definitions())
@settings(deadline=None)
def test_mask_is_the_contract(definition):
    layout = WindowLayout.from_insertions(**definition)
    want = by_the_contract(**definition)
    mask = layout.mask()
    assert mask.shape == (layout.num_query, layout.num_image + layout.num_text)
    assert torch.equal(mask, want)
    assert torch.equal(layout.sees_image, want[:, : layout.num_image].any(1))


@pytest.mark.slow
@given(definitions())
@settings(deadline=None)
def test_windows_tile_text_and_images_in_order(definition):
    layout = WindowLayout.from_insertions(**definition)
    text = image = 0
    for number, window in enumerate(layout.windows):
        assert (window.text_start, window.image_start) == (text, image)
        assert window.text_start <= window.query_start <= window.text_stop
        assert window.num_text or window.num_image, "no window is empty"
        for span in window.images:
            assert span.start == image
            assert window.text_start <= span.text_position <= window.text_stop
            image = span.stop
        assert window.image_stop == image
        text = window.text_stop
        assert (layout.text_window[window.text_start : window.text_stop] == number).all()
        assert (layout.image_window[window.image_start : window.image_stop] == number).all()
        assert list(layout.visible_windows(number))[-1] == number
        assert {layout.windows[w].sample for w in layout.visible_windows(number)} == {window.sample}
    assert (text, image) == (layout.num_text, layout.num_image)
    assert sum(w.num_query for w in layout.windows) == layout.num_query


@pytest.mark.slow
@given(definitions())
@settings(deadline=None)
def test_positions_count_from_the_window_start(definition):
    layout = WindowLayout.from_insertions(**definition)
    token = torch.arange(layout.num_text)
    starts = torch.tensor([window.text_start for window in layout.windows])
    assert torch.equal(layout.text_position, token - starts[layout.text_window])
    start = starts[layout.image_window]
    assert torch.equal(layout.image_position, layout.image_text_index - start)
    assert (layout.image_position >= 0).all()
    if layout.split == "image":
        assert not layout.image_position.any()
    past = layout.past or (0,) * len(layout.text_lengths)
    queried, offset = [], 0
    for length, gone in zip(layout.text_lengths, past, strict=True):
        queried += range(offset + gone, offset + length)
        offset += length
    assert layout.query_index.tolist() == queried


@pytest.mark.slow
@given(definitions())
@settings(deadline=None)
def test_past_only_takes_rows_away(definition):
    layout = WindowLayout.from_insertions(**definition)
    full = WindowLayout.from_insertions(**{**definition, "past": None})
    assert torch.equal(layout.mask(), full.mask()[layout.query_index])


def test_the_example_of_the_contract():
    layout = WindowLayout.from_insertions([7, 5], [[(2, 4), (2, 3), (5, 4)], []], split="image", history=0)
    assert (layout.num_text, layout.num_image, layout.num_windows) == (12, 11, 4)
    assert layout.windows[1] == Window(0, 2, 5, 2, (ImageSpan(0, 4, 2), ImageSpan(4, 7, 2)), 0, 7)
    assert layout.mask().shape == (12, 23)


def test_the_picture_in_the_docstring():
    layout = WindowLayout.from_insertions(text_lengths=[5], insertions=[[(1, 2), (3, 1)]])
    drawn = [line.split()[1:9] for line in (WindowLayout.__doc__ or "").splitlines() if "." in line[16:24]]
    drawn = [row for row in drawn if len(row) == 8 and set(row) <= {"#", "."}]
    assert torch.equal(layout.mask(), torch.tensor([[cell == "#" for cell in row] for row in drawn]))


def test_image_after_the_last_text_is_a_window_without_text():
    layout = WindowLayout.from_insertions([2], [[(2, 3)]])
    assert [(w.num_text, w.num_image) for w in layout.windows] == [(2, 0), (0, 3)]
    assert not layout.mask()[:, :3].any()


def test_image_at_a_border_stays_in_its_own_sample():
    layout = WindowLayout.from_insertions([2, 2], [[(2, 1)], [(0, 1)]], history=-1)
    assert layout.mask()[:, :2].tolist() == [[False, False]] * 2 + [[False, True]] * 2


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_at_all(lengths):
    layout = WindowLayout.from_insertions(lengths, [[] for _ in lengths])
    assert (layout.num_text, layout.num_image, layout.num_windows) == (0, 0, 0)
    assert layout.mask().shape == (0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"insertions": [[(4, 1), (2, 1)]]}, "out of order"),
        ({"insertions": [[(6, 1)]]}, "out of range"),
        ({"insertions": [[(-1, 1)]]}, "out of range"),
        ({"insertions": [[(1, 0)]]}, "0 tokens"),
        ({"insertions": []}, "one list per sample"),
        ({"text_lengths": [-1]}, "0 or more"),
        ({"split": "images"}, "did you mean 'image'"),
        ({"history": -2}, "-1 for all"),
        ({"past": [6]}, "0..5"),
        ({"past": [1, 1]}, "2 entries"),
    ],
)
def test_refusals_say_what_is_wrong(change, words):
    with pytest.raises(UserError, match=words):
        WindowLayout.from_insertions(**{"text_lengths": [5], "insertions": [[]], **change})


def test_layouts_are_values():
    layout = WindowLayout.from_insertions([3], [[(1, 2)]], past=[1])
    layout.mask()
    for twin in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert twin == layout
        assert hash(twin) == hash(layout)
        assert torch.equal(twin.mask(), layout.mask())
    with pytest.raises(AttributeError):
        layout.history = 1  # type: ignore[misc]


def test_index_tensors_made_in_inference_mode_serve_a_backward():
    layout = WindowLayout.from_insertions([3], [[(1, 2)]], history=1, past=[1])
    with torch.inference_mode():
        layout.mask()
        made = [layout.text_window, layout.image_position, layout.query_index, layout.sees_image]
        made.append(layout.cached("own", lambda: torch.arange(2)))
    assert not any(tensor.is_inference() for tensor in made)
