"""What benchmarks share: turns, tables, records, their comparison, and panels from 0 on with room above."""

import json

import pytest

from casa import figures
from casa.benchmarks import harness
from casa.benchmarks.harness import Benchmark, Panel, percentiles, table, take_turns
from casa.errors import UserError


def found(median=2.0, **settings):
    return Benchmark("tea", {"size": 1} | settings, {"casa": {"ms": [1, median]}, "good": True}, "a table")


def test_contestants_take_turns():
    heard = []
    told = take_turns({name: lambda name=name: heard.append(name) or len(heard) for name in "abc"}, 2)
    assert heard == [*"abcabc"]
    assert told == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}


def test_percentiles():
    assert percentiles([1.0, 2.0, 30.04], 50, 100) == [2.0, 30.0]


def test_a_table_has_units_and_dashes_and_every_column_is_as_wide_as_it_must_be():
    rows = [{"name": "a", "bytes": [2048, 3 << 20]}, {"name": "long", "bytes": None}]
    shown = table(rows, {"": "{name}", "first": "{bytes[0]!K:.1f} KiB", "last": "{bytes[1]!M:.0f} MiB"})
    assert shown.split("\n") == ["        first   last", "a     2.0 KiB  3 MiB", "long        -      -"]


def test_a_record_is_compared_with_an_earlier_one(tmp_path):
    found().write(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["bench"], record["size"], record["casa"]) == ("tea", 1, {"ms": [1, 2.0]})
    assert {"commit", "versions", "cores"} <= set(record)
    told = found(median=3.0).compare(tmp_path / "a.json").split("\n")
    assert [line.split() for line in told[1:]] == [["casa.ms.0", "1", "1", "1.00"], ["casa.ms.1", "3", "2", "1.50"]]
    with pytest.raises(UserError, match="another size"):
        found(size=2).compare(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(UserError, match="no record"):
        found().compare(tmp_path / "b.json")


@pytest.mark.parametrize("line", [[600.0, 601.0], [0.0, 50.0, 20.0]])
def test_no_line_lies_on_the_upper_edge(tmp_path, monkeypatch, line):
    kept = []
    monkeypatch.setattr(
        harness, "write_png", lambda figure, path: kept.append(figure) or figures.write_png(figure, path)
    )
    panels = (Panel("frame", "ms", {"a line": line, "another": ([5, 6], [0.0, 1.0])}),)
    Benchmark("tea", {}, {}, "", panels=panels).plot(tmp_path / "a.png")
    assert kept[0].axes[0].get_ylim() == pytest.approx((0, 1.1 * max(line)))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
