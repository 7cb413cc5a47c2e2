"""A second turn with the first one's cache, as transformers' guides do it: what is computed anew says the same."""

import copy

import pytest
import torch
from transformers import DynamicCache

from casa import FusionConfig, adapt
from casa.errors import UserError
from casa.testing import (
    BACKBONES,
    TinySample,
    as_batch,
    tiny_casa,
    tiny_casa_over,
    tiny_encoder,
    tiny_processor,
    tiny_text_model,
)
from casa.testing.tiny import SPECIAL

# rows of a first turn with two pictures, none, a run of two and one behind all text
FIRST = (
    TinySample((5, 9, 17, 4, 33), ((1, 2, 3), (4, 1, 2)), seed=11),
    TinySample((7, 30, 11), (), seed=21),
    TinySample((40, 6, 13, 22), ((0, 2, 2), (0, 1, 1), (4, 1, 3)), seed=31),
)
# what each row adds: text, and pictures at places in it; texts of one length, and of several
EVEN = (((50, 51, 12), ((0, 1, 1), (2, 2, 2))), ((8, 3, 19), ()), ((23, 24, 25), ((3, 2, 1),)))
UNEVEN = (((50, 51, 12, 9), ((1, 1, 1), (2, 2, 2), (2, 1, 2))), ((8,), ()), ((23, 24), ((2, 2, 1),)))
TEXT = (((50, 51, 12, 9), ()), ((8,), ()), ((23, 24), ()))
ADDED = {"text": TEXT, "pictures": UNEVEN, "pictures in texts of one length": EVEN}
NEW = 4


def generate(model, inputs, **how):
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | how
    return model.generate(**inputs, **how, return_dict_in_generate=True, output_logits=True)


def longer(sample, said, added):
    """The whole chat: the first turn, what was said and what comes next. Pictures keep their pixels."""
    ids = (*sample.ids, *said)
    more = tuple((len(ids) + place, *size) for place, *size in added[1])
    longer = TinySample((*ids, *added[0]), (*sample.pictures, *more), sample.seed)
    return longer.in_squares() if sample.squares else longer


def first_turn(model, rows, **how):
    """Its cache, and what each row said."""
    inputs = as_batch(rows)
    output = generate(model, inputs, **how)
    return output.past_key_values, output.sequences[:, inputs["input_ids"].shape[1] :].tolist()


def same(found, wanted):
    assert found.sequences.tolist() == wanted.sequences.tolist()
    for one, other in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # generate hands out single precision


@pytest.mark.slow
@pytest.mark.parametrize("added", ADDED)
def test_rows_of_a_batch_go_on_with_the_whole_chat(model, added):
    """Of any lengths, though the processor pads the second turn otherwise than the first."""
    cache, said = first_turn(model, FIRST)
    chats = [longer(*row) for row in zip(FIRST, said, ADDED[added], strict=True)]
    wanted = generate(model, as_batch(chats))
    same(generate(model, as_batch(chats), past_key_values=cache), wanted)
    # and a third
    chats = [longer(*row) for row in zip(chats, wanted.sequences[:, -NEW:].tolist(), TEXT, strict=True)]
    same(generate(model, as_batch(chats), past_key_values=cache), generate(model, as_batch(chats)))


@pytest.mark.slow
@pytest.mark.parametrize("row", range(3))
def test_one_row_goes_on(few, row):
    cache, (said,) = first_turn(few, [FIRST[row]])
    for added in ((TEXT, UNEVEN, EVEN)[number][row] for number in range(3)):
        chat = longer(FIRST[row], said, added)
        wanted, held = generate(few, chat.inputs()), copy.deepcopy(cache)
        same(generate(few, chat.inputs(), past_key_values=held), wanted)
        cached = len(chat.ids) + NEW - 1
        assert held.num_text == cached
        assert held.num_rows == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKBONES)
def test_every_family_goes_on(kind):
    model = tiny_casa_over(kind)
    rows = [row.in_squares() if kind == "smolvlm" else row for row in FIRST]
    for batch in (rows[:1], rows):
        cache, said = first_turn(model, batch)
        # a window that slides counts padding too, so there texts of one length
        added = UNEVEN if len(batch) == 1 or not cache.slides else EVEN
        chats = [longer(*row) for row in zip(batch, said, added, strict=False)]
        inputs = as_batch(chats)
        same(generate(model, inputs, past_key_values=cache), generate(model, inputs))


def test_rows_of_a_sliding_window_are_padded_as_they_were():
    model = tiny_casa_over("gemma3_text")
    cache, said = first_turn(model, FIRST)
    chats = [longer(*row) for row in zip(FIRST, said, UNEVEN, strict=True)]
    with pytest.raises(UserError, match="give new text alone, padded on the left"):
        generate(model, as_batch(chats), past_key_values=cache)


@pytest.mark.slow
def test_new_text_alone_has_its_own_places(few):
    """With an attention mask over cache and new text; rows of the new text are padded on the left."""
    cache, said = first_turn(few, FIRST)
    chats = [longer(*row) for row in zip(FIRST, said, UNEVEN, strict=True)]
    wanted = generate(few, as_batch(chats)).sequences[:, -NEW:]
    # the last token of an answer is not cached
    new = [
        TinySample(
            (row[-1], *ids),
            tuple((1 + at, rows, columns) for at, rows, columns in more),
            sample.seed + len(sample.pictures),
        )
        for sample, row, (ids, more) in zip(FIRST, said, UNEVEN, strict=True)
    ]
    inputs = as_batch(new)
    inputs["attention_mask"] = torch.cat([cache.known.long(), inputs["attention_mask"]], dim=1)
    assert generate(few, inputs, past_key_values=cache).sequences[:, -NEW:].tolist() == wanted.tolist()


def test_the_new_pictures_may_be_given_alone(few):
    cache, said = first_turn(few, FIRST[:1])
    chat = longer(FIRST[0], said[0], UNEVEN[0])
    inputs = chat.inputs()
    wanted = generate(few, inputs)
    inputs |= few.picked(inputs, [2, 3, 4])
    same(generate(few, inputs, past_key_values=cache), wanted)


@pytest.mark.parametrize("kept", ["image_features", "image_keys_values"])
def test_kept_features_go_on_as_pixels_do(casa_of, kept):
    model = casa_of("parallel")
    cache, said = first_turn(model, FIRST[:1])
    inputs = longer(FIRST[0], said[0], UNEVEN[0]).inputs()
    wanted = generate(model, inputs)
    features = model.encode_images(inputs.pop("pixel_values"), inputs["image_grid_thw"])
    if kept == "image_keys_values":
        features = model.image_keys_values(features, inputs["image_grid_thw"])
    same(generate(model, {**inputs, kept: features}, past_key_values=copy.deepcopy(cache)), wanted)
    how = {"num_return_sequences": 2, "do_sample": True, "top_k": 1}
    several = generate(model, {**inputs, kept: features}, past_key_values=cache, **how)
    assert several.sequences.tolist() == wanted.sequences.tolist() * 2


@pytest.mark.slow
def test_what_stands_where_the_cache_ends_is_old_if_it_was_seen(few):
    """A picture behind all text of the first turn, one before the first new token, and both."""
    ended = TinySample((40, 6, 13, 22), ((2, 2, 2), (4, 1, 3)), seed=31)
    for added in (((23, 24), ()), ((23, 24), ((0, 2, 1),)), ((23, 24), ((0, 2, 1), (0, 1, 1), (2, 1, 1)))):
        with torch.no_grad():
            cache = few(**ended.inputs(), use_cache=True).past_key_values
        chat = longer(ended, (), added)
        same(generate(few, chat.inputs(), past_key_values=cache), generate(few, chat.inputs()))
        # of one token alone nothing is cached
        cache, said = first_turn(few, [ended], max_new_tokens=1)
        assert cache.num_text == 4
        chat = longer(ended, said[0], added)
        same(generate(few, chat.inputs(), past_key_values=cache), generate(few, chat.inputs()))


@pytest.mark.slow
def test_beams_and_several_answers_go_on_and_leave_the_cache(few):
    cache, said = first_turn(few, FIRST)
    chats = as_batch([longer(*row) for row in zip(FIRST, said, UNEVEN, strict=True)])
    held = cache.num_text
    for how in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        wanted = generate(few, chats, **how).sequences
        output = generate(few, chats, past_key_values=cache, **how)
        assert output.sequences.tolist() == wanted.tolist()
        with pytest.raises(UserError, match="holds the beams of a search"):
            generate(few, chats | {"input_ids": wanted}, past_key_values=output.past_key_values)
    torch.manual_seed(3)
    several = generate(few, chats, past_key_values=cache, do_sample=True, num_return_sequences=2)
    torch.manual_seed(3)
    assert several.sequences.tolist() == generate(few, chats, do_sample=True, num_return_sequences=2).sequences.tolist()
    assert (cache.num_text, cache.num_rows) == (held, 3)
    same(generate(few, chats, past_key_values=cache), generate(few, chats))
    # each of the answers goes on by itself
    rows = several.past_key_values
    assert rows.num_rows == 6
    ids = torch.cat([several.sequences, torch.tensor([[8, 9]] * 6)], dim=1)
    mask = torch.cat([rows.known.long(), torch.ones(6, 3, dtype=torch.long)], dim=1)
    found = generate(few, {"input_ids": ids[:, -3:], "attention_mask": mask}, past_key_values=rows).sequences[:, -NEW:]
    order, positions = [], []
    for row in range(6):
        mine = (chats["image_positions"][:, 0] == row // 2).nonzero().flatten().tolist()
        order += mine
        positions += [(row, int(chats["image_positions"][n, 1])) for n in mine]
    whole = few.picked(chats, order) | {"input_ids": ids, "image_positions": torch.tensor(positions)}
    whole["attention_mask"] = torch.cat(
        [chats["attention_mask"].repeat_interleave(2, 0), torch.ones(6, NEW + 2, dtype=torch.long)], dim=1
    )
    assert found.tolist() == generate(few, whole).sequences[:, -NEW:].tolist()


@pytest.mark.slow
def test_a_row_that_ended_early_holds_what_it_said_and_no_padding(few):
    free = generate(few, as_batch(FIRST)).sequences[:, 5:].tolist()
    stop = free[0][1]
    cache, said = first_turn(few, FIRST, max_new_tokens=7, eos_token_id=stop, pad_token_id=0)
    ends = [row[: row.index(stop) + 1] if stop in row else row for row in said]
    assert len({len(end) for end in ends}) > 1
    chats = as_batch([longer(*row) for row in zip(FIRST, ends, UNEVEN, strict=True)])
    same(generate(few, chats, past_key_values=copy.deepcopy(cache)), generate(few, chats))
    # the ids that generate returned, with text behind: the padding is masked, and is inferred where it can be
    empty = [5 - len(row.ids) for row in FIRST]
    ids = torch.tensor([[0] * n + [*row.ids, *words, 8, 9] for n, row, words in zip(empty, FIRST, said, strict=True)])
    whole = as_batch(FIRST) | {"input_ids": ids, "attention_mask": (ids != 0).long()}
    wanted = generate(few, whole).sequences
    assert generate(few, whole, past_key_values=copy.deepcopy(cache)).sequences.tolist() == wanted.tolist()
    del whole["attention_mask"]
    assert generate(few, whole, past_key_values=copy.deepcopy(cache)).sequences.tolist() == wanted.tolist()
    # shown as text, it is text, computed anew
    whole["attention_mask"] = torch.cat([as_batch(FIRST)["attention_mask"], torch.ones(3, 9, dtype=torch.long)], dim=1)
    wanted = generate(few, whole).sequences
    assert generate(few, whole, past_key_values=copy.deepcopy(cache)).sequences.tolist() == wanted.tolist()
    mask = torch.ones(3, cache.num_text + 1, dtype=torch.long)
    with pytest.raises(UserError, match=r"shows tokens of row \d that are padding in the cache"):
        few(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache)


@pytest.mark.slow
def test_a_mask_may_hide_the_last_cached_tokens_of_a_row(model, close):
    rows = [TinySample((5, 9, 17, 4, 33), ((1, 2, 3),), seed=11), TinySample((7, 30, 11, 6, 3), ((0, 1, 1),), seed=21)]
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    more = torch.tensor([[8, 9], [12, 13]])
    with torch.no_grad():
        cache = model(**as_batch(rows), use_cache=True).past_key_values
        found = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
        whole = as_batch(rows)
        whole |= {"input_ids": torch.cat([whole["input_ids"], more], dim=1), "attention_mask": mask}
        close(found, model(**whole, use_cache=False).logits[:, 5:])
        for hidden, words in (((0, 1), "later text stands behind"), ((0, 0, 0, 0, 0), "an image stands among them")):
            cache = model(**as_batch(rows), use_cache=True).past_key_values
            mask = torch.ones(2, 7, dtype=torch.long)
            mask[0, 5 - len(hidden) : 5] = torch.tensor(hidden)
            with pytest.raises(UserError, match=words):
                model(input_ids=more, attention_mask=mask, past_key_values=cache)


def test_a_later_call_without_a_mask_leaves_the_cached_padding_alone(few, close):
    with torch.no_grad():
        cache = few(**as_batch(FIRST), use_cache=True).past_key_values
        found = few(input_ids=torch.tensor([[8], [9], [12]]), past_key_values=cache).logits
        for row, sample in enumerate(FIRST):
            one = longer(sample, (), (((8, 9, 12)[row],), ()))
            close(found[row], few(**one.inputs()).logits[0, -1:])


def test_gist_tokens_go_on():
    model = adapt(tiny_text_model(), FusionConfig(gist=2), vision=tiny_encoder()).eval()
    first = TinySample((61, 62, 9, 17, 61, 62, 5, 9), ((0, 1, 1), (4, 2, 2)), seed=15)
    cache, said = first_turn(model, [first])
    chat = longer(first, said[0], ((3, 61, 62, 8), ((1, 2, 1),)))
    same(generate(model, chat.inputs(), past_key_values=cache), generate(model, chat.inputs()))


def test_embeddings_of_the_whole_chat_go_on(few):
    cache, said = first_turn(few, FIRST)
    inputs = as_batch([longer(*row) for row in zip(FIRST, said, UNEVEN, strict=True)])
    wanted = generate(few, inputs).sequences[:, -NEW:]
    inputs["inputs_embeds"] = few.get_input_embeddings()(inputs.pop("input_ids"))
    assert generate(few, inputs, past_key_values=copy.deepcopy(cache)).sequences.tolist() == wanted.tolist()
    mask = torch.ones(3, cache.num_text + 2, dtype=torch.long)
    with pytest.raises(UserError, match="those of the whole chat"):
        generate(few, {"inputs_embeds": inputs["inputs_embeds"][:, :2], "attention_mask": mask}, past_key_values=cache)


@pytest.mark.parametrize("method", ["casa", "insertion"])
def test_the_loop_of_transformers_own_guide(method):
    """An empty DynamicCache, the processor's inputs of the whole chat each time, the answer's text in the chat."""
    model, processor = tiny_casa(method=method), tiny_processor()
    pixels = torch.randint(
        0, 255, (2, 56, 84, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    ).numpy()
    # letters alone, which are the same tokens when they are read again
    special = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL]
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": special}
    cache, chat = DynamicCache(config=model.config), []
    for words, picture in (("what is it", pixels[0]), ("and now", None), ("and this one", pixels[1])):
        shown = [] if picture is None else [{"type": "image", "image": picture}]
        chat.append({"role": "user", "content": [*shown, {"type": "text", "text": words}]})
        # a random model says special tokens too, which are to stay tokens
        asked = {"add_generation_prompt": True, "sanitize_control_tokens": False}
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, **asked)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        found = model.generate(**inputs, **how, past_key_values=cache)
        assert found.tolist() == model.generate(**inputs, **how).tolist()
        assert cache.get_seq_length() == found.shape[1] - 1
        said = processor.decode(found[0, inputs["input_ids"].shape[1] :])
        chat.append({"role": "assistant", "content": [{"type": "text", "text": said}]})


def test_an_empty_cache_of_transformers_is_filled(few):
    cache, inputs = DynamicCache(config=few.config), FIRST[0].inputs()
    with torch.no_grad():
        output = few(**inputs, past_key_values=cache)
    assert output.past_key_values is cache
    assert cache.get_seq_length() == 5
    chat = longer(FIRST[0], (), UNEVEN[0])
    same(generate(few, chat.inputs(), past_key_values=cache), generate(few, chat.inputs()))
    for other in (DynamicCache(config=few.config, offloading=True), (), "dynamic"):
        with pytest.raises(UserError, match="past_key_values must come from"):
            few(**inputs, past_key_values=other)


def test_what_does_not_go_on_is_refused(few):
    cache, said = first_turn(few, FIRST[:1])
    chat = longer(FIRST[0], said[0], UNEVEN[0])
    whole = chat.inputs()
    for inputs, how, words in (
        (FIRST[0].inputs(), {}, "the cache holds 8 tokens and input_ids 5"),
        ({"input_ids": whole["input_ids"][:, :8]}, {}, r"cache.crop\(-1\) takes the last one back"),
        ({"input_ids": whole["input_ids"].repeat(2, 1)}, {}, "the cache holds 1 rows and input_ids 2"),
        ({}, {}, "gone on from with input_ids"),
        (whole, {"use_cache": False}, "gone on from with use_cache=True"),
        (whole | {"attention_mask": torch.ones(1, 3)}, {}, "attention_mask has 3 columns; give 13"),
        (whole | {"input_ids": whole["input_ids"].flip(1)}, {}, "row 0 has another token than the cache at place 0"),
        (whole | few.picked(whole, [0, 2, 3, 4]), {}, "1 images stand before the new text of row 0"),
        (whole | {"image_positions": whole["image_positions"] + torch.tensor([1, 0])}, {}, "stands in row 1"),
        (whole | {"image_positions": whole["image_positions"][1:]}, {}, "5 images but 4 image_positions"),
        (whole, {"prefill_chunk_size": 2}, "leave prefill_chunk_size out"),
    ):
        with pytest.raises(UserError, match=words):
            generate(few, inputs, past_key_values=cache, **how)
    # and the cache goes on as if nothing had been asked
    same(generate(few, whole, past_key_values=cache), generate(few, whole))


def test_assisted_decoding_begins_with_an_empty_cache(casa_of):
    model = casa_of("parallel")
    cache, said = first_turn(model, FIRST[:1])
    inputs = longer(FIRST[0], said[0], UNEVEN[0]).inputs()
    for how in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny_text_model().eval()}):
        with pytest.raises(UserError, match="assisted decoding begins with an empty cache"):
            generate(model, inputs, past_key_values=cache, **how)
