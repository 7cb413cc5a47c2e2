"""Layers that begin by copying: pages that are never drawn, slots of image tokens, and how the next word is found."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from casa import FusionConfig, adapt
from casa.testing import tiny_tokenizer
from casa.vision.connector import Projector
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig, place_waves
from casa.vision.page_words import BEFORE, NOTHING, TAGS
from projects.casa_smol import pretraining, start
from projects.casa_smol.pretraining import Pages, Settings, Watched, batch_of, train
from projects.casa_smol.start import LARGEST, Slots, Strengths, begin, codes_of_words, moments

WIDTH = 576


@pytest.fixture(scope="module")
def pages():
    return Pages(tiny_tokenizer("gpt2"))


def test_an_answers_tokens_stand_where_they_are_said_to(pages):
    known, line_break = 0, pages.tokenizer("\n")["input_ids"][-1]
    for seed in range(40):
        one = pages.sample(np.random.default_rng(seed), pages=0.7)
        before = [NOTHING, line_break]
        written = one.ids.reshape(-1, one.ids.shape[-1])[:, TAGS:]
        assert len(one.found) == len(one.answer)
        assert len(one.wanted) == len(one.prompt)
        for (at, slot), token in zip(one.found, one.answer, strict=True):
            if at >= 0:
                known += 1
                assert written[at][slot : slot + BEFORE].tolist() == before
                assert written[at][slot + BEFORE] == token
            before = [before[-1], token]
    assert known > 200


def test_a_page_is_its_seeds(pages):
    one, two = (pages.sample(np.random.default_rng(5), 0.7) for _ in range(2))
    assert (one.ids == two.ids).all()
    assert one.prompt == two.prompt


def test_places_are_those_of_the_encoder():
    config = PageEncoderConfig(
        hidden_size=8, stem_sizes=(4, 4), dilations=(1,), token_size=(16, 16), token_parts=("places",)
    )
    encoder = PageEncoder(config).eval()
    assert torch.equal(encoder.tokens(torch.zeros(1, 3, 48, 80))[0], place_waves(3, 5, (16, 16)))


SIZES = (96, 64, 112, 128, 80, 48)


def test_the_projector_becomes_the_same_linear_map():
    random = torch.Generator().manual_seed(0)
    slots = Slots(torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=random))[0], SIZES)
    codes = torch.randn(6, sum(SIZES), generator=random) / 12
    tokens = torch.cat([codes, torch.randn(6, 30, generator=random), place_waves(2, 3, (16, 16))], dim=1)
    tokens = torch.nn.functional.layer_norm(tokens, tokens.shape[1:])
    projector = Projector(tokens.shape[1], WIDTH)
    slots.into(projector, tokens)
    with torch.no_grad():
        wanted = slots(torch.cat([tokens[:, : sum(SIZES)], tokens[:, -28:]], dim=1), None)
        torch.testing.assert_close(projector(tokens, [(2, 3)]), wanted, atol=2e-3, rtol=1e-2)


def seeded():
    return torch.Generator().manual_seed(2)


@pytest.fixture(scope="module")
def begun(pages) -> Any:
    """A text model of three blocks with layers set, words' embeddings, and slots in the projector's place."""
    tokenizer = pages.tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=9, num_key_value_heads=3, rope_theta=100000.0, tie_word_embeddings=True,
        )  # fmt: skip
        made: Any = {"hidden_size": 8, "stem_sizes": (4, 4), "dilations": (1,), "token_size": (16, 16), "reads": True}
        eyes = PageEncoder(PageEncoderConfig(**made))
        text = LlamaForCausalLM(config)
        # as long as those of a trained model beside what blocks add, and with much in common
        text.model.embed_tokens.weight.data = 50 * text.model.embed_tokens.weight.data + torch.randn(WIDTH)
        model: Any = adapt(text, fusion=FusionConfig.parallel(layers=(1, 2), output="zero"), vision=eyes)
    table = model.get_input_embeddings().weight.detach()
    words = torch.nn.functional.normalize(table - table.mean(0), dim=-1)
    sentences = list(pages.sentences(np.random.default_rng(1), 8000))
    codes = torch.nn.functional.normalize(words @ torch.randn(WIDTH, max(SIZES), generator=seeded()), dim=-1)
    eyes.learn_words(codes, tokenizer.backend_tokenizer.to_str())
    rng = np.random.default_rng(1)
    batch = batch_of([pages.sample(rng, 0.5) for _ in range(8)], eyes, 0.0, rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "LAYERS", (1, 2))
        patch.setattr(start, "TELLING", 1)
        model.projector = begin(
            model.eval(), sentences, codes, words, SIZES, batch.inputs["image_features"], Strengths()
        )
    return model, batch, eyes


def test_codes_are_what_is_foretold_of_words_and_no_number_says_a_word_alone(begun, pages):
    model, _, _ = begun
    table = model.get_input_embeddings().weight.detach()
    words = torch.nn.functional.normalize(table - table.mean(0), dim=-1)
    sentences = list(pages.sentences(np.random.default_rng(4), 6000))
    codes = codes_of_words(model, sentences, words, 40, blocks=(0,))
    assert codes.shape == (len(table), 40)
    assert codes.norm(dim=1).max() < 1.001
    assert codes.abs().max() <= LARGEST / 40**0.5 + 1e-6
    _, shares = moments(model, sentences, codes, (0,)).maps(0)
    assert shares[:40].min() > 0.9  # the first block sees the word itself, and nothing of the one before
    assert shares[40:80].mean() < 0.5


def test_layers_find_the_next_word_before_any_training(begun, monkeypatch):
    model, batch, _ = begun
    monkeypatch.setattr(pretraining, "LAYERS", (1, 2))
    watched = Watched([1])
    with torch.no_grad():
        model(**batch.inputs, use_cache=False, record=watched)
        _, hits = watched.loss(batch.inputs["attention_mask"], batch.where)
    assert min(hits) > 0.55, hits


def test_training_goes_on_where_it_stopped(begun, pages, tmp_path, monkeypatch):
    model, _, eyes = begun
    monkeypatch.setattr(pretraining, "LAYERS", (8, 11))
    monkeypatch.setattr(Watched, "__init__", lambda self, layers: vars(self).update(layers=[0, 1], seen={}))
    settings = Settings(steps=4, batch=2, keep_every=2, warm_up=1)

    def draw(step):
        rng = np.random.default_rng(step)
        return batch_of([pages.sample(rng, 0.0) for _ in range(2)], eyes, 0.1, rng)

    def learned():
        return {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith("casa_layers")}

    before = learned()
    train(model, draw, settings, tmp_path / "whole")
    whole = learned()
    assert not all(torch.equal(before[name], whole[name]) for name in before)

    def begin_again():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in before:
                    parameter.copy_(before[name])

    begin_again()
    with pytest.raises(KeyboardInterrupt):
        train(model, lambda step: draw(step) if step < 3 else interrupt(), settings, tmp_path / "cut")
    begin_again()
    train(model, draw, settings, tmp_path / "cut")
    for name, tensor in learned().items():
        assert torch.equal(tensor, whole[name]), name


def interrupt():
    raise KeyboardInterrupt


def test_nothing_is_written_where_nothing_stands(begun, pages):
    one = pages.sample(np.random.default_rng(3), 0.0)
    empty = replace(one, ids=np.full_like(one.ids, NOTHING))
    batch = batch_of([empty], begun[2], 0.0, np.random.default_rng(0))
    assert not batch.inputs["image_features"][:, : sum(SIZES)].any()
