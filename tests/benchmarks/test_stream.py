"""Streams beside insertion of the same size: turns of fixed length, and what each holds. No test asserts a time."""

import itertools

import numpy as np
import pytest

from casa.benchmarks import stream
from casa.benchmarks.settings import StreamSettings
from casa.benchmarks.stream import bench_stream, fixed_turns
from casa.errors import UserError
from casa.testing import tiny_casa, tiny_checkpoint, tiny_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.mark.slow
def test_both_take_the_same_turns_and_only_insertion_grows_by_its_images():
    generator = np.random.default_rng(0)
    frames = (generator.integers(0, 255, (56, 84, 3), dtype=np.uint8) for _ in itertools.count())
    turns = fixed_turns(tiny_casa(), tiny_processor(), frames, turns=12, tokens=3)
    assert {name: len(rows) for name, rows in turns.items()} == {"casa": 12, "insertion": 12}
    # a delimiter, and two of three tokens fed; six image tokens a frame
    grown = {name: rows[-1].cache_tokens - rows[-2].cache_tokens for name, rows in turns.items()}
    assert grown == {"casa": 3, "insertion": 9}
    assert turns["casa"][-1].cache_tokens == 12 * 3 + 6
    assert turns["insertion"][-1].cache_tokens == 12 * 9


@pytest.mark.slow
def test_turns_are_told_and_plotted(checkpoint, tmp_path):
    found = bench_stream(StreamSettings(checkpoint, 10, 224, tokens=2, peak=False))
    assert {name: row["turns"] for name, row in found.figures.items()} == {"casa": 10, "insertion": 10}
    assert len(found.figures["casa"]["first_token_ms"]) == 2
    assert found.table.count("\n") == 2
    found.plot(tmp_path / "turns.png")
    assert (tmp_path / "turns.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_stream_is_told_by_its_quarters(checkpoint, monkeypatch):
    monkeypatch.setattr(stream, "MAX_INSERTED", 4)
    found = bench_stream(StreamSettings(checkpoint, 8, 224))
    assert {name: found.figures[name]["frames"] for name in ("casa", "insertion")} == {"casa": 8, "insertion": 4}
    casa = found.figures["casa"]
    assert casa["image_tokens"] == [64, 64]
    assert casa["cache_bytes"][1] > casa["cache_bytes"][0]
    assert found.table.count("\n") == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"frames": 5, "tokens": 2}, "at least 10"),
        ({"tokens": 1}, "tokens is 1; it must be 2 or more, or null"),
        ({"frames": 3}, "at least 4"),
        ({"tokens": 2, "sessions": 2}, "two measurements"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        bench_stream(StreamSettings(**settings))
