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
from casa.vision.page_reading import BEGUN, NOTHING
from projects.casa_smol import pretraining
from projects.casa_smol.pretraining import Pages, Settings, Watched, batch_of, train, written_length
from projects.casa_smol.start import Slots, calm_axes, moments, orthonormal, set_layers

WIDTH = 576


@pytest.fixture(scope="module")
def pages():
    return Pages(tiny_tokenizer("gpt2"))


def test_an_answers_tokens_stand_where_they_are_said_to(pages):
    known = 0
    for seed in range(40):
        one = pages.sample(np.random.default_rng(seed), pages=0.7)
        before = pages.line_break
        written = one.ids.reshape(-1, 1 + BEGUN)
        assert len(one.found) == len(one.answer)
        for (at, slot), token in zip(one.found, one.answer, strict=True):
            token = pages.line_break if token == pages.end else token
            if at >= 0:
                known += 1
                assert written[at][slot] == before
                assert written[at][1 + slot] == token
            before = token
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


SIZES = (160, 160, 120, 80)


def test_the_projector_becomes_the_same_linear_map():
    random = torch.Generator().manual_seed(0)
    slots = Slots(orthonormal(WIDTH, WIDTH, random), SIZES)
    codes = torch.randn(6, sum(SIZES), generator=random) / 12
    tokens = torch.cat([codes, torch.randn(6, 30, generator=random), place_waves(2, 3, (16, 16))], dim=1)
    tokens = torch.nn.functional.layer_norm(tokens, tokens.shape[1:])
    projector = Projector(tokens.shape[1], WIDTH)
    slots.into(projector, tokens)
    with torch.no_grad():
        wanted = slots(torch.cat([tokens[:, : sum(SIZES)], tokens[:, -28:]], dim=1), None)
        torch.testing.assert_close(projector(tokens, [(2, 3)]), wanted, atol=2e-3, rtol=1e-2)


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
        text.model.embed_tokens.weight.data *= 50  # as long as those of a trained model beside what blocks add
        model: Any = adapt(text, fusion=FusionConfig.parallel(layers=(1, 2), output="zero"), vision=eyes)
    table = model.get_input_embeddings().weight.detach()
    eyes.learn_words(table, tokenizer.backend_tokenizer.to_str())
    words = torch.nn.functional.normalize(table - table.mean(0), dim=-1)
    seen = moments(model.eval().backbone, tokenizer, words, (1, 2), 4000, seed=1)
    gains = {block: model.decoder.blocks[block].input_layernorm.weight.detach() for block in (1, 2)}
    axes, means = calm_axes(seen, gains)
    model.projector = Slots(axes, SIZES)
    rng = np.random.default_rng(1)
    batch = batch_of([pages.sample(rng, 0.0) for _ in range(6)], eyes, 0.0, rng)
    set_layers(model, seen, model.projector, means, written_length(model.projector, batch))
    return model, batch, eyes


def test_layers_find_the_next_word_before_any_training(begun, monkeypatch):
    model, batch, _ = begun
    monkeypatch.setattr(pretraining, "LAYERS", (1, 2))
    watched = Watched([0, 1])
    with torch.no_grad():
        model(**batch.inputs, use_cache=False, record=watched)
        loss, hits = watched.loss(batch.inputs["attention_mask"], batch.where)
    assert min(hits) > 0.6, hits
    assert loss < 2.0


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
