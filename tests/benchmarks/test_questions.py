"""Two questions about a picture: every way has its figures, and the second finds what the first left."""

import pytest

from casa.benchmarks.questions import bench_questions
from casa.benchmarks.settings import QuestionsSettings
from casa.models import ImageCache


@pytest.mark.slow
def test_every_way_has_its_figures(monkeypatch):
    found = []
    inputs = ImageCache.inputs
    monkeypatch.setattr(ImageCache, "inputs", lambda cache, *given: (found.append(cache), inputs(cache, *given))[1])
    record = bench_questions(QuestionsSettings(size=224, rounds=1, device="cpu")).record()
    assert record["bench"] == "questions"
    for where in ("off", "memory", "folder"):
        assert record[where]["first_ms"] > 0
        assert record[where]["ratio"] > 0
    assert {(cache.hits, cache.misses) for cache in found} == {(1, 2)}
