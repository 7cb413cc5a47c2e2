"""Progress where nobody has a terminal: plain lines, not too many, and the final count."""

import pytest

from casa.demo import progress


def test_lines_come_every_few_seconds_and_at_the_end(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 5.0, 6.0, 11.0, 11.0])
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    lines: list[str] = []
    with progress.shown("frames", 4, lines.append) as advance:
        for done in range(1, 5):
            advance(done)
    assert lines == ["frames: 2 of 4", "frames: 4 of 4", "frames: 4 of 4, done"]


def test_an_unknown_total_is_left_out():
    lines: list[str] = []
    with progress.shown("frames", None, lines.append) as advance:
        advance(7)
    assert lines == ["frames: 7, done"]


def test_a_failure_is_not_called_done():
    lines: list[str] = []
    with pytest.raises(KeyError), progress.shown("frames", 2, lines.append):
        raise KeyError
    assert lines == []
