"""Whatever the user writes: the right kind of source, or one sentence; directories of pictures, Python iterators."""

import numpy as np
import pytest
from PIL import Image

from casa.errors import UserError
from casa.media.source import Frame
from casa.media.sources import FolderSource, PictureSource, natural, open_source
from casa.media.video import FileSource


def test_kinds(tmp_path, clips):
    path = clips.write(tmp_path / "a.mp4", [0, 100, 200, 300, 400, 500])
    for spec in (path, str(path), f"file://{path}"):
        with open_source(spec, fps=5, start=0.2) as source:
            assert isinstance(source, FileSource)
            assert source.describe.endswith("a.mp4: 64 x 48, h264")
            assert [(clips.number(f.picture), round(f.time, 3)) for f in source] == [(2, 0.2), (4, 0.4)]
            assert source.counts.decoded == 6
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert isinstance(open_source(tmp_path), FolderSource)
    assert len(list(open_source(tmp_path / "b.png"))) == 1
    assert isinstance(open_source([]), PictureSource)


@pytest.mark.parametrize("spec", [np.zeros((2, 2, 3), np.uint8), Image.new("RGB", (2, 2)), 5, None, b"a.mp4"])
def test_what_gives_no_frames(spec):
    with pytest.raises(TypeError, match="is no source of frames"):
        open_source(spec)


def test_sources_are_used_as_they_are():
    with pytest.raises(TypeError, match="use it as it is"):
        open_source(open_source([]))


@pytest.mark.parametrize("spec", ["-", "camera:0", "http://127.0.0.1:9/a", []])
def test_only_files_and_folders_have_parts(spec):
    with pytest.raises(UserError, match="start and end are for files and folders"):
        open_source(spec, start=1.0)


def test_names_that_are_nothing(tmp_path):
    for spec, sentence in (
        ("", "is empty"),
        (tmp_path / "no", "There is no file"),
        ("ftp://a/b", "no reading from ftp"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_source(spec)
    for fps in (0, float("nan")):
        with pytest.raises(UserError, match="fps is"):
            open_source([], fps=fps)


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
    return [(f.time, int(f.picture[0, 0, 0])) for f in source]


def test_a_folder_in_natural_order(folder):
    with open_source(folder, fps=2) as source:
        assert source.describe == f"{folder}: 5 pictures"
        assert not source.is_live
        frames = list(source)
    assert [(f.index, f.time, int(f.picture[0, 0, 0])) for f in frames] == [
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
    assert [(f.time, int(f.picture[0, 0, 0])) for f in frames] == [(0, 0), (0.25, 7), (0.5, 9)]
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
