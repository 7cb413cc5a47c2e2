"""What `casa train` draws: never the ink of a held-out scan, nor a crop of a held-out photograph."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from casa.cli.training_sources import training_sources
from casa.evaluation import ink, page, photos, scene
from casa.evaluation.ink import FIRST_HELD_OUT
from casa.evaluation.photos import PHOTOS

SOURCES = training_sources()


@dataclass
class Seen:
    """scans: whose ink was read, kin among them. photos: that were cut from."""

    scans: set[int] = field(default_factory=set)
    photos: set[str] = field(default_factory=set)


@dataclass
class Watched:
    """All scans as `render_digits` reads them, one after the other in one row; notes which ones it does."""

    ink: np.ndarray
    seen: Seen

    def reshape(self, _):
        return self

    def take(self, index):
        # (n, h, w): each digit is of one scan
        self.seen.scans.update((index[:, 0, 0] // self.ink[0].size).tolist())
        return self.ink.reshape(-1).take(index)


@pytest.fixture
def seen(monkeypatch):
    found, masters, photo = Seen(), ink._masters(), photos._photo

    def shown(name):
        found.photos.add(name)
        return photo(name)

    monkeypatch.setattr(ink, "_masters", lambda: Watched(masters, found))
    monkeypatch.setattr(photos, "_photo", shown)
    return found


@pytest.mark.parametrize("name", [*SOURCES.pictures, *SOURCES.clips])
def test_a_source_draws_from_training_scans_and_photographs_alone(name, seen):
    rng = np.random.default_rng(0)
    for _ in range(8):
        if name in SOURCES.clips:
            SOURCES.clips[name](rng)
        else:
            SOURCES.pictures[name](rng, (224, 224))
    assert seen.scans or seen.photos
    assert all(scan < FIRST_HELD_OUT for scan in seen.scans)
    assert seen.photos <= set(PHOTOS["train"])


def test_the_watch_sees_what_evaluation_draws(seen):
    drawn = page(0, "held_out")
    assert seen.scans >= {glyph.scan for glyph in drawn.meta["glyphs"]}
    assert min(seen.scans) >= FIRST_HELD_OUT
    for seed in range(4):
        scene(seed, "held_out")
    assert seen.photos
    assert seen.photos <= set(PHOTOS["held_out"])
