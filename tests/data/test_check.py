"""The look at a whole set: what is counted, and what is shown."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from casa.data import Message, Origin, Picture, Record, Text, parse_data_settings
from casa.data.check import SampledRecord, check_data, image_tokens
from casa.data.html_report import BudgetBar, SampleCard, ShownPicture, ShownText, ShownWindow, write_report
from casa.data.sheet import record_windows, write_sheet
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
    assert record_windows(talk) == [
        ([], [("system", "Brief.")]),
        ([0, 1], [("user", "Which?"), ("assistant", "One."), ("user", "And")]),
        ([2], []),
        ([3], [("assistant", "two")]),
    ]
    live = Record((Message("user", (Text("Go."),)), Message("assistant", (a, b, Text("one"), c))), Origin("x", 1))
    assert [pictures for pictures, _ in record_windows(live)] == [[], [0], [1], [2]]


def test_an_answer_that_is_not_learned_is_not_counted_and_is_marked(root, written):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "four", "weight": 0}]
    turns += [{"role": "user", "content": "b"}, {"role": "assistant", "content": "three"}]
    settings = parse_data_settings({"sources": [{"path": str(written(root / "x.jsonl", [{"messages": turns}]))}]})
    found = check_data(settings)
    assert found.statistics()["answer"]["total"] == len("three")
    ((_, said),) = record_windows(found.samples[0].record)
    assert [who for who, _ in said] == ["user", "assistant, not learned", "user", "assistant"]


class Page(HTMLParser):
    """What a page shows: its texts, pictures and every address that it names."""

    def __init__(self, path):
        super().__init__()
        self.text, self.pictures, self.addresses, self.classes = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.classes += (given.get("class") or "").split()
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "img":
            data = base64.b64decode(given["src"].removeprefix("data:image/jpeg;base64,"))
            self.pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))

    def handle_data(self, data):
        self.text += [data.strip()] if data.strip() else []


def test_a_sheet_shows_the_pictures_beside_their_text(settings, tmp_path):
    found = check_data(settings)
    write_sheet(found.samples, tmp_path / "sheet.html", "rows.jsonl", "3 good records")
    page = Page(tmp_path / "sheet.html")
    assert {"rows.jsonl", "3 good records", "Describe the picture.", "A cat.", "user", "assistant"} <= set(page.text)
    assert [picture.size for picture in page.pictures] == [(320, 170), (8, 6), (8, 6)]
    green, blue = (picture.getpixel((4, 3)) for picture in page.pictures[1:])
    assert max(green) == green[1]
    assert max(blue) == blue[2]
    # a card for each; three windows with pictures and one without; what is learned is marked
    assert page.source.count("<article") == 3
    assert page.source.count('<section class="window') == 4
    assert page.classes.count("learned") == 3
    assert page.classes.count("blind") - 1 == 1  # one is the legend's
    # nothing is loaded
    assert all(address.startswith("data:") for address in page.addresses)
    assert "default-src 'none'" in page.source
    assert "http://" not in page.source
    assert "https://" not in page.source


@pytest.mark.parametrize(
    "text", ["", " ", "x" * 5000, "one\n\n\ntwo", "\x00\x07", "مرحبا", "🚀" * 300, "</p><script>alert(1)</script>"]
)
def test_any_text_can_be_shown(tmp_path, text):
    frames = tuple(Picture(b"x", k / 2) for k in range(60))
    parts = tuple(part for frame in frames for part in (frame, Text(text)))
    origin = Origin("long/" * 50 + "x\udcff" * 90, 1)
    record = Record((Message("user", (Text(text),)), Message("assistant", parts)), origin)
    thumbnails = [Image.new("RGB", (w, h)) for w, h in ((1, 200), (200, 1), (30, 30))]
    write_sheet([SampledRecord(record, thumbnails, 9)], tmp_path / "sheet.html", "t" * 500, "n" * 500)
    page = Page(tmp_path / "sheet.html")
    assert len(page.pictures) == 3
    assert "and 49 windows more" in page.text
    assert "<script" not in page.source
    assert not set("\x00\x07") & set(page.source)
    if len(text.strip()) in range(3, 100):
        assert text.strip() in page.text


def test_a_pack_is_bars_and_strips_of_tokens(tmp_path):
    picture = ShownPicture(Image.new("RGB", (30, 20)), "648", tokens=648)
    texts = [ShownText("What?", tokens=12), ShownText("A cat.", learned=True, tokens=4)]
    cards = [SampleCard("a.jsonl:1", "1 window", [ShownWindow([picture], texts)])] * 2
    bars = [BudgetBar("text", (16, 16), 64), BudgetBar("image", (648, 0), 1296)]
    write_report(tmp_path / "pack.html", cards, title="a pack", bars=bars)
    page = Page(tmp_path / "pack.html")
    assert re.findall(r"width:([0-9.]+)%", page.source) == ["25.0", "25.0", "50.0"]
    assert {"32 of 64 tokens (50 %)", "648 of 1,296 tokens (50 %)"} <= set(page.text)
    assert re.findall(r"<i(.*?) style=\"--wide:(\d+)\"", page.source) == [("", "12"), (' class="learned"', "4")] * 2


def test_a_report_that_cannot_be_written_is_named(settings, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_sheet([], tmp_path / "no folder" / "sheet.html")
    with pytest.raises(UserError, match=r"ends in \.html"):
        write_sheet([], tmp_path / "sheet.png")
