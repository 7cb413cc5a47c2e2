"""Figures cannot drift: each stands in a file that says where it came from, and the README repeats it as it stands."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
INDEX = (RESULTS / "README.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = sorted(path.name for path in RESULTS.glob("*.json"))
# what a trainer writes of its own run has another form
MEASURED = [name for name in FILES if not name.endswith("-training.json")]


def record(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def rows(heading, text):
    """The cells of the table below some words, without its two head lines."""
    table = text[text.index(heading) :].split("\n|", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")[2:]]


def test_the_index_names_every_file_and_no_other():
    named = [
        name
        for row in rows("`make results` writes them again", INDEX)
        for name in re.findall(r"`([\w.-]+\.json)`", row[0])
    ]
    assert sorted(named) == FILES


@pytest.mark.parametrize("name", MEASURED)
def test_a_record_says_where_it_came_from(name):
    found = record(name)
    assert re.fullmatch(r"[0-9a-f]{12}\+?", found["commit"] or ""), "the commit"
    assert {"python", "versions", "device", "cores", "threads"} <= set(found)
    assert "torch" in found["versions"]
    assert "seed" in found or "dry_run" in found


def test_the_scores_in_the_readme():
    scores = record("casa-tiny.json")["scores"]
    pages = scores["pages"]
    wanted = [
        (pages["digits"], 0.95, pages["digits"] >= 0.95),
        (pages["lines"], 0.85, pages["lines"] >= 0.85),
        (scores["scenes"]["accuracy"], 0.95, scores["scenes"]["accuracy"] >= 0.95),
        (scores["stream"]["wer"], 0.10, scores["stream"]["wer"] <= 0.10),
    ]
    for (_, score, goal), (value, limit, reached) in zip(rows("`casa-tiny` (", README), wanted, strict=True):
        assert score == f"{value:.1%}".replace("%", " %")
        assert goal.startswith(f"{limit:.0%}".replace("%", " %"))
        assert ("(missed)" in goal) != reached


def test_the_times_in_the_readme():
    found = {}
    for row in record("attention-cpu.json")["rows"]:
        found.setdefault(row["shape"].replace("x", "×"), {})[row["impl"]] = row["both_ms"]
    for shape, dense, sdpa, times in rows("Attention over windows beside", README):
        measured = found[shape]
        assert float(dense.removesuffix(" ms")) == pytest.approx(measured["dense mask"], rel=0.005)
        assert float(sdpa.removesuffix(" ms")) == pytest.approx(measured["sdpa"], rel=0.005)
        assert float(times) == pytest.approx(measured["dense mask"] / measured["sdpa"], abs=0.06)
