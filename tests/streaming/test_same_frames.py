"""A frame that looks as the last one is not encoded again, and those of several streams are encoded together."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from casa.errors import UserError
from casa.streaming import StreamingSession
from casa.streaming.batch import run_all
from casa.testing import noise_frames, tiny_processor, tiny_speaker

METHODS = {"parallel": {}, "insertion": {"method": "insertion"}, "compressed": {"compressor": "pool:2"}}


@pytest.fixture(params=METHODS, scope="module")
def model(request):
    return tiny_speaker(**METHODS[request.param])


@pytest.fixture
def encoded(model, monkeypatch):
    """How many frames each call of the encoder had."""
    calls, encode = [], model.encode_images

    def count(pixels, grid):
        calls.append(len(grid))
        return encode(pixels, grid)

    monkeypatch.setattr(model, "encode_images", count)
    return calls


def session(model, **settings):
    return StreamingSession(model, tiny_processor(), max_new_tokens=3, **settings)


def forgetful(one):
    """It encodes every frame."""
    one._recognised = lambda images: (images, None)
    return one


@pytest.mark.parametrize("ahead", [False, True], ids=["in its turn", "ahead"])
def test_a_frame_shown_again_is_encoded_once_and_says_the_same(model, encoded, ahead):
    one, two = noise_frames(3, 2)
    shown = [one, one, copy.deepcopy(one), two, one]
    quick, slow = session(model), forgetful(session(model))

    def said(of):
        return [of.step(of.encode(frame) if ahead else frame) for frame in shown]

    wanted = said(slow)
    assert encoded == [1] * 5
    encoded.clear()
    assert said(quick) == wanted
    assert encoded == [1] * 3
    layers: list[Any] = [*zip(quick._cache.text.layers, slow._cache.text.layers, strict=True)]
    assert all(torch.equal(mine.keys, theirs.keys) for mine, theirs in layers)


def test_what_differs_a_little_is_the_same_only_if_asked(model, encoded):
    frame = np.asarray(noise_frames(3, 1)[0])
    near = frame.copy()
    near[0, 0] ^= 1
    exact, near_enough = session(model), session(model, same_frame=0.01)
    for one, calls in ((exact, 2), (near_enough, 1)):
        encoded.clear()
        one.step(frame)
        one.step(near)
        assert sum(encoded) == calls
    near_enough.step(255 - frame)
    assert sum(encoded) == 2
    # of another shape in as many pixels
    near_enough.step(np.ascontiguousarray((255 - frame).transpose(1, 0, 2)))
    assert sum(encoded) == 3
    with pytest.raises(UserError, match=r"same_frame is -1; give 0 or more"):
        session(model, same_frame=-1)


def test_frames_of_several_streams_are_encoded_together(model, encoded):
    pictures = [noise_frames(seed, 2) for seed in range(3)]
    sessions, singles = ([session(model) for _ in range(3)] for _ in range(2))
    # the second stream shows its picture twice
    for turn, counts in ((0, [3]), (1, [2])):
        shown = [frames[0 if number == 1 else turn] for number, frames in enumerate(pictures)]
        encoded.clear()
        results = run_all(model, [one.prepare(frame) for one, frame in zip(sessions, shown, strict=True)])
        assert encoded == counts
        heard = [one.accept(result) for one, result in zip(sessions, results, strict=True)]
        assert heard == [one.step(frame) for one, frame in zip(singles, shown, strict=True)]


def test_a_saved_session_goes_on_with_what_counts_as_the_same(tmp_path):
    model = tiny_speaker()
    session(model, same_frame=0.5).save(tmp_path / "session")
    loaded = StreamingSession.load(tmp_path / "session", model, tiny_processor())
    assert loaded.same_frame == 0.5
    assert loaded.fork().same_frame == 0.5
