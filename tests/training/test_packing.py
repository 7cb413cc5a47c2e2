"""Packed rows: every sample once, positions that restart, and a loss on answers alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.training.conversation import Sample
from casa.training.packing import IGNORE_INDEX, pack

PAD = 0


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    found = []
    for number, length in enumerate(draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))):
        ids = tuple(100 * (number + 1) + i for i in range(length))
        learn = tuple(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        places = tuple(sorted(draw(st.lists(st.integers(0, length - 1), max_size=3))))
        found.append(Sample(ids, learn, places))
    return found


@settings(max_examples=60, deadline=None)
@given(samples(), st.integers(12, 30))
def test_every_sample_stands_whole_in_one_row(given_samples: list[Sample], row_tokens: int) -> None:
    rows = pack(given_samples, row_tokens, PAD)
    assert rows.input_ids.shape[1] <= row_tokens
    found = {}
    for row in range(rows.input_ids.shape[0]):
        starts = (rows.position_ids[row] == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], rows.input_ids.shape[1]], strict=True):
            assert rows.position_ids[row, start:stop].tolist() == list(range(stop - start))
            found[tuple(rows.input_ids[row, start:stop].tolist())] = (row, start)
    for index, sample in enumerate(given_samples):
        row, start = found[sample.ids]
        labels = rows.labels[row, start : start + len(sample)].tolist()
        wanted = [i if learn else IGNORE_INDEX for i, learn in zip(sample.ids, sample.learn, strict=True)]
        assert labels == [IGNORE_INDEX, *wanted[1:]]
        own = [k for k, (owner, _) in enumerate(rows.pictures) if owner == index]
        assert [rows.pictures[k][1] for k in own] == list(range(len(sample.places)))
        assert rows.image_positions[own].tolist() == [[row, start + place] for place in sample.places]
    assert rows.image_positions.tolist() == sorted(rows.image_positions.tolist())
    padding = rows.input_ids == PAD
    assert (rows.labels[padding] == IGNORE_INDEX).all()
    assert rows.learned == sum(sum(s.learn[1:]) for s in given_samples)


def test_rows_are_filled() -> None:
    row = Sample(tuple(range(1, 6)), (True,) * 5)
    rows = pack([row] * 7, 15, PAD)
    assert rows.input_ids.shape == (3, 15)
    assert int((rows.input_ids == PAD).sum()) == 10


@pytest.mark.parametrize("length", [0, 9])
def test_a_sample_must_fit(length: int) -> None:
    with pytest.raises(ValueError, match="a row holds 1 to 8"):
        pack([Sample(tuple(range(length)), (True,) * length)], 8, PAD)


def test_without_pictures() -> None:
    rows = pack([Sample((1, 2), (False, True))], 8, PAD)
    assert rows.image_positions.shape == (0, 2)
    assert rows.image_positions.dtype == torch.int64
