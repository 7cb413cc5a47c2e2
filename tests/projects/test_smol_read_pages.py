"""Pages as the encoder reads them: kept as words in image tokens, and asked about as the pictures are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from casa.data.made import write_pictures
from casa.testing import tiny_tokenizer
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig, image_processor
from casa.vision.page_reading import TextRun
from casa.vision.page_words import BEFORE, IDS, TAG_IDS
from projects.casa_smol.read import cells_of
from projects.casa_smol.read_pages import (
    OFTEN,
    ReadPage,
    ReadPages,
    load,
    pictures_of,
    read_page,
    renamed,
    write,
)
from projects.casa_smol.tasks import asked


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = tiny_tokenizer("gpt2")
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return found


@pytest.fixture(scope="module")
def eyes(tokenizer) -> PageEncoder:
    """An encoder that takes any mark for a letter."""
    made: Any = {"hidden_size": 8, "stem_sizes": (4, 4), "dilations": (1,), "token_size": (16, 16), "reads": True}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = PageEncoder(PageEncoderConfig(**made)).eval()
        found.middles.bias.data.fill_(0.6)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        found.learn_words(torch.randn(len(tokenizer), 128), tokenizer.backend_tokenizer.to_str(), end)
    found.config.token_parts = ("words", "places")
    return found


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for task in ("line", "page"):
        drawn = asked(task, "train", 3, 3)
        write_pictures(folder / f"{task}-0000.tar", lambda rng, size, drawn=drawn: next(drawn), 3, (3, 0), turns=4)
    return folder


def test_a_page_is_what_the_encoder_reads(eyes, tokenizer, monkeypatch):
    for name in ("SURE_TEXT", "SURE_LETTER"):  # an untrained encoder is never sure
        monkeypatch.setattr(f"casa.vision.page_reading.{name}", 0.0)
    picture = next(iter(asked("line", "train", 1, 1))).picture
    cells = cells_of(picture, eyes)
    processed = image_processor(eyes.config)(picture, return_tensors="pt")
    rows, columns = processed["image_grid_thw"][0, 1:].tolist()
    blocks = processed["pixel_values"].view(rows, columns, 3, 16, 16).permute(2, 0, 3, 1, 4)
    with torch.no_grad():
        whole = eyes(blocks.reshape(1, 3, 16 * rows, 16 * columns))
    torch.testing.assert_close(cells, whole, atol=0.05, rtol=0.05)  # cells are computed in bfloat16
    monkeypatch.setattr("projects.casa_smol.read_pages.cells_of", lambda picture, encoder: cells)
    page = read_page("line", picture, [("What does it say?", "nothing of this kind")], eyes)
    assert page.turns == [("What does it say?", "nothing of this kind", False)]
    told = eyes.part("words", cells)[0]
    assert told.any()
    ids = ReadPages(Path("nowhere"), tokenizer).asked(page, "What?", "no").ids
    assert torch.equal(eyes.codes_of(torch.from_numpy(ids).flatten(0, 1), torch.float32), told)
    tea = TextRun("2 x Tea", np.full(7, 1.0), np.arange(7.0))
    monkeypatch.setattr(eyes, "runs", lambda cells: [[tea, replace(tea, text="3 x Tea", rows=np.full(7, 5.0))]])
    ids = ReadPages(Path("nowhere"), tokenizer).asked(replace(page, runs=eyes.runs(cells)[0]), "What?", "no").ids
    told = eyes.part("words", cells)[0]
    assert (ids[..., TAG_IDS + BEFORE] >= 0).sum() == 4, "numbers and things are texts of their own"
    assert torch.equal(eyes.codes_of(torch.from_numpy(ids).flatten(0, 1), torch.float32), told)


def test_tars_are_read_once(eyes, tars, tmp_path):
    assert [file.name for file in write(tars, eyes, tmp_path)] == ["line-0000.jsonl", "page-0000.jsonl"]
    assert list(write(tars, eyes, tmp_path)) == []
    (tmp_path / "page-0000.jsonl").unlink()
    assert [file.name for file in write(tars, eyes, tmp_path)] == ["page-0000.jsonl"]
    kept = list(load(tmp_path / "page-0000.jsonl"))
    pictures = list(pictures_of(tars / "page-0000.tar"))
    assert [[turn[:2] for turn in page.turns] for page in kept] == [turns for _, turns in pictures]
    again = read_page("page", *pictures[0], eyes)
    assert (kept[0].task, kept[0].cells, kept[0].turns) == (again.task, again.cells, again.turns)
    assert [run.text for run in kept[0].runs] == [run.text for run in again.runs]
    assert all(
        np.allclose(one.columns, two.columns, atol=0.01) for one, two in zip(kept[0].runs, again.runs, strict=True)
    )


def test_questions_go_in_whose_answers_were_read_or_come_often(tokenizer, tmp_path):
    def page(number):
        turns = [("Read it.", "some word", number == 0), ("Is it on?", "Yes", False)]
        return {"task": "line", "cells": [4, 32], "turns": turns,
                "runs": [{"text": "some word", "rows": [3.0] * 9, "columns": list(range(0, 27, 3))}]}  # fmt: skip

    def kept(pages):
        (tmp_path / "line-0000.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pages))
        return ReadPages(tmp_path, tokenizer)

    pages = kept([page(number) for number in range(OFTEN)])
    asked_for = [[answer for _, answer in turns] for _, turns in pages.turns]
    assert asked_for == [["some word", "Yes"], *[["Yes"]] * (OFTEN - 1)]
    one = pages.sample(np.random.default_rng(0))
    assert one.ids.shape == (2, 8, IDS)
    assert one.answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(one.answer[:-1]) in ("some word", "Yes")
    assert kept([page(number) for number in range(1, OFTEN - 1)]).turns == []


def test_an_answer_that_is_the_only_text_of_its_kind_begins_somewhere(tokenizer):
    runs = [TextRun(text, np.full(len(text), 4.0 * row), np.arange(9.0, 9 + len(text))) for row, text in
            enumerate(("tea", "milk", "tea", "2 x bread"))]  # fmt: skip
    page, pages = ReadPage("page", (16, 32), runs, []), ReadPages(Path("nowhere"), tokenizer)

    def begins(answer):
        return pages.asked(page, "What?", answer).begins

    ids = pages.asked(page, "What?", "milk").ids
    assert tokenizer("milk")["input_ids"][0] in ids.reshape(-1, IDS)[begins("milk"), TAG_IDS + BEFORE :]
    assert begins("bread") >= 0, "a thing is a text of its own"
    assert [begins(answer) for answer in ("tea", "cake", "mil")] == [-1, -1, -1]


def test_names_are_others_on_the_page_and_in_what_is_asked_about_it():
    def run(text, row):
        return TextRun(text, np.linspace(row, row + 1, len(text)), np.arange(5.0, 5 + 2 * len(text), 2))

    runs = [run("PRICE of Cabbage: 4.10", 2), run("cabbage", 8), run("no", 12)]
    page = ReadPage("receipt", (20, 80), runs, [])
    turns = [("What does Cabbage cost? (the price)", "4.10"), ("Read line 2.", "cabbage"), ("Is there tofu?", "no")]
    other, asked = renamed(np.random.default_rng(0), page, turns, {"price", "line"})
    new = other.runs[1].text
    assert new.isalpha()
    assert new.islower()
    assert new != "cabbage"
    assert [one.text for one in other.runs] == [f"PRICE of {new.capitalize()}: 4.10", new, "no"]
    assert asked == [(f"What does {new.capitalize()} cost? (the price)", "4.10"), ("Read line 2.", new), turns[2]]
    for before, after in zip(runs, other.runs, strict=True):
        assert len(after.rows) == len(after.columns) == len(after.text)
        assert (np.diff(after.columns) > 0).all()
        for places in ("rows", "columns"):  # what stood there stays where it was, and the rest where that ends
            one, two = getattr(before, places), getattr(after, places)
            assert two[[0, -1]].tolist() == one[[0, -1]].tolist()
    assert other.runs[0].columns[:9].tolist() == runs[0].columns[:9].tolist()
    assert other.runs[0].columns[-6:].tolist() == runs[0].columns[-6:].tolist()
    again, _ = renamed(np.random.default_rng(0), page, turns, {"price", "line"})
    assert [one.text for one in again.runs] == [one.text for one in other.runs]


def test_a_chat_asks_several_questions_about_one_picture(tokenizer, tmp_path):
    runs = [{"text": "some word", "rows": [3.0] * 9, "columns": list(range(0, 27, 3))}]
    turns = [(question, "some word", True) for question in ("Read it.", "What is it?", "And this?")]
    page = {"task": "line", "cells": [4, 32], "turns": turns, "runs": runs}
    (tmp_path / "line-0000.jsonl").write_text(json.dumps(page) + "\n")
    pages = ReadPages(tmp_path, tokenizer)
    counts = set()
    for seed in range(12):
        chat = pages.chat(np.random.default_rng(seed), most=3)
        counts.add(len(chat.turns))
        assert all(one.ids is chat.ids for one in chat.turns)
        asked = [tokenizer.decode(one.prompt) for one in chat.turns]
        assert len(set(asked)) == len(asked)
        assert [text.startswith("\n") for text in asked] == [number > 0 for number in range(len(asked))]
    assert counts == {1, 2, 3}
