"""Figures cannot drift: each stands in a file that says where it came from, and docs/results/README.md and the README
repeat it as it stands.
"""

import json
import re
from pathlib import Path

import pytest

from casa.models.loading import ASSETS
from casa.provenance import fingerprint

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
INDEX = (RESULTS / "README.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = sorted(path.name for path in RESULTS.glob("*.json"))
# what a trainer writes of its own run has another form
MEASURED = [name for name in FILES if not name.endswith("-training.json")]
LINES = " ".join(INDEX.split())


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
    assert {"seed", "dry_run", "video"} & set(found), "what would be drawn again"  # a film has its own command


def about(name):
    """A file's row of the index."""
    return next(row for row in rows("`make results` writes them again", INDEX) if f"`{name}`" in row[0])


def test_figures_of_casa_tiny_are_of_the_weights_in_the_package():
    shipped = fingerprint(ASSETS / "casa-tiny")
    found = {name: record(name) for name in MEASURED}
    of_it = {name: facts for name, facts in found.items() if "casa-tiny" in (facts.get("model"), facts.get("eval"))}
    assert len(of_it) >= 7
    older = {name for name, facts in of_it.items() if facts.get("weights") != shipped}
    assert older == {name for name in of_it if "earlier weights" in about(name)[2]}


def test_attention_is_as_fast_as_promised():
    took = {(row["shape"], row["impl"]): row["both_ms"] for row in record("attention-cpu.json")["rows"]}
    for shape, least in (("64 x (64 + 16)", 15), ("16 x (256 + 64)", 10), ("ragged 16 x (256 + 4..90)", 8)):
        assert took[shape, "dense mask"] / took[shape, "sdpa"] >= least, shape


def test_the_demo_takes_no_longer_than_promised():
    demo = record("demo-cpu.json")
    assert (demo["demo"], demo["model"]) == ("the shipped film", "casa-tiny")
    assert 0 < demo["seconds"] <= 90


def test_a_stream_stays_as_it_is():
    found, bounded = record("stream-cpu.json"), record("stream-bounded-cpu.json")
    assert (found["frames"], bounded["frames"]) == (120, 1000)
    for casa in (found["casa"], bounded["casa"]):
        assert casa["latency_ratio"] <= 1.3
        assert len(set(casa["image_bytes"])) == 1
    assert bounded["casa"]["most_cache_bytes"] < 2 * bounded["casa"]["cache_bytes"][0]


def test_live_figures_keep_what_is_promised():
    live, sessions = record("live-cpu.json"), record("sessions-cpu.json")
    assert live["keeps_pace"]
    assert (live["frames"], live["fps"], live["size"]) == (1200, 2.0, 448)
    assert sessions["sustained"] >= 8
    assert (sessions["fps"], sessions["size"]) == (2.0, 224)
    memory, soak = record("memory-cpu.json"), record("soak-cpu.json")
    assert memory["more_bytes"] < 200e6
    assert [film["minutes"] for film in memory["films"]] == [1.0, 60.0]
    assert soak["constant"]
    assert soak["frames"] >= 100_000
    for name in FILES:
        if name.startswith("turns-"):
            first, last = record(name)["casa"]["first_token_ms"]
            assert last <= 1.1 * first
            first, last = record(name)["insertion"]["first_token_ms"]
            assert last > 1.1 * first


def test_the_scores_on_the_page():
    scores = record("casa-tiny.json")["scores"]
    pages = scores["pages"]
    wanted = [
        (pages["digits"], 0.95, pages["digits"] >= 0.95),
        (pages["lines"], 0.85, pages["lines"] >= 0.85),
        (scores["scenes"]["accuracy"], 0.95, scores["scenes"]["accuracy"] >= 0.95),
        (scores["stream"]["wer"], 0.10, scores["stream"]["wer"] <= 0.10),
    ]
    for (_, score, goal), (value, limit, reached) in zip(rows("`casa-tiny` (", INDEX), wanted, strict=True):
        assert score == f"{value:.1%}".replace("%", " %")
        assert goal == f"{limit:.0%}".replace("%", " %")
        assert reached, score


def test_scores_over_three_seeds_on_the_page():
    found = [record(name)["scores"] for name in ("casa-tiny.json", "casa-tiny-seed-7.json", "casa-tiny-seed-8.json")]
    wanted = [
        sum(scores[task][score] for scores in found) / 3
        for task, score in (("pages", "digits"), ("pages", "lines"), ("scenes", "accuracy"), ("stream", "wer"))
    ]
    told = re.search(
        r"[Oo]ver seeds 2026, 7 and 8 together they are ([\d.]+) %, ([\d.]+) %, ([\d.]+) % and ([\d.]+) %", LINES
    )
    assert told is not None
    assert [float(value) for value in told.groups()] == [float(f"{100 * value:.1f}") for value in wanted]


def test_the_tiny_models_in_training_md():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = rows("pictures of at most 168 px", page)
    names = [re.search(r"`([\w-]+)`", cells[0]) for cells in table]
    assert [name and name.group(1) for name in names] == [
        *("tiny-casa", "tiny-cross-attention", "tiny-insertion", "tiny-adapt", "tiny-adapt-cross-attention"),
        "casa-tiny",
    ]
    for name, (_, *cells) in zip(names, table, strict=True):
        assert name is not None
        label = name.group(1)
        found = record("casa-tiny-168.json" if label == "casa-tiny" else f"{label}.json")
        assert (found["seed"], found["limit"], found["largest"]) == (2026, 200, 168)
        pages, scenes, stream = (found["scores"][task] for task in ("pages", "scenes", "stream"))
        shares = [pages["digits"], pages["lines"], scenes["accuracy"], stream["wer"]]
        assert cells[-4:] == [f"{100 * share:.1f} %" for share in shares], label


def test_casa_tiny_was_trained_within_two_hours():
    found = record("casa-tiny-training.json")
    assert set(found["stages"]) == {"text", "tower", "fusion"}
    assert sum(stage["seconds"] for stage in found["stages"].values()) <= found["seconds_of_this_call"] <= 7200


def test_the_times_on_the_page():
    found = {}
    for row in record("attention-cpu.json")["rows"]:
        found.setdefault(row["shape"].replace("x", "×"), {})[row["impl"]] = row["both_ms"]
    for shape, dense, sdpa, times in rows("Attention over windows beside", INDEX):
        measured = found[shape]
        assert float(dense.removesuffix(" ms")) == pytest.approx(measured["dense mask"], rel=0.005)
        assert float(sdpa.removesuffix(" ms")) == pytest.approx(measured["sdpa"], rel=0.005)
        assert float(times) == pytest.approx(measured["dense mask"] / measured["sdpa"], abs=0.06)


def test_the_stream_on_the_page():
    plain, bounded = record("stream-cpu.json"), record("stream-bounded-cpu.json")
    told = rows("Live video at 336 px", INDEX)
    for row, (found, method) in zip(told, ((plain, "casa"), (plain, "insertion"), (bounded, "casa")), strict=True):
        facts = found[method]
        first, last = (round(size / 1024) for size in facts["cache_bytes"])
        assert int(row[1].replace(",", "")) == facts["frames"]
        assert row[2] == f"{facts['first_quarter_ms']:.0f} → {facts['last_quarter_ms']:.0f} ms"
        assert row[4] == f"{first:,} → {last:,} KiB"
        if method == "casa":
            assert row[3] == f"{facts['image_bytes'][0] // 1024} KiB, constant"


def test_the_live_figures_on_the_page():
    live, sessions, soak = record("live-cpu.json"), record("sessions-cpu.json"), record("soak-cpu.json")
    lags = [minute["median_lag_ms"] / 1000 for minute in live["minutes"]]
    taken = next(load for load in sessions["loads"] if load["sessions"] == sessions["sustained"])
    turns = {name: record("turns-256-cpu.json")[name]["first_token_ms"] for name in ("casa", "insertion")}
    figures = {
        "casa bench live": (
            f"{live['frames']:,} frames",
            f"{min(lags):.2f} to {max(lags):.2f} s",
            f"{live['max_lag_ms'] / 1000:.2f} s",
        ),
        "--sessions": (f"{sessions['sustained']} streams take {taken['median_ms']:.0f} ms",),
        "--frames 256": tuple("{:.0f} and {:.0f} ms".format(*turns[name]) for name in ("casa", "insertion")),
        "casa bench soak": (f"{-(-soak['most_cache_bytes_of_all'] // 1024)} KiB",),
        "Host memory": (f"{record('memory-cpu.json')['more_bytes'] / 1e6:.0f} MB more",),
    }
    told = [" ".join(bullet.split()) for bullet in re.findall(r"^- (.*(?:\n  .*)*)", INDEX, re.MULTILINE)]
    for name, values in figures.items():
        (bullet,) = [bullet for bullet in told if name in bullet]
        assert [value for value in values if value not in bullet] == [], name


def test_the_table_in_the_readme():
    """One table, of the figures on the page."""
    stream, scores = record("stream-cpu.json"), record("casa-tiny.json")["scores"]
    took = {
        row["impl"]: row["both_ms"] for row in record("attention-cpu.json")["rows"] if row["shape"] == "64 x (64 + 16)"
    }
    turns = record("turns-512-cpu.json")
    shares = (
        scores["pages"]["digits"],
        scores["pages"]["lines"],
        scores["scenes"]["accuracy"],
        scores["stream"]["wer"],
    )
    methods = ("casa", "insertion")
    wanted = [
        ["{first_quarter_ms:.0f} → {last_quarter_ms:.0f} ms".format(**stream[name]) for name in methods],
        ["{:,.0f} → {:,.0f} KiB".format(*(size / 1024 for size in stream[name]["cache_bytes"])) for name in methods],
        ["{:.0f} and {:.0f} ms".format(*turns[name]["first_token_ms"]) for name in methods],
        [f"{took['sdpa']:.1f} ms", f"{took['dense mask']:.0f} ms"],
        ["{:.1f}, {:.1f}, {:.1f}; {:.1f} %".format(*(100 * share for share in shares)), ""],
    ]
    assert [cells[1:] for cells in rows("in drawings", README)] == wanted
