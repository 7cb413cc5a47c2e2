"""How fusion begins: pages that are never drawn, slots of image tokens, and layers that learn where to look."""

from dataclasses import replace
from itertools import repeat
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from casa import FusionConfig, adapt
from casa.testing import tiny_tokenizer
from casa.vision.connector import LinearProjector
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig, place_waves
from casa.vision.page_words import BEFORE, NOTHING, TAG_IDS
from projects.casa_smol.closed_form import Closed, begin_asking
from projects.casa_smol.finding import (
    ANSWERED,
    LEARNING,
    Finder,
    attention,
    even,
    keep,
    rows_of,
    values_of,
)
from projects.casa_smol.looking import look, rows_in
from projects.casa_smol.perfect_pages import IMAGE_AT, PROMPT, Pages, after, batch_of, names_of
from projects.casa_smol.pretraining import Draws, Settings, find, rounds, said, train
from projects.casa_smol.start import (
    HANDED,
    LARGEST,
    PLACES,
    Slots,
    Spread,
    blank,
    codes_of_words,
    heads_of,
    moments,
    start_of,
)
from projects.casa_smol.tasks.films import PROMPT as FILM_PROMPT

WIDTH = 576


@pytest.fixture(scope="module")
def pages():
    return Pages(tiny_tokenizer("gpt2"))


def test_an_answers_tokens_stand_where_they_are_said_to(pages):
    known, line_break = 0, pages.tokenizer("\n")["input_ids"][-1]
    for seed in range(40):
        one = pages.sample(np.random.default_rng(seed), pages=0.7)
        before = [*[NOTHING] * (BEFORE - 1), line_break]
        written = one.ids.reshape(-1, one.ids.shape[-1])[:, TAG_IDS:]
        assert len(one.found) == len(one.answer)
        assert len(one.wanted) == len(one.prompt)
        for (at, slot), token in zip(one.found, one.answer, strict=True):
            if at >= 0:
                known += 1
                assert written[at][slot : slot + BEFORE].tolist() == before
                assert written[at][slot + BEFORE] == token
            before = [*before[1:], token]
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


def seeded():
    return torch.Generator().manual_seed(2)


STAGES = (({1: "asked"}, False), ({2: "later"}, False), ({3: "next"}, True))


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
    rng = np.random.default_rng(1)
    written = batch_of([pages.sample(rng, 0.5) for _ in range(8)], eyes, rng, noise=0.0).inputs["image_features"]
    known = start_of(model, texts, codes, words, SIZES, written, names_of(tokenizer), layers=(1, 2, 3))
    known.hand_on(model)
    return model, eyes, known


@pytest.fixture(scope="module")
def samples(pages):
    return [pages.sample(np.random.default_rng((7, number)), 0.5) for number in range(60)]


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


def test_a_tokens_own_word_and_the_two_before_are_handed_on(begun, pages):
    model, _, known = begun
    (ids, *_), layer = list(pages.sentences(np.random.default_rng(6), 600)), model.casa_layers["1"]
    states: list[Any] = []
    hook = model.decoder.blocks[2].input_layernorm.register_forward_hook(lambda _, given, out: states.append(given[0]))
    output = layer.o_proj.weight.detach().clone()
    with blank(model, len(ids)) as picture, torch.no_grad():
        for weight in (output, torch.zeros_like(output)):
            layer.o_proj.weight.copy_(weight)
            model(input_ids=ids, **picture, use_cache=False, logits_to_keep=1)
    hook.remove()
    layer.o_proj.weight.data.copy_(output)
    told = (states[0] - states[1])[:, 5:]
    for name, words in (("own", ids[:, 5:]), ("before", ids[:, 4:-1]), ("earlier", ids[:, 3:-2])):
        alike = torch.cosine_similarity(told @ known.quiet[HANDED[name]].T, known.codes[words][..., :48], dim=-1)
        assert alike.mean() > 0.8, name
    own, before, earlier = (told @ known.quiet[HANDED[name]].T for name in ("own", "before", "earlier"))
    for back, (words, off) in enumerate(((before, 0.05), (earlier, 0.055)), 1):
        torch.testing.assert_close(own[:, :-back], words[:, back:], atol=off * own.abs().max().item(), rtol=0.0)


def test_quiet_directions_are_neither_read_nor_written_much(begun, pages):
    model, _, known = begun
    gains = known.gains
    seen = moments(model, list(pages.sentences(np.random.default_rng(1), 6000)), known.codes, list(gains))
    spread = Spread.of(seen, gains)
    quiet = spread.quiet(model)
    torch.testing.assert_close(quiet @ quiet.T, torch.eye(WIDTH), atol=1e-4, rtol=0.0)
    written = ((quiet @ spread.varied) * quiet).sum(1)
    assert written[:300].mean() < 0.5 * written[:-4].mean()
    assert (quiet[:-4] @ spread.common.T).abs().max() < 1e-3  # what all hidden states have in common comes last
    read = sum(
        (quiet @ (module.weight.detach() * block.input_layernorm.weight.detach()).T).square().sum(1)
        for block in model.decoder.blocks
        for module in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    )
    assert torch.as_tensor(read)[:300].mean() < torch.as_tensor(read)[300:-4].mean()


def test_what_is_kept_is_what_the_model_sees_and_attention_is_the_models_own(begun, samples):
    model, eyes, known = begun
    some, layer = samples[:6], model.casa_layers["2"]
    kept = keep(model, known.slots, eyes, some, (2,), seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name in ("q_proj", "k_proj"):
            getattr(layer, name).weight.data.normal_(std=0.03)
    rows = rows_of(kept, 2)
    with torch.no_grad():
        shares = attention(layer, rows, known.gains[2])
    seen: dict[int, Any] = {}
    projector, model.projector = model.projector, known.slots
    order = sorted(range(len(some)), key=lambda number: len(some[number].prompt) + len(some[number].answer))
    batch = batch_of([some[number] for number in order], eyes, np.random.default_rng((3, 0)))
    with torch.no_grad():
        model(**batch.inputs, use_cache=False, record=lambda layer, *parts: seen.__setitem__(layer, parts))
    model.projector = projector
    query, text_key, image_key, layout = seen[1]
    scores = torch.einsum("qkhc,nkc->qkhn", query.unflatten(1, (3, 3)), torch.cat([image_key, text_key])) / 8
    whole = scores.masked_fill(~layout.mask()[:, None, None], -torch.inf).softmax(-1)
    mask = batch.inputs["attention_mask"]
    packed = (mask.flatten().cumsum(0) - 1).view_as(mask)
    starts = np.cumsum((0, *batch.inputs["image_grid_thw"].prod(1).tolist()))
    for row, number in enumerate(order):
        one, first = some[number], int((mask[row] == 0).sum())
        places = [0, *(n for n in range(1, rows.at.shape[1]) if rows.told[number, n, 0] > -2)]
        assert len(places) == min(len(one.answer), ANSWERED)
        assert rows.at[number, places[-1]] + IMAGE_AT == len(one.prompt) + len(one.answer) - 2
        for place in places:
            assert rows.said[number, place] == one.answer[rows.at[number, place] + IMAGE_AT - len(one.prompt) + 1]
            exact = whole[packed[row, first + IMAGE_AT + rows.at[number, place]]][..., starts[row] : starts[row + 1]]
            ours = shares[number, place, :, :, : exact.shape[-1]].exp()
            torch.testing.assert_close(ours, exact, atol=0.02, rtol=0.05)  # states are kept in bfloat16
    assert all(len(one.found) == sum(at >= 0 for at, _ in one.sample.found) for one in kept)


def test_a_batchs_layers_look_where_the_model_does_in_chats_and_films_too(begun, pages):
    model, eyes, known = begun
    one, two, third = (pages.sample(np.random.default_rng(seed), 1.0) for seed in (1, 2, 3))
    films = [film for film in (pages.film(np.random.default_rng(seed)) for seed in range(9)) if film.earlier][:2]
    assert len(films) == 2
    chat = after(replace(third, ids=two.ids, found=[(-1, -1)] * len(third.answer)), two, pages.line_break)
    several = [one, after(two, one, pages.line_break), chat, *films]
    batch, seen = batch_of(several, eyes, np.random.default_rng(0)), dict[int, Any]()
    projector, model.projector = model.projector, known.slots
    with torch.no_grad():
        output = model(
            **batch.inputs, use_cache=False, output_hidden_states=True,
            record=lambda layer, *parts: seen.__setitem__(layer, parts),
        )  # fmt: skip
        text, rows_of_text = rows_in(batch, even(known.slots(batch.inputs["image_features"], None)))
        rows = rows_of_text(model.decoder.blocks[2].input_layernorm(output.hidden_states[2]).flatten(0, 1)[text])
        shares = attention(model.casa_layers["2"], rows, known.gains[2]).exp()
    model.projector = projector
    query, text_key, image_key, layout = seen[1]
    scores = torch.einsum("qkhc,nkc->qkhn", query.unflatten(1, (3, 3)), torch.cat([image_key, text_key])) / 8
    whole = scores.masked_fill(~layout.mask()[:, None, None], -torch.inf).softmax(-1)
    mask, labels = batch.inputs["attention_mask"], batch.labels
    packed = mask.flatten().cumsum(0) - 1
    told = {tuple(line[:2]): [-1, -1, -1] for line in batch.where.tolist()}
    for row, column, token, slot in batch.where.tolist():
        told[row, column][slot] = token
    firsts = [0, *batch.inputs["image_grid_thw"].prod(1).cumsum(0).tolist()]
    counted = 0
    for picture in range(len(rows.at)):
        mine = slice(firsts[picture], firsts[picture + 1])
        for place, at in enumerate(rows.at[picture].tolist()):
            if rows.told[picture, place, 0] == -2:
                continue
            row, column = divmod(int(text[picture, at]), labels.shape[1])
            counted, real = counted + 1, rows.is_image[picture]
            assert rows.said[picture, place] == labels[row, column + 1]
            assert rows.is_first[picture, place] == (labels[row, column] < 0)
            exact = whole[packed[row * labels.shape[1] + column]][..., mine]
            torch.testing.assert_close(shares[picture, place][..., : len(real)][..., real], exact, atol=2e-3, rtol=1e-3)
            theirs = [firsts[picture] + int(token) if token >= 0 else -1 for token in rows.told[picture, place]]
            assert theirs == told.get((row, column), [-1, -1, -1])
    assert counted == int((labels >= 0).sum())


def test_what_is_missed_reaches_every_layer_and_is_a_number_where_nothing_is_known(begun, pages):
    model, eyes, known = begun
    one = pages.sample(np.random.default_rng(4), 0.0)
    roles = {2: "first", 3: "next"}
    for some in ([one], [replace(one, found=[(-1, -1)] * len(one.answer))]):
        batch = batch_of(some, eyes, np.random.default_rng(0))
        image = known.slots(batch.inputs["image_features"], None)
        projector, model.projector = model.projector, known.slots
        output = model(**batch.inputs, use_cache=False, output_hidden_states=True)
        model.projector = projector
        missed, found = look(model, roles, output.hidden_states, image, batch)
        missed.backward()
        assert missed.isfinite()
        assert found.keys() == roles.keys()
        for block in roles:
            weight = model.casa_layers[str(block)].q_proj.weight
            assert weight.grad.abs().max() > 0
            weight.grad = None
    model.zero_grad()


@pytest.mark.parametrize(("role", "block"), [("asked", 1), ("first", 2), ("again", 2), ("later", 2), ("next", 3)])
def test_each_role_learns_to_find(begun, samples, pages, role, block):
    model, eyes, known = begun
    kept = keep(model, known.slots, eyes, samples, (block,), seed=0)
    closed = Closed(known, pages.line_break)
    layer = model.casa_layers[str(block)]
    begin_asking(layer, block, role, kept, closed)
    finder = Finder(layer, block, known.gains[block], role, 30, LEARNING[role][0])
    run = [finder.learn(kept, 1, batch=12) for _ in range(30)]
    before, after = (np.mean(part, axis=0) for part in (run[:3], run[-3:]))
    assert after[0] < 0.85 * before[0]
    assert after[1] > 0.3


def test_values_are_the_code_of_the_word_found_and_nothing_of_text(begun, samples, pages):
    model, eyes, known = begun
    kept = keep(model, known.slots, eyes, samples, (3,), seed=0)
    layer = model.casa_layers["3"]
    begin_asking(layer, 3, "next", kept, Closed(known, pages.line_break, placed=0.0))
    read = values_of(layer, 3, kept, known, [(0, slice(0, 64)), (1, slice(0, 64)), (2, slice(0, 48))])
    rows = rows_of(kept, 3)
    assert [one.shape for one in read] == [(64, WIDTH), (64, WIDTH), (48, WIDTH)]
    there = rows.told[..., 0] >= 0
    row, place = there.nonzero().T
    found = rows.image[row, rows.told[row, place, 0]] * known.gains[3] @ read[0].T
    alike = torch.nn.functional.cosine_similarity(found, known.codes[rows.said[row, place]][:, :64], dim=1)
    assert alike.mean() > 0.4
    text = rows.text.flatten(0, 1)
    assert (text[text.any(1)] @ read[0].T).norm(dim=1).mean() < 0.3 * found.norm(dim=1).mean()


def test_a_layer_tells_where_each_of_its_heads_looks(begun, samples):
    model, eyes, known = begun
    layer, some = model.casa_layers["2"], slice(0, 44)
    known.say(layer, 2, [(some, torch.zeros(44, WIDTH))] * 3, aloud=False)
    batch = batch_of(samples[:1], eyes, np.random.default_rng(0), noise=0.0, empty=0.0)
    features = batch.inputs["image_features"]
    image = known.slots(features, None)
    image = image * torch.rsqrt(image.square().mean(-1, keepdim=True)) * known.gains[2]
    _, _, values, output = heads_of(layer)
    with torch.no_grad():
        for head in range(3):
            said = image @ values[head].T @ output[:, 3 * head + 1].T
            told = said @ known.quiet[HANDED["places"]].T
            mine = told[:, 20 * head : 20 * head + 20]
            alike = torch.nn.functional.cosine_similarity(mine, features[:, -28:][:, PLACES], dim=1)
            assert alike.min() > 0.99
            assert told.norm(dim=1).allclose(mine.norm(dim=1), rtol=1e-4)  # others' axes stay free


def test_finding_goes_on_where_it_stopped_and_then_layers_say_words(begun, samples, pages, tmp_path):
    model, eyes, known = begun
    settings, closed = Settings(finding=(24, 4)), Closed(known, pages.line_break)

    def run(folder):
        folder.mkdir(exist_ok=True)
        find(model, known, eyes, repeat(samples[:24]), closed, settings, folder, STAGES)
        return {name: p.detach().clone() for name, p in model.casa_layers.named_parameters()}

    whole = run(tmp_path / "whole")
    assert all(whole[f"{block}.o_proj.weight"].any() for block in (1, 2, 3))
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "layer-1.pt").write_bytes((tmp_path / "whole" / "layer-1.pt").read_bytes())
    for name, parameter in run(cut).items():
        assert torch.equal(parameter, whole[name]), name


def test_rounds_of_new_samples_are_drawn_by_a_process_beside(pages):
    draws = Draws(pages, None, Settings(finding=(3, 1)), (0,), found=True)
    drawn = rounds(draws)
    for number in (0, 3, 6):
        some = next(drawn)
        assert [one.prompt for one in some] == [draws[at].prompt for at in range(number, number + 3)]
        assert all((one.ids == draws[at].ids).all() for at, one in enumerate(some, number))
    drawn.close()


def test_training_goes_on_where_it_stopped(begun, pages, tmp_path):
    model, eyes, known = begun
    settings = Settings(steps=4, batch=2, keep_every=2, warm_up=1)
    projector, model.projector = model.projector, known.slots

    def draw(step):
        rng = np.random.default_rng(step)
        return batch_of([pages.sample(rng, 0.0) for _ in range(2)], eyes, rng)

    def learned():
        return {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith("casa_layers")}

    before = learned()
    train(model, draw, settings, tmp_path / "whole", STAGES)
    whole = learned()
    assert not all(torch.equal(before[name], whole[name]) for name in before)

    def begin_again():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in before:
                    parameter.copy_(before[name])

    begin_again()
    with pytest.raises(KeyboardInterrupt):
        train(model, lambda step: draw(step) if step < 3 else interrupt(), settings, tmp_path / "cut", STAGES)
    begin_again()
    train(model, draw, settings, tmp_path / "cut", STAGES)
    for name, tensor in learned().items():
        assert torch.equal(tensor, whole[name]), name
    with torch.no_grad():
        nats, missed, shares = said(model, draw(9), {2: "later"})
    assert nats.isfinite()
    assert missed.isfinite()
    assert set(shares) == {"nats", "first", "tokens", "exact", "found"}
    begin_again()
    model.projector = projector
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

    alone, together = [batch(each) for each in (one, two, third)], batch(one, chat)
    tokens = [each.inputs["input_ids"][0] for each in alone]
    line_break = torch.tensor([pages.line_break])
    ids = torch.cat([tokens[0], line_break, tokens[1], line_break, tokens[2]])
    assert torch.equal(together.inputs["input_ids"][1][-len(ids) :], ids)
    labels = [each.labels[0] for each in alone]
    silent = torch.tensor([-100])
    wanted = torch.cat([labels[0], silent, labels[1], silent, labels[2]])
    assert torch.equal(together.labels[1][-len(ids) :], wanted)
    pictures = [each.inputs["image_features"] for each in alone[:2]]
    assert torch.equal(together.inputs["image_features"], torch.cat([pictures[0], *pictures]))
    _, places = texts_of(pages.tokenizer, together)
    assert places == [(0, IMAGE_AT), (1, IMAGE_AT), (1, len(tokens[0]) + 1 + IMAGE_AT)]
    mine = together.where[together.where[:, 0] == 1]
    begins = together.labels.shape[1] - len(ids)
    assert torch.equal(mine[: len(alone[0].where), 1] - begins, alone[0].where[:, 1])
    moved = alone[1].where + torch.tensor([0, begins + len(tokens[0]) + 1, 2 * len(pictures[0]), 0])
    assert torch.equal(mine[len(alone[0].where) :][: len(moved), 1:], moved[:, 1:])


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
    batch = batch_of([empty], begun[1], np.random.default_rng(0), noise=0.0)
    assert not batch.inputs["image_features"][:, : sum(SIZES)].any()


def test_image_tokens_in_which_nothing_begins_mostly_stay_away(begun, pages):
    one = pages.sample(np.random.default_rng(4), 1.0)
    kept, whole = (batch_of([one], begun[1], np.random.default_rng(0), empty=share) for share in (0.0, 1.0))
    assert len(whole.inputs["image_features"]) == one.ids[..., 0].size
    for batch in (kept, whole):
        assert int(batch.inputs["image_grid_thw"].prod()) == len(batch.inputs["image_features"])
        assert len(batch.where) == sum(at >= 0 for at, _ in one.found)
    begins = torch.from_numpy(one.ids).flatten(0, 1)[:, TAG_IDS + BEFORE] >= 0
    begins[0] = True
    assert len(kept.inputs["image_features"]) == int(begins.sum())
