"""What is written, in a text model's tokens: where each begins, what stands before it, and that it is learned."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from casa.testing import tiny_tokenizer
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig
from projects.casa_smol.canvas import CLASS_OF, Canvas
from projects.casa_smol.encoder import Run, Settings, stacked, train
from projects.casa_smol.fonts import kins
from projects.casa_smol.spelling import NOTHING, OWN, UNKNOWN, Speller, encoder_of, spelling_of
from projects.casa_smol.targets import FOLLOWING, page, targets_of
from projects.casa_smol.targets import UNKNOWN as UNSEEN

WIDE = (16, 16)
BREAK = 99


def words(text):
    """A text as whole words, each with the blank before it, as byte-level tokenizers have them: ids are lengths."""
    if text == "\n":
        return [(BREAK, (0, 1))]
    found, start = [], 0
    for word in text.split(" "):
        stop = start + len(word)
        found.append((len(word), (max(0, start - 1), stop)))
        start = stop + 1
    return found


def written(text, x=4, size=16, width=160):
    canvas = Canvas((width, 32), (255, 255, 255))
    canvas.text(x, 24, text, kins("train")[0][0], size, (0, 0, 0))
    return canvas


def test_tokens_stand_where_their_first_letter_does():
    glyphs = written("seven is a number").found()
    found = spelling_of(glyphs, (160, 32), WIDE, words)
    assert found.ids.shape == (2, 10, 1 + OWN)
    spots = np.argwhere(found.counts > 0)
    assert [row for row, _ in spots] == [1] * len(spots)
    said = [number for spot in spots for number in found.ids[tuple(spot)][1:] if number >= 0]
    assert said == [5, 2, 1, 6, BREAK]
    assert found.counts.sum() == 5
    # "seven" begins at 4 px, a text; before the second one stands the first; the break stands at the last letter
    assert found.ids[1, 0].tolist() == [BREAK, 5, NOTHING, NOTHING]
    before = [found.ids[tuple(spot)][0] for spot in spots]
    assert before[:2] == [BREAK, 5]
    assert (found.ids[0] == NOTHING).all()


def test_what_is_cut_off_is_no_token():
    found = spelling_of(written("seven is", x=100).found(), (128, 32), WIDE, words)
    assert (found.ids < 0).all()
    glyphs = written("seven is one", x=-20).found()
    found = spelling_of(glyphs, (160, 32), WIDE, words)
    # "is" and "one", each as the one before too, and the end; before "is" stands what is cut off
    assert sorted(found.ids[found.ids >= 0].tolist()) == [2, 2, 3, 3, BREAK]
    assert (found.ids == UNKNOWN).sum() == 1
    assert spelling_of(written("").found(), (160, 32), WIDE, words).counts.sum() == 0


def test_more_than_a_block_holds_are_left_out():
    found = spelling_of(written("1 1 1 1 1 1", size=10).found(), (160, 32), (32, 160), words)
    assert found.counts.tolist() == [[OWN]]


def test_characters_know_their_neighbours():
    canvas = written("ab cd")
    canvas.text(100, 24, "e", kins("train")[0][0], 16, (0, 0, 0))
    found = targets_of(canvas.found(), np.asarray(canvas.ground))
    around = [found.around[:, row, column] for row, column, _, _ in found.centres]
    names = [[CLASS_OF[c] for c in "ab cd"][n] if 0 <= n < 5 else 0 for n in range(-1, 12)]
    for place in range(5):
        assert around[place].tolist() == [names[place], *names[place + 2 : place + 2 + FOLLOWING]]
    assert around[5].tolist() == [0] * (1 + FOLLOWING)
    assert (found.around[:, found.classes == 0] == UNSEEN).all()


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file({"model.embed_tokens.weight": torch.randn(len(tokenizer), 12)}, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_a_run_in_bfloat16_is_scored(text_model, tmp_path):
    settings = Settings(text=str(text_model), shapes=((1, 64, 64),), hidden_size=8, stem_sizes=(4, 4), dilations=(1,))
    settings = replace(settings, written_size=16, others=9, keep_every=2, score_every=2, score_pages=2, steps=2)
    assert 0 <= train(tmp_path, settings, workers=0).log[-1]["held_out"]["own"] <= 1


@pytest.mark.slow
def test_a_code_learns_to_spell(text_model, tmp_path):
    settings = Settings(
        text=str(text_model), shapes=((1, 64, 64),), hidden_size=16, stem_sizes=(8, 8), dilations=(1, 2),
        written_size=24, rate=1e-2, bf16=False, ema=0.8, others=50, keep_every=3, score_pages=2, steps=6,
    )  # fmt: skip
    run = Run.start(settings)
    batch = stacked([page((1, 1), (96, 96), "train", 0.0)], settings) | {"others": torch.arange(9) * 12345678}
    losses = [run.learn(batch) for _ in range(160)]
    assert losses[-1]["spelled"] < 0.3 * losses[0]["spelled"]
    assert losses[-1]["around"] < losses[0]["around"]
    learner = run.learner.eval()
    assert learner.speller is not None
    ids = batch["spelled"].flatten(1, 2)[0]
    hits = learner.speller.right(learner(batch["pictures"])["written"][0], ids)
    assert hits[ids >= 0].float().mean() > 0.25  # chance: one of 340
    # broken off, it goes on; its log has what is spelled rightly
    train(tmp_path / "cut", settings, workers=0, stop=3)
    whole, cut = (train(tmp_path / name, settings, workers=0) for name in ("whole", "cut"))
    for one, two in zip(whole.average.parameters(), cut.average.parameters(), strict=True):
        assert torch.equal(one, two)
    assert {"own", "previous"} <= set(whole.log[-1]["held_out"])


def test_a_longer_encoder_begins_as_the_shorter_one(text_model, tmp_path):
    short = Settings(shapes=((1, 64, 64),), hidden_size=8, stem_sizes=(4, 4), dilations=(1, 2), keep_every=2, steps=2)
    train(tmp_path, short, workers=0, score=False)
    long = replace(short, text=str(text_model), written_size=16, dilations=(1, 2, 4))
    run = Run.start(long)
    run.take(tmp_path)
    picture = torch.from_numpy(page((3, 4), (64, 64))[0])[None]
    shorter = Run.at(tmp_path, short).average.eval()
    assert torch.equal(run.learner.eval()(picture)["classes"], shorter(picture)["classes"])


def test_rare_words_are_told_from_all_others():
    words = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    speller = Speller(8, words)
    ids = torch.tensor([[[-1, 7, -1, -1], [-1, -1, -1, -1]]])
    found = speller.losses(torch.randn(1, 2, 8), ids, torch.tensor([[1, 0]]), torch.tensor([3, 99]))
    assert all(torch.isfinite(loss) for loss in found.values())
    none = speller.losses(torch.randn(1, 2, 8), torch.full_like(ids, -1), torch.zeros(1, 2), torch.tensor([3]))
    assert none["spelled"] == 0
    assert none["sizes"] == 0


def test_the_tokenizers_own_places(text_model):
    text = "Read line 2 "
    found = encoder_of(text_model)(text)
    assert [first for _, (first, _) in found] == sorted(first for _, (first, _) in found)
    assert max(last for _, (_, last) in found) <= len(text)


def test_a_token_made_of_what_is_written():
    made: dict = {"stem_sizes": (4, 4), "hidden_size": 8, "dilations": (1,), "batch_norm": True}
    config = PageEncoderConfig(**made, written_size=6, token_size=(16, 16), token_parts=("written", "places"))
    torch.manual_seed(0)
    encoder = PageEncoder(config).eval()
    with torch.no_grad():
        for number in (0, 2):
            encoder.writing[number].weight.mul_(30)
    pixels = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    found = encoder.tokens(pixels)
    assert found.shape == (1, 8, 6 + 28)
    assert torch.allclose(found[..., :6].square().mean(-1), torch.ones(1, 8), atol=0.05)
    assert torch.allclose(encoder.folded().tokens(pixels), found, atol=1e-4)
    with pytest.raises(ValueError, match="written_size is 0"):
        PageEncoderConfig(token_parts=("written",))
