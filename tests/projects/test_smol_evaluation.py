"""Answers judged, and a model asked about held-out pictures with and without them."""

import json
import re
import zlib
from typing import Any

import pytest
import torch
from PIL import Image

import casa
from casa import FusionConfig, adapt
from casa.errors import UserError
from casa.models.auto import processor_for
from casa.testing import tiny_processor, tiny_text_model
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig
from projects.casa_smol import named_drawings, watching
from projects.casa_smol.asking import Answering
from projects.casa_smol.evaluation import Evaluation, main, reading, run
from projects.casa_smol.lite0 import Lite0, SameConv
from projects.casa_smol.metrics import anls, characters, contained, distance, exact, relaxed, scores, verbatim, wilson
from projects.casa_smol.page_lines import asked_for
from projects.casa_smol.table import main as print_table
from projects.casa_smol.tasks import Turn, drawings


def test_distance_counts_characters():
    pairs = (("", "abc"), ("abc", "abc"), ("abd", "abc"), ("kitten", "sitting"))
    assert [distance(*pair) for pair in pairs] == [3, 0, 1, 3]


@pytest.mark.parametrize(
    ("judge", "said", "answers", "score"),
    [
        (verbatim, " Total:  4 ", ["Total: 4"], 1.0),
        (verbatim, "total: 4", ["Total: 4"], 0.0),
        (exact, "berlin.", ["Paris", "Berlin"], 1.0),
        (exact, "Berlin, Germany", ["Berlin"], 0.0),
        (anls, "Berlim", ["Berlin"], 1 - 1 / 6),
        (anls, "Rome", ["Berlin"], 0.0),
        (relaxed, "104", ["100"], 1.0),
        (relaxed, "$1,049.0", ["1000"], 1.0),
        (relaxed, "106", ["100"], 0.0),
        (relaxed, "12%", ["12.1"], 1.0),
        (relaxed, "yes", ["Yes"], 1.0),
        (relaxed, "0", ["0"], 1.0),
    ],
)
def test_answers_are_judged(judge, said, answers, score):
    assert judge(said, answers) == pytest.approx(score)


def test_characters_are_those_of_the_nearest_answer():
    assert characters("4.20", ["$4.20", "4.20 $", "4.2"]) == (1, 5)


def test_a_shares_interval_is_wilsons():
    # 8 of 10, by the formula of Wilson (1927) worked out by hand
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 20)[1] == 1.0
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_an_answer_in_a_sentence_is_contained_and_a_part_of_a_word_is_not():
    assert contained("The total is 4.20.", ["4.20"]) == 1.0
    assert contained("It says Tea and milk", ["tea AND milk."]) == 1.0
    assert contained("At 12:30, on 18/08/1994", ["12:30"]) == contained("-4.", ["-4"]) == 1.0
    for said, answer in (("14.20", "4.20"), ("It costs 4.20", "4"), ("4.20", "20"), ("12:30", "30"), ("-4", "4"),
                         ("18/08/1994", "1994"), ("teapot", "tea"), ("", "tea"), ("hm!", "")):  # fmt: skip
        assert contained(said, [answer]) == 0.0
    assert scores("chart", [("104", ["100"])])["contained"] == 1.0, "as near as is right for charts"


def knows(questions, way):
    return [turn.answer if way == "seen" else "nothing" for _, turn in questions]


def test_each_way_is_scored_by_the_tasks_own_measure():
    asked = Evaluation(4, 1, knows, ways=("seen", "blind"))
    line, chart = asked.of("line"), asked.of("chart")
    right = {"verbatim": 1.0, "verbatim_interval": [0.5101, 1.0], "anls": 1.0, "questions": 4}
    right |= {"contained": 1.0, "contained_interval": [0.5101, 1.0]}
    assert line["seen"] == right | {"character_error_rate": 0.0, "character_error_rate_interval": [0.0, 0.0]}
    assert line["blind"]["verbatim"] == 0.0
    assert chart["seen"]["relaxed"] == 1.0
    assert chart["seen"]["questions"] == 4


def test_of_pages_lines_are_asked_for_and_readers_stand_beside():
    asked = Evaluation(6, 1, readers={"blank": lambda picture, task: [], "one": lambda picture, task: ["a", "b"]})
    questions = asked.questions("page")
    assert len(questions) == 6
    assert all(asked_for(turn.question) for _, turn in questions)
    assert asked.of("page")["blank"]["character_error_rate"] == 1.0
    assert asked.of("chart") == {}


def test_of_documents_it_is_told_whether_an_answer_was_read():
    picture, pages = Image.new("RGB", (9, 9)), []
    turns = [Turn("What is the total?", ("4.20",)), Turn("How many rows?", ("4",)), Turn("Who sent it?", ("Anna",))]

    def read(picture, task):
        pages.append(task)
        return ["Total 4.20", "Ana"]

    found = reading("receipt", read, [(picture, turn) for turn in turns])
    assert (found["was_read"], found["questions"]) == (0.5, 2)
    assert pages == ["receipt"]


def test_films_are_scored_by_their_words():
    shown = list(watching.films(1, 2))
    perfect = {id(one.frames): list(one.said) for one in shown}
    found = watching.scores(shown, lambda frames: perfect[id(frames)])
    assert (found["word_error_rate"], found["silent"], found["films"]) == (0.0, 1.0, 2)
    babbles = watching.scores(shown, lambda frames: ["x"] * len(frames))
    assert babbles["word_error_rate"] > 0.9
    assert babbles["silent"] == 0.0
    nothing = watching.scores(shown, lambda frames: [""] * len(frames))
    assert (nothing["word_error_rate"], nothing["silent"]) == (1.0, 1.0)


def test_a_reader_says_what_it_did_not_read_before():
    frames = [Image.new("L", (2, 2), shade) for shade in (0, 0, 50, 90)]
    texts = {0: ["one line"], 50: ["one 1ine", "another"], 90: ["new page"]}
    read = []

    def lines(picture, task):
        read.append(picture.getpixel((0, 0)))
        return texts[read[-1]]

    assert watching.reading_anew(lines)(frames) == ["one line", "", "another", "new page"]
    assert read == [0, 50, 90]


def test_the_padding_is_tensorflows():
    conv = SameConv(1, 1, 3, 2)
    torch.nn.init.ones_(conv.weight)
    row = torch.arange(36.0).reshape(1, 1, 6, 6)
    padded = torch.nn.functional.pad(row, (0, 1, 0, 1))
    assert torch.equal(conv(row), torch.nn.functional.conv2d(padded, conv.weight, stride=2))
    assert conv(row[..., :5, :5]).shape[-2:] == (3, 3)
    sized = [block(torch.zeros(1, 32, 8, 8)).shape for block in Lite0()._blocks[:1]]
    assert sized == [(1, 16, 8, 8)]


class Sheet:
    """A browser that draws each drawing in its own shade."""

    def draw(self, documents):
        shades = [zlib.crc32(re.findall(r"base64,([^\"]+)", one.body)[0].encode()) % 256 for one in documents]
        return [Image.new("RGB", (4, 4), (shade,) * 3) for shade in shades]


def test_drawings_stand_beside_their_nearest(monkeypatch):
    sheet: Any = Sheet()
    names = ("hat", "dog", "cup")
    bodies = {style: {name: f"{style} {name}" for name in names} for style in drawings.STYLES}
    monkeypatch.setattr(named_drawings, "styles", lambda: bodies)
    monkeypatch.setattr(named_drawings, "is_held_out", lambda name: name == "cup")
    monkeypatch.setattr(named_drawings, "worn", lambda picture, rng, strength: picture)
    asked = list(named_drawings.named("drawing_new_name", 1, 5, sheet))
    assert {turn.answer for _, turn in asked} == {"cup"}
    asked = list(named_drawings.named("drawing_seen_style", 1, 20, sheet))
    assert {turn.answer for _, turn in asked} == {"hat", "dog"}

    def features(pictures):
        return torch.nn.functional.one_hot(torch.tensor([one.getpixel((0, 0))[0] for one in pictures]), 256).float()

    nearest = named_drawings.Nearest(sheet, features)
    said = nearest([picture for picture, _ in asked])
    assert said == [turn.answer for _, turn in asked]
    with pytest.raises(UserError, match="EfficientNet-Lite0 is not here"):
        named_drawings.Nearest(sheet)


def test_a_run_goes_on_with_the_next_task(tmp_path, capsys):
    out, asked = tmp_path / "a.json", []

    def of(task):
        asked.append(task)
        if task == "page" and len(asked) == 2:
            raise KeyboardInterrupt
        return {"seen": {"exact": 1.0, "questions": 1}}

    with pytest.raises(KeyboardInterrupt):
        run(["line", "page"], of, {"seed": 1}, out)
    assert set(run(["line", "page"], of, {"seed": 1}, out)) == {"line", "page"}
    assert asked == ["line", "page", "page"]
    run(["line"], of, {"seed": 2}, out)
    assert asked[3:] == ["line"]
    assert "line (0 s): seen exact 1.0" in capsys.readouterr().out


def test_the_table_pools_tasks_and_says_what_is_met(tmp_path, capsys):
    def found(share, count, name="exact"):
        return {name: share, f"{name}_interval": [0.1, 0.9], "anls": share, "questions": count}

    scores = {
        "receipt": {"seen": found(0.9, 100), "blind": found(0.1, 100), "ppocr": found(0.8, 40, "was_read")},
        "table": {"seen": found(0.8, 300), "blind": found(0.0, 300), "ppocr": found(0.9, 40, "was_read")},
        "line": {
            "seen": found(0.9, 10, "verbatim") | {"character_error_rate": 0.02},
            "told": found(0.1, 10, "verbatim") | found(0.7, 10, "contained"),
        },
        "drawing_new_style": {"seen": found(0.5, 10), "nearest": found(0.5, 10)},
        "film": {"seen": {"word_error_rate": 0.2, "silent": 1.0, "films": 3}},
        "text_only": {"seen": {"same_logits": 3, "prompts": 3}},
    }
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"scores": scores}))
    assert print_table([str(path)]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {(row[0], row[1]): row[2:] for row in rows if len(row) == 10}
    low, high = wilson(0.825, 400)
    assert rows["documents", "exact"] == [
        "≥ 85.0 %", f"82.5 % ({100 * low:.1f}–{100 * high:.1f})", "2.5 % (1.4–4.5)", "", "", "≤ 85.0 %", "", "400",
    ]  # fmt: skip
    assert rows["a printed line", "character error rate"][1] == "**2.0 %**"
    assert rows["a printed line", "lines right"][1].startswith("**90.0 %")
    assert rows["a printed line", "lines right"][3] == "70.0 % (10.0–90.0)", "the answer is in what was said"
    assert rows["drawings, a style never seen", "exact"][:2] == [
        "above 50.0 %, the nearest neighbour",
        "50.0 % (10.0–90.0)",
    ]
    assert rows["text appearing in a film", "word error rate"][1] == "20.0 %"
    assert rows["text only", "logits of the text model, to the bit"][1] == "**100.0 %**"
    assert ("charts", "relaxed accuracy") not in rows
    assert print_table([]) == 2


@pytest.fixture
def model(tmp_path):
    small = {"stem_sizes": (4, 4), "hidden_size": 8, "dilations": (1,)}
    encoder = PageEncoder(PageEncoderConfig(**small))
    text = tiny_text_model()
    text.save_pretrained(tmp_path / "text")
    adapt(text, FusionConfig(), vision=encoder.double()).save_pretrained(tmp_path / "m")
    processor_for(tiny_processor().tokenizer, encoder.config).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.slow
def test_a_model_is_asked(model, tmp_path, capsys):
    command = [
        str(model),
        "--tasks",
        "line",
        "film",
        "text_only",
        "--count",
        "2",
        "--films",
        "1",
        "--readers",
        "encoder",
    ]
    command += ["--text", str(tmp_path / "text"), "--out", str(tmp_path / "a.json"), "--table"]
    assert main(command) == 0
    told = json.loads((tmp_path / "a.json").read_text())
    assert set(told["scores"]["line"]) == {"seen", "blind", "told", "encoder"}
    assert told["scores"]["film"]["seen"]["films"] == 1
    assert told["scores"]["text_only"]["seen"] == {"same_logits": 3, "prompts": 3}
    assert not (tmp_path / "a.part.json").exists()
    assert "| text only |" in capsys.readouterr().out


@pytest.mark.slow
def test_batches_and_kept_pictures_change_no_answer(model):
    questions = Evaluation(5, 1).questions("page")
    alone = Answering(casa.load(str(model), image_cache="off"), most_tokens=6, batch=1)
    together = Answering(casa.load(str(model)), most_tokens=6, batch=4)
    for way in ("seen", "told"):
        assert together(questions, way) == alone(questions, way)


def test_what_cannot_be_is_said_in_a_sentence(tmp_path, capsys):
    assert main(["--tasks", "easy_vqa", "--readers"]) == 0
    assert "easy_vqa is left out" in capsys.readouterr().out
    assert main(["--tasks", "line", "--out", str(tmp_path / "none" / "a.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
