"""Filming: the same seed gives the same bytes, and the truth stands beside the film."""

import json

import pytest

from casa.demo.clip import Clip
from casa.demo.film import film
from casa.errors import UserError
from casa.media import probe


def test_a_film_and_its_truth(tmp_path):
    told = []
    for name in ("a.mp4", "b.mp4"):
        film(tmp_path / name, seed=3, seconds=2, size=(224, 224), progress=lambda done, of: told.append((done, of)))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert told[-1] == (60, 60)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.fps, info.frames) == (224, 224, 30.0, 60)
    clip = Clip.read(tmp_path / "a.mp4")
    assert clip.fps == 2
    assert all(text.isdigit() and 0 <= time < 2 for time, text in clip.captions)
    assert json.loads((tmp_path / "a.json").read_text())["size"] == [224, 224]


def test_nothing_is_left_of_a_film_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        film(tmp_path / "nowhere" / "a.mp4", seed=3, seconds=2, size=(224, 224))
    with pytest.raises(ValueError, match="28"):
        film(tmp_path / "a.mp4", seconds=2, size=(225, 224))
    assert not list(tmp_path.iterdir())
