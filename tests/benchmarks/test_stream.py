"""Streams beside insertion of the same size: turns of fixed length, and what each holds. No test asserts a time."""

import itertools

import numpy as np
import pytest

from casa.benchmarks.stream import bench_stream, bench_turns, fixed_turns
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
    found = bench_turns(checkpoint, turns=10, tokens=2, size=224, peak=False)
    assert {name: row["turns"] for name, row in found.figures.items()} == {"casa": 10, "insertion": 10}
    assert len(found.figures["casa"]["first_token_ms"]) == 2
    assert found.table.count("\n") == 2
    found.plot(tmp_path / "turns.png")
    assert (tmp_path / "turns.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_stream_is_told_by_its_quarters(checkpoint):
    found = bench_stream(checkpoint, frames=8, size=224, max_inserted=4)
    assert {name: found.figures[name]["frames"] for name in ("casa", "insertion")} == {"casa": 8, "insertion": 4}
    casa = found.figures["casa"]
    assert casa["image_tokens"] == [64, 64]
    assert casa["cache_bytes"][1] > casa["cache_bytes"][0]
    assert found.table.count("\n") == 2


@pytest.mark.parametrize("settings", [{"turns": 5}, {"tokens": 1}])
def test_too_little_to_measure_is_refused(settings):
    with pytest.raises(UserError, match="give at least"):
        bench_turns("casa-tiny", **{"turns": 10, "tokens": 2} | settings)
    with pytest.raises(UserError, match="at least 4"):
        bench_stream("casa-tiny", frames=3)
