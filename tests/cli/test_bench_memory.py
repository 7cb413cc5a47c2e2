"""`casa bench memory`: what it is told is measured, and stands in its record."""

import json

from casa.benchmarks import memory


def test_its_options_are_measured_and_recorded(casa, monkeypatch):
    given = []

    def measured(*arguments, **settings):
        given.append((arguments, settings))
        return {"films": [], "more_bytes": 0}

    monkeypatch.setattr(memory, "bench_memory", measured)
    result = casa("bench", "memory", "--minutes", 3, "--film-fps", 10, "--max-text-tokens", 64, "--seed", 5, "--json")
    assert result.status == 0
    assert given == [(("casa-tiny", 3.0, 1.0, 112, 2.0, 10.0, 64), {"seed": 5})]
    record = json.loads(result.out)
    assert (record["fps"], record["film_fps"], record["max_text_tokens"], record["seed"]) == (2.0, 10.0, 64, 5)
