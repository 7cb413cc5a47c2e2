"""Directories of pictures, and Python iterators."""

import numpy as np
import pytest
from PIL import Image

from casa.errors import UserError
from casa.media.open_source import open_source
from casa.media.pictures_source import natural
from casa.media.source import Frame


def grey(k, size=(8, 6)):
    return Image.new("RGB", size, (k, k, k))


@pytest.fixture
def folder(tmp_path):
    """Pictures 1, 2, 10, 11 with a broken one in the middle, and what else lies in folders."""
    for k in (1, 2, 10, 11):
        grey(k).save(tmp_path / f"shot{k}.png")
    (tmp_path / "shot3.png").write_bytes((tmp_path / "shot2.png").read_bytes()[:40])
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "more").mkdir()
    return tmp_path


def shades(source):
    return [(f.seconds, int(f.picture[0, 0, 0])) for f in source]


def test_a_folder_in_natural_order(folder):
    with open_source(folder, fps=2) as source:
        assert source.describe == f"{folder}: 5 pictures"
        assert not source.is_live
        frames = list(source)
    assert [(f.number, f.seconds, int(f.picture[0, 0, 0])) for f in frames] == [
        (0, 0.0, 1),
        (1, 0.5, 2),
        (2, 1.5, 10),  # the moment of the broken one stays empty
        (3, 2.0, 11),
    ]
    assert (source.counts.decoded, source.counts.skipped) == (4, 1)
    assert frames[0].picture.shape == (6, 8, 3)
    assert frames[0].picture.flags.writeable


def test_part_of_a_folder(folder):
    assert shades(open_source(folder, fps=2, start=0.5, end=2)) == [(0.5, 2), (1.5, 10)]


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"holds no pictures: name a folder with \.png"):
        open_source(tmp_path)


def test_natural_order():
    names = ["b1", "a10", "a2", "A1", "10", "9", "a", "a02", "²"]
    assert sorted(names, key=natural) == ["9", "10", "a", "A1", "a02", "a2", "a10", "b1", "²"]


def test_an_iterator():
    given = [grey(0), np.full((4, 5, 3), 7, np.uint8), grey(9).convert("L")]
    frames = list(open_source(iter(given), fps=4))
    assert [(f.seconds, int(f.picture[0, 0, 0])) for f in frames] == [(0, 0), (0.25, 7), (0.5, 9)]
    assert [f.picture.shape for f in frames] == [(6, 8, 3), (4, 5, 3), (6, 8, 3)]
    assert len(list(open_source([grey(k) for k in range(5)], fps=29.97))) == 5


def test_a_generator_runs_no_further_than_asked_and_is_closed():
    made, closed = [], []

    def camera():
        try:
            for k in range(100):
                made.append(k)
                yield grey(k)
        finally:
            closed.append(True)

    with open_source(camera(), fps=2, live=True) as source:
        assert source.is_live
        next(source), next(source)
    assert made == [0, 1]
    assert closed == [True]


def test_frames_with_times_are_sampled():
    frames = [Frame(np.full((2, 2, 3), k, np.uint8), k * 0.1, k) for k in range(12)]
    assert shades(open_source(frames, fps=2)) == [(0.0, 0), (0.5, 5), (1.0, 10)]
    with pytest.raises(UserError, match="let the times rise"):
        list(open_source([frames[1], frames[0]], fps=2))


def test_what_is_no_picture():
    source = open_source([grey(1), "a.png"], fps=2)
    next(source)
    with pytest.raises(TypeError, match="give a PIL image or a uint8 array"):
        next(source)
    with pytest.raises(UserError, match="give uint8 values"):
        next(open_source([np.zeros((2, 2, 3))], fps=2))
