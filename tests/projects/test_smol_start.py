"""How fusion begins: pages that are never drawn, slots of image tokens, and layers that learn on them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from casa import FusionConfig, adapt
from casa.analysis.attention_maps import attention_shares
from casa.testing import tiny_tokenizer
from casa.vision.connector import LinearProjector
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig, place_waves
from casa.vision.page_words import BEFORE, BEGUN, NOTHING, TAG_IDS
from projects.casa_smol import looking
from projects.casa_smol.perfect_pages import IMAGE_AT, PROMPT, Pages, after, batch_of
from projects.casa_smol.pretraining import Settings, said, train
from projects.casa_smol.start import LARGEST, Slots, calm_axes, codes_of_words, moments
from projects.casa_smol.tasks.films import PROMPT as FILM_PROMPT

WIDTH = 576


@pytest.fixture(scope="module")
def pages():
    return Pages(tiny_tokenizer("gpt2"))


def test_an_answer_stands_on_its_page(pages):
    line_break, whole = pages.tokenizer("\n")["input_ids"][-1], 0
    for seed in range(40):
        one = pages.sample(np.random.default_rng(seed), pages=0.7)
        told = one.ids.reshape(-1, one.ids.shape[-1])[:, TAG_IDS:]
        written = {tuple(row[slot : slot + BEFORE + 1]) for row in told.tolist() for slot in range(BEGUN)}
        before, found = [*[NOTHING] * (BEFORE - 1), line_break], 0
        for token in one.answer:
            found += (*before, token) in written
            before = [*before[1:], token]
        # where several texts begin in one image token, not all are told
        whole += found == len(one.answer)
    assert whole > 30


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


SIZES = PageEncoderConfig().word_sizes


def test_the_projector_becomes_the_same_linear_map():
    random = torch.Generator().manual_seed(0)
    slots = Slots(torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=random))[0], SIZES)
    codes = torch.randn(6, sum(SIZES), generator=random) / 12
    tokens = torch.cat([codes, torch.randn(6, 30, generator=random), place_waves(2, 3, (16, 16))], dim=1)
    projector = LinearProjector(tokens.shape[1], WIDTH)
    slots.into(projector, tokens.shape[1])
    with torch.no_grad():
        wanted = slots(torch.cat([tokens[:, : sum(SIZES)], tokens[:, -28:]], dim=1), None)
        torch.testing.assert_close(projector(tokens, [(2, 3)]), wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def begun(pages) -> Any:
    """A text model of four blocks with fusion layers that say nothing, its eyes, and what is known of it."""
    tokenizer = pages.tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=9, num_key_value_heads=3, rope_theta=100000.0, tie_word_embeddings=True,
        )  # fmt: skip
        made: Any = {"hidden_size": 8, "stem_sizes": (4, 4), "dilations": (1,), "token_size": (16, 16), "reads": True}
        eyes = PageEncoder(PageEncoderConfig(**made))
        text = LlamaForCausalLM(config)
        # as long as those of a trained model beside what blocks add, and with much in common
        text.model.embed_tokens.weight.data = 50 * text.model.embed_tokens.weight.data + torch.randn(WIDTH)
        model: Any = adapt(text, fusion=FusionConfig.parallel(layers=(1, 2, 3), output="zero"), vision=eyes).eval()
        table = model.get_input_embeddings().weight.detach()
        words = torch.nn.functional.normalize(table - table.mean(0), dim=-1)
        codes = torch.nn.functional.normalize(words @ torch.randn(WIDTH, max(SIZES)), dim=-1)
    eyes.learn_words(codes, tokenizer.backend_tokenizer.to_str())
    texts = list(pages.sentences(np.random.default_rng(1), 6000))
    return model, eyes, Slots(calm_axes(model, texts, blocks=(1, 2, 3)), SIZES)


def test_codes_are_what_is_foretold_of_words_and_no_number_says_a_word_alone(begun, pages):
    model, _, _ = begun
    table = model.get_input_embeddings().weight.detach()
    words = torch.nn.functional.normalize(table - table.mean(0), dim=-1)
    texts = list(pages.sentences(np.random.default_rng(4), 6000))
    codes = codes_of_words(model, texts, words, 40, blocks=(0,))
    assert codes.shape == (len(table), 40)
    assert codes.norm(dim=1).max() < 1.001
    assert codes.abs().max() <= LARGEST / 40**0.5 + 1e-6
    seen = moments(model, texts, codes, (0,))
    shares = (seen.solved(0) * seen.told[0]).sum(0) / seen.among.diagonal()
    assert shares.min() > 0.9  # the first block sees the word itself


def test_calm_directions_are_those_in_which_text_varies_least(begun, pages):
    model, _, slots = begun
    torch.testing.assert_close(slots.axes @ slots.axes.T, torch.eye(WIDTH), atol=1e-4, rtol=0.0)
    texts = list(pages.sentences(np.random.default_rng(5), 6000))
    seen = moments(model, texts, torch.zeros(len(pages.tokenizer), 1), (2,))
    varied = (slots.axes @ (seen.second[2] / seen.count).float() * slots.axes).sum(1)
    assert varied[:300].mean() < 0.5 * varied[300:-4].mean()
    mean = (seen.first[2] / seen.count).float()
    assert (slots.axes[:-4] @ mean).norm() < 0.05 * mean.norm()  # what all have in common comes last


@pytest.fixture
def in_slots(begun):
    """The model as it is trained: `Slots` in its projector's place."""
    model, _, slots = begun
    projector, model.projector = model.projector, slots
    yield begun
    model.projector = projector


def test_layers_learn_to_look_where_an_answer_begins(in_slots, pages, monkeypatch):
    model, eyes, slots = in_slots
    monkeypatch.setattr(looking, "LOOKERS", (2,))
    some = [pages.sample(np.random.default_rng(seed), 1.0) for seed in range(4)]
    chat = after(replace(some[1], ids=some[0].ids, begins=some[0].begins), some[0], pages.line_break)
    batch = batch_of([*some, chat, replace(some[2], begins=-1)], eyes, np.random.default_rng(0), empty=0.0)
    assert len(batch.begins) == 6  # of both turns of the chat, and none that nobody knows
    for (row, column, token, _), one in zip(batch.begins.tolist(), some, strict=False):
        assert int(batch.labels[row, column + 1]) == one.answer[0]
        there = torch.from_numpy(one.ids).flatten(0, 1)[one.begins][None]
        assert one.answer[0] in there[0, TAG_IDS + BEFORE :]
        codes = batch.inputs["image_features"][token, : sum(SIZES)]
        torch.testing.assert_close(codes[None], eyes.codes_of(there, torch.float32), atol=0.2, rtol=0.0)  # noise

    image = slots(batch.inputs["image_features"], None)
    with torch.no_grad():
        states = model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
    layer = model.casa_layers["2"]
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.Adam([layer.q_proj.weight, layer.k_proj.weight], lr=3e-3)
    seen = []
    for _ in range(30):
        missed, found = looking.look(model, states, image, batch)
        seen.append((missed.item(), found))
        optimizer.zero_grad()
        missed.backward()
        optimizer.step()
    assert seen[-1][0] < 0.3 * seen[0][0]
    assert seen[-1][1] == 1.0
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(before[name])
            parameter.grad = None


def test_a_looking_layers_scores_are_the_operations(in_slots, pages, monkeypatch):
    """What `look` takes for the heads' attention to a picture is what the model computes."""
    model, eyes, slots = in_slots
    for blocks in ("LOOKERS", "ASKERS"):
        monkeypatch.setattr(looking, blocks, (1,))
    one = pages.sample(np.random.default_rng(8), 1.0)
    batch = batch_of([one], eyes, np.random.default_rng(0), noise=0.0)
    ((row, column, token, begin),) = batch.begins.tolist()
    assert (row, begin, column) == (0, IMAGE_AT, len(one.prompt) - 1)
    shares = attention_shares(model, batch.inputs, [column])
    with torch.no_grad():
        states = model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
        missed, found = looking.look(model, states, slots(batch.inputs["image_features"], None), batch)
    image = shares.weights[shares.blocks.index(1), :, 0, : shares.num_columns]
    there = (image / image.sum(-1, keepdim=True)).mean(0)
    assert missed.item() == pytest.approx(-there[token].log().item(), abs=0.02)  # by bfloat16
    assert found == float(there.argmax() == token)
    with torch.no_grad():
        missed, found = looking.ask(model, states, slots(batch.inputs["image_features"], None), batch)
    text = shares.weights[shares.blocks.index(1), :, 0, shares.num_columns :].unflatten(0, (3, 3))
    asked = text[looking.ASKING].mean(0)[batch.asked[:, 2]]
    assert missed.item() == pytest.approx(-asked.log().mean().item(), abs=0.02)
    assert found == pytest.approx(asked.mean().item(), abs=0.002)


def test_tokens_that_say_what_is_asked_for_are_known(begun, pages):
    """Names of fields and columns, numbers of lines: of a chat's turn its own, behind its picture."""
    one, two = (pages.sample(np.random.default_rng(seed), 1.0) for seed in (3, 12))
    chat = after(two, one, pages.line_break)
    batch = batch_of([chat], begun[1], np.random.default_rng(0))
    assert "Transcribe line 5." in pages.tokenizer.decode(one.prompt)
    assert "What does the table give as us for from?" in pages.tokenizer.decode(two.prompt)
    said = pages.tokenizer.decode(batch.inputs["input_ids"][0, batch.asked[:, 2]])
    assert said.replace(" ", "") == "5usfrom"
    for row, column, told, begin in batch.asked.tolist():
        assert begin < told < column
        assert int(batch.labels[row, column]) == -100 != int(batch.labels[row, column + 1])


def test_training_goes_on_where_it_stopped(in_slots, pages, tmp_path, monkeypatch):
    model, eyes, _ = in_slots
    monkeypatch.setattr(looking, "LOOKERS", (1, 3))
    monkeypatch.setattr(looking, "ASKERS", (2,))
    settings = Settings(steps=4, batch=2, keep_every=2, warm_up=1)

    def draw(step):
        rng = np.random.default_rng(step)
        return batch_of([pages.sample(rng, 0.0) for _ in range(2)], eyes, rng)

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
    with torch.no_grad():
        nats, missed, shares = said(model, draw(9))
    assert nats.isfinite()
    assert missed.isfinite()
    assert set(shares) == {"nats", "first", "tokens", "exact", "found"}
    begin_again()
    model.float().eval()


def interrupt():
    raise KeyboardInterrupt


def texts_of(tokenizer, batch):
    """Of each row the text without padding; and before which of its tokens pictures stand."""
    mask, ids = batch.inputs["attention_mask"].bool(), batch.inputs["input_ids"]
    pads = (~mask).sum(1)
    texts = [tokenizer.decode(row[real]) for row, real in zip(ids, mask, strict=True)]
    return texts, [(row, at - int(pads[row])) for row, at in batch.inputs["image_positions"].tolist()]


def test_a_chats_turns_are_those_alone(begun, pages):
    one, two, third = (pages.sample(np.random.default_rng(seed), 1.0) for seed in (1, 2, 3))
    third = replace(third, ids=two.ids)  # of the same page
    chat = after(third, after(two, one, pages.line_break), pages.line_break)

    def batch(*some):
        return batch_of(list(some), begun[1], np.random.default_rng(0), noise=0.0, empty=0.0)

    alone, both = [batch(each) for each in (one, two, third)], batch(one, chat)
    inputs, told = both.inputs, both.labels
    tokens = [each.inputs["input_ids"][0] for each in alone]
    line_break = torch.tensor([pages.line_break])
    ids = torch.cat([tokens[0], line_break, tokens[1], line_break, tokens[2]])
    assert torch.equal(inputs["input_ids"][1][-len(ids) :], ids)
    labels = [each.labels[0] for each in alone]
    silent = torch.tensor([-100])
    wanted = torch.cat([labels[0], silent, labels[1], silent, labels[2]])
    assert torch.equal(told[1][-len(ids) :], wanted)
    pictures = [each.inputs["image_features"] for each in alone[:2]]
    assert torch.equal(inputs["image_features"], torch.cat([pictures[0], *pictures]))
    _, places = texts_of(pages.tokenizer, both)
    assert places == [(0, IMAGE_AT), (1, IMAGE_AT), (1, len(tokens[0]) + 1 + IMAGE_AT)]


def test_a_films_frames_are_turns_of_a_session(begun, pages):
    """As `StreamingSession` feeds them: the prompt, then for each frame a turn, with no line break between."""
    turn, silent, repeated = PROMPT.format(question=FILM_PROMPT), 0, 0
    for seed in range(40):
        film = pages.film(np.random.default_rng(seed))
        batch = batch_of([film], begun[1], np.random.default_rng(0))
        (text,), places = texts_of(pages.tokenizer, batch)
        answers = [pages.tokenizer.decode(one.answer) for one in film.turns]
        assert text == turn + "".join(turn + answer for answer in answers)
        assert all(one.answer[-1] == pages.end for one in film.turns)
        assert len(places) == len(film.turns)
        for (_, at), one in zip(places, film.turns, strict=True):
            assert pages.tokenizer.decode(batch.inputs["input_ids"][0, at - IMAGE_AT :]).startswith(turn)
            assert (len(one.answer) == 1) == (one.ids[..., TAG_IDS + BEFORE] < 0).all()
        silent += sum(len(one.answer) == 1 for one in film.turns)
        repeated += len(answers) - len(set(answers))
    assert silent > 3
    assert repeated > 3


def test_nothing_is_written_where_nothing_stands(begun, pages):
    one = pages.sample(np.random.default_rng(3), 0.0)
    empty = replace(one, ids=np.full_like(one.ids, NOTHING))
    inputs = batch_of([empty], begun[1], np.random.default_rng(0), noise=0.0).inputs
    assert not inputs["image_features"][:, : sum(SIZES)].any()


def test_image_tokens_in_which_nothing_begins_mostly_stay_away(begun, pages):
    one = pages.sample(np.random.default_rng(4), 1.0)
    kept, whole = (batch_of([one], begun[1], np.random.default_rng(0), empty=share).inputs for share in (0.0, 1.0))
    assert len(whole["image_features"]) == one.ids[..., 0].size
    for inputs in (kept, whole):
        assert int(inputs["image_grid_thw"].prod()) == len(inputs["image_features"])
    begins = torch.from_numpy(one.ids).flatten(0, 1)[:, TAG_IDS + BEFORE] >= 0
    begins[0] = True
    assert len(kept["image_features"]) == int(begins.sum())
