"""Pages as the encoder reads them: kept as words in image tokens, and asked about as the pictures are."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from casa.data.made import write_pictures
from casa.testing import tiny_tokenizer
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig, image_processor
from casa.vision.page_words import BEFORE, NOTHING, SLOTS, TAGS
from projects.casa_smol.read import cells_of
from projects.casa_smol.read_pages import OFTEN, ReadPage, ReadPages, find_words, pictures_of, read_page, write
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
        found.learn_words(torch.randn(len(tokenizer), 128), tokenizer.backend_tokenizer.to_str())
    found.config.token_parts = ("words", "places")
    return found


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for task in ("line", "page"):
        drawn = asked(task, "train", 3, 3)
        write_pictures(folder / f"{task}-0000.tar", lambda rng, size, drawn=drawn: next(drawn), 3, (3, 0), turns=4)
    return folder


def test_a_page_holds_what_the_encoders_tokens_tell(eyes, monkeypatch):
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
    told = eyes.part("words", cells)[0]
    assert told.any()
    assert torch.equal(eyes.codes_of(torch.from_numpy(page.grid()).flatten(0, 1), torch.float32), told)
    assert page.turns == [("What does it say?", "nothing of this kind", False)]


def test_words_are_found_behind_those_before_them():
    ids = np.full((2, 3, sum(SLOTS)), NOTHING)
    told = ids.reshape(6, -1)[:, sum(TAGS) :]
    told[1] = [NOTHING, 9, 5, 6, NOTHING]
    told[2] = [5, 6, 7, NOTHING, NOTHING]
    told[4] = [NOTHING, 9, 4, NOTHING, NOTHING]
    told[5] = [9, 4, 6, NOTHING, NOTHING]
    assert find_words(ids, [NOTHING, 9, 5, 6, 7]) == [(1, 0), (1, 1), (2, 0)]
    assert find_words(ids, [NOTHING, 9, 4, 6]) == [(4, 0), (5, 0)]
    assert find_words(ids, [NOTHING, 9, 4, 6, 8]) == [(-1, -1)] * 3
    assert find_words(ids, [NOTHING, 9, 3, 6]) == [(-1, -1)] * 2
    told[0] = [NOTHING, 9, 5, 4, NOTHING]  # another text begins so
    assert find_words(ids, [NOTHING, 9, 5, 6, 7]) == [(1, 0), (1, 1), (2, 0)]
    told[0] = [NOTHING, 9, 5, 6, 7]  # and says the same
    assert find_words(ids, [NOTHING, 9, 5, 6, 7]) == [(-1, -1)] * 3


def test_tars_are_read_once(eyes, tars, tokenizer, tmp_path):
    assert [file.name for file in write(tars, eyes, tmp_path)] == ["line-0000.pt", "page-0000.pt"]
    assert list(write(tars, eyes, tmp_path)) == []
    (tmp_path / "page-0000.pt").unlink()
    assert [file.name for file in write(tars, eyes, tmp_path)] == ["page-0000.pt"]
    kept = torch.load(tmp_path / "page-0000.pt", weights_only=True)
    pictures = list(pictures_of(tars / "page-0000.tar"))
    assert [[turn[:2] for turn in page["turns"]] for page in kept] == [turns for _, turns in pictures]
    assert isinstance(pictures[0][0], Image.Image)


def test_questions_go_in_whose_answers_were_read_or_come_often(tokenizer, tmp_path):
    ids = np.full((1, sum(SLOTS)), NOTHING, dtype=np.int32)
    ids[0, sum(TAGS) + BEFORE] = 5

    def page(number):
        turns = [("Read it.", f"word {number}", number == 0), ("Is it on?", "Yes", False)]
        one = ReadPage("line", 2, 3, np.array([4], dtype=np.int32), ids, turns)
        return {**vars(one), "places": torch.from_numpy(one.places), "ids": torch.from_numpy(one.ids)}

    torch.save([page(number) for number in range(OFTEN)], tmp_path / "line-0000.pt")
    pages = ReadPages(tmp_path, tokenizer)
    asked_for = [[answer for _, answer in turns] for _, turns in pages.turns]
    assert asked_for == [["word 0", "Yes"], *[["Yes"]] * (OFTEN - 1)]
    one = pages.sample(np.random.default_rng(0))
    assert one.ids.shape == (2, 3, sum(SLOTS))
    assert (one.ids[1, 1] == ids[0]).all()
    assert (one.ids[0] == NOTHING).all()
    assert one.answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    (tmp_path / "line-0000.pt").unlink()
    torch.save([page(number) for number in range(1, OFTEN - 1)], tmp_path / "line-0000.pt")
    assert ReadPages(tmp_path, tokenizer).turns == []
