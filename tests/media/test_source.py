"""The protocol of all sources: frames, and letting go at any moment."""

import threading

import numpy as np
import pytest

from casa.errors import UserError
from casa.media.source import Frame, VideoSource, check_fps, check_span
from casa.testing import PATIENCE


class Slow(VideoSource):
    """Gives a frame when it is told to; says whether it was closed, and where."""

    def __init__(self):
        super().__init__("slow")
        self.go, self.waiting, self.closed = threading.Event(), threading.Event(), 0

    def _read(self):
        try:
            for k in range(3):
                self.waiting.set()
                assert self.go.wait(PATIENCE)
                yield Frame(np.zeros((2, 3, 3), np.uint8), float(k), k)
        finally:
            self.closed += 1


def test_a_frame_has_two_names_for_everything():
    frame = Frame(np.full((2, 3, 3), 7, np.uint8), 1.5, 4)
    assert (frame.image.size, frame.image.mode, frame.image.getpixel((0, 0))) == ((3, 2), "RGB", (7, 7, 7))
    assert (frame.time, frame.index) == (1.5, 4)


def test_to_the_end():
    source = Slow()
    source.go.set()
    with source:
        assert [f.index for f in source] == [0, 1, 2]
        assert next(source, None) is None
    assert source.closed == 1


def test_closed_in_the_middle():
    source = Slow()
    source.go.set()
    with source:
        next(source)
    assert source.closed == 1
    assert list(source) == []
    source.close()
    assert source.closed == 1


def test_closed_before_the_first_frame():
    source = Slow()
    source.close()
    assert list(source) == []


def test_closed_by_another_thread_while_one_waits():
    source, given = Slow(), []
    reader = threading.Thread(target=lambda: given.extend(source))
    reader.start()
    assert source.waiting.wait(PATIENCE)
    source.close()  # cannot take what the other holds, and does not wait for it
    assert source.closed == 0
    source.go.set()
    reader.join(PATIENCE)
    assert (given, source.closed) == ([], 1)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_rates_that_are_none(fps):
    with pytest.raises(UserError, match="fps is"):
        check_fps(fps)


def test_parts_that_cannot_be():
    for start, end in ((-1, None), (float("nan"), None), (2, 2), (0, float("nan"))):
        with pytest.raises(UserError, match="give a number of seconds"):
            check_span(start, end)
    check_span(0, 0.1)
