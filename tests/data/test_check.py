"""The look at a whole set: what is counted, and what is drawn."""

import json

import pytest
from PIL import Image

from casa.data import Message, Origin, Picture, Record, Text, parse_data_settings
from casa.data.check import check_data, image_tokens
from casa.data.sheet import draw_sheet
from casa.data.windows_of import Window, windows_of
from casa.errors import UserError

ROWS = [
    {"image": "a.png", "caption": "A cat."},
    {"image": "missing.png", "caption": "A cat."},
    {"image": ["b.png", "c.png"], "conversations": [
        {"from": "human", "value": "<image>Which? <image>"}, {"from": "gpt", "value": "שלום 🚀 " + "long " * 200}]},
    {"image": "cut.jpg", "caption": "A cat."},
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
]  # fmt: skip


@pytest.fixture
def settings(root, written):
    Image.effect_noise((300, 300), 80).save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:3000])
    Image.new("RGB", (952, 504)).save(root / "a.png")
    return parse_data_settings({"sources": [{"path": str(written(root / "rows.jsonl", ROWS))}]})


def test_everything_is_counted(settings):
    found = check_data(settings, count_text=lambda text: len(text.split()))
    assert (found.records, found.report.total, found.complete) == (3, 2, True)
    assert found.report.counts == {"missing-picture": 1, "unreadable-picture": 1}
    assert [origin.line for origin, _ in found.report.first] == [2, 4]
    statistics = found.statistics()
    assert statistics["image_tokens"]["total"] == 34 * 18 + 1 + 1
    assert statistics["pictures"] == {"least": 0, "median": 1.0, "mean": 1.0, "p95": 1.9, "most": 2, "total": 3}
    assert statistics["width"]["most"] == 952
    assert statistics["text_tokens"]["least"] == 2
    assert statistics["answer"]["least"] == len("So.")
    assert json.loads(json.dumps(found.to_dict()))["first_bad"][0]["reason"] == "missing-picture"


def test_a_limit_is_kept_and_told(settings, root):
    told = []
    found = check_data(settings, limit=2, progress=told.append)
    assert (found.records, found.report.total, found.complete) == (1, 1, False)
    assert told == [1, 2]
    assert check_data(settings, limit=5).complete
    # a run of bad rows is no way around it
    with (root / "rows.jsonl").open("a") as file:
        file.write("oops\n" * 50)
    found = check_data(settings, limit=7)
    assert (found.records, found.report.total, found.complete) == (3, 4, False)


def test_samples_are_spread_over_the_set(root, written):
    rows = [
        {"messages": [{"role": "user", "content": str(k)}, {"role": "assistant", "content": "."}]} for k in range(200)
    ]
    settings = parse_data_settings({"sources": [{"path": str(written(root / "rows.jsonl", rows))}]})
    lines = [sample.record.origin.line for sample in check_data(settings, samples=10).samples]
    assert len(set(lines)) == 10
    assert lines == sorted(lines)
    assert max(lines) > 100


def test_the_papers_pictures_have_the_papers_tokens():
    assert image_tokens(952, 952) == 1156
    assert image_tokens(504, 504) == 324
    assert image_tokens(3, 3) == 1


def test_windows_are_cut_at_runs_of_pictures_and_at_frames():
    a, b, c, d = (Picture(b"x", time) for time in (0.0, 1.0, 2.0, 3.0))
    talk = Record(
        (
            Message("system", (Text("Brief."),)),
            Message("user", (a, b, Text("Which?"))),
            Message("assistant", (Text("One."),)),
            Message("user", (Text("And"), c)),
            Message("assistant", (d, Text("two"))),
        ),
        Origin("x", 1),
    )
    assert windows_of(talk) == [
        Window([], [("system", "Brief.")]),
        Window([0, 1], [("user", "Which?"), ("assistant", "One."), ("user", "And")]),
        Window([2], []),
        Window([3], [("assistant", "two")]),
    ]
    live = Record((Message("user", (Text("Go."),)), Message("assistant", (a, b, Text("one"), c))), Origin("x", 1))
    assert [window.pictures for window in windows_of(live)] == [[], [0], [1], [2]]


def test_an_answer_that_is_not_learned_is_not_counted_and_is_marked(root, written):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "four", "weight": 0}]
    turns += [{"role": "user", "content": "b"}, {"role": "assistant", "content": "three"}]
    settings = parse_data_settings({"sources": [{"path": str(written(root / "x.jsonl", [{"messages": turns}]))}]})
    found = check_data(settings)
    assert found.statistics()["answer"]["total"] == len("three")
    said = windows_of(found.samples[0].record)[0].said
    assert [who for who, _ in said] == ["user", "assistant, not learned", "user", "assistant"]


def test_a_sheet_shows_the_pictures_beside_their_text(settings, tmp_path):
    found = check_data(settings)
    draw_sheet(found.samples, tmp_path / "sheet.png", "rows.jsonl", "3 good records")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24)}
    # the pictures of b and c, the bar of a window, and the ground of what is learned
    assert {(0, 128, 0), (0, 0, 255), (0, 114, 178), (228, 243, 234)} <= colours


@pytest.mark.parametrize("text", ["", " ", "x" * 5000, "one\n\n\ntwo", "\x00\x07", "مرحبا", "🚀" * 300])
def test_any_text_can_be_drawn(tmp_path, text):
    frames = tuple(Picture(b"x", k / 2) for k in range(60))
    parts = tuple(part for frame in frames for part in (frame, Text(text)))
    record = Record((Message("user", (Text(text),)), Message("assistant", parts)), Origin("long/" * 50 + "x" * 90, 1))
    from casa.data.check import Sample

    thumbnails = [Image.new("RGB", (w, h)) for w, h in ((1, 200), (200, 1), (30, 30))]
    draw_sheet([Sample(record, thumbnails, 9)], tmp_path / "sheet.png", "t" * 500, "n" * 500)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 600


def test_a_sheet_that_cannot_be_written_is_named(settings, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        draw_sheet([], tmp_path / "no folder" / "sheet.png")
