"""`casa inspect` from the command line."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from casa.media import VideoWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("media")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 112, 3), dtype=np.uint8)).save(made / "page.png")
    with VideoWriter(made / "clip.mp4", (84, 56), fps=10) as writer:
        for level in range(40):
            writer.write(np.full((56, 84, 3), 6 * level, dtype=np.uint8))
    return made


def test_a_picture_becomes_a_page(casa, checkpoint, folder, tmp_path):
    page = tmp_path / "report.html"
    result = casa("inspect", checkpoint, folder / "page.png", "what?", "--out", page, "--max-new-tokens", 4)
    assert (result.status, result.err) == (0, "")
    asked = casa("ask", checkpoint, folder / "page.png", "what?", "--max-new-tokens", 4)
    assert result.out.splitlines() == [*asked.out.splitlines(), f"{page}: where each of its tokens looked."]
    assert page.read_text().startswith("<!doctype html>")


def test_a_film_becomes_a_page_of_some_of_its_frames(casa, checkpoint, folder, tmp_path):
    page = tmp_path / "report.html"
    options = ("--fps", 2, "--max-frames", 3, "--max-new-tokens", 2, "--answer", "no")
    assert casa("inspect", checkpoint, folder / "clip.mp4", "what?", "--out", page, *options).status == 0
    assert re.findall(r'"label":"([^"]*)"', page.read_text()) == ["0.0 s", "1.0 s", "2.0 s"]


def test_a_wrong_ending_is_told_before_a_model_is_read(casa, folder, tmp_path):
    result = casa("inspect", "no-such-model", folder / "page.png", "what?", "--out", tmp_path / "report.png")
    assert result.status == 2
    assert result.err.startswith("casa: ")
    assert "ends in .html" in result.err


def test_a_set_becomes_tables_and_plots(casa, checkpoint, folder, tmp_path):
    rows = [
        {"image": "page.png", "question": "what?", "answers": ["no", "yes"]},
        {"image": "page.png", "question": "and?", "answer": "so", "needs_picture": False},
        {"image": "gone.png", "question": "where?", "answer": "here"},
        {"question": "none?", "answer": "none"},
    ]
    data = tmp_path / "qa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "set"
    result = casa("inspect", checkpoint, "--data", data, "--root", folder, "--out", out)
    assert result.status == 0
    assert [line.rpartition("qa.jsonl:")[2][:2] for line in result.err.splitlines()] == ["3:", "4:"]
    assert "2 questions" in result.out
    assert "without-layers=2" in result.out
    told = json.loads((out / "statistics.json").read_text())
    assert (told["questions"], told["left_out"], told["tokens"]) == (2, 2, 6)
    assert "commit" in told
    assert {path.suffix for path in out.iterdir()} == {".json", ".csv", ".png"}


def test_pictures_beside_a_set_are_refused(casa, checkpoint, folder):
    result = casa("inspect", checkpoint, folder / "page.png", "what?", "--data", "qa.jsonl")
    assert (result.status, "--data has pictures" in result.err) == (2, True)
    assert casa("inspect", checkpoint).status == 2
