"""Whatever the user writes: the right kind of source, or one sentence."""

import numpy as np
import pytest
from PIL import Image

from casa.errors import UserError
from casa.media.open_source import open_source
from casa.media.pictures_source import FolderSource, PictureSource
from casa.media.video import FrameReader


def test_kinds(tmp_path, clips):
    path = clips.write(tmp_path / "a.mp4", [0, 100, 200, 300, 400, 500])
    for spec in (path, str(path), f"file://{path}"):
        with open_source(spec, fps=5, start=0.2) as source:
            assert isinstance(source, FrameReader)
            assert source.describe.endswith("a.mp4: 64 x 48, h264")
            assert [(clips.number(f.picture), round(f.seconds, 3)) for f in source] == [(2, 0.2), (4, 0.4)]
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
