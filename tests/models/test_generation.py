"""generate, as in transformers: greedy, sampling, beams; cached or not; images stay with their rows."""

import pytest
import torch

from casa.errors import UserError
from casa.testing import TinySample, as_batch, tiny_casa

ROWS = (
    TinySample((5, 9, 17, 4, 33), ((2, 2, 3), (4, 1, 2)), seed=11),
    TinySample((7, 30, 11), (), seed=12),
    TinySample((40, 6, 13, 22), ((0, 2, 2), (0, 1, 1)), seed=13),
)
NEW = 5


def generate(model, inputs, **how):
    """New tokens only; no stop token, so that all rows are of one length."""
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | how
    return model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]


def by_hand(model, sample):
    """Greedy tokens from one full pass per token."""
    ids = sample.ids
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(**TinySample(ids, sample.pictures, sample.seed).inputs(), use_cache=False).logits
        ids = (*ids, int(logits[0, -1].argmax()))
    return list(ids[-NEW:])


@pytest.mark.slow
def test_greedy_is_the_best_token_each_time_cached_or_not(model):
    sample = ROWS[0]
    wanted = by_hand(model, sample)
    assert generate(model, sample.inputs())[0].tolist() == wanted
    assert generate(model, sample.inputs(), use_cache=False)[0].tolist() == wanted


@pytest.mark.slow
def test_a_batch_is_each_row_alone(model):
    together = generate(model, as_batch(ROWS))
    assert together.tolist() == [generate(model, row.inputs())[0].tolist() for row in ROWS]


def test_images_change_what_is_said(few):
    sample = ROWS[0]
    other = TinySample(sample.ids, sample.pictures, seed=99)
    scores = [
        few.generate(
            **s.inputs(), max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_scores=True
        ).scores
        for s in (sample, other)
    ]
    for one, another in zip(*scores, strict=False):
        assert not torch.allclose(one, another)


def test_sampling_is_the_same_cached_or_not_and_among_the_likeliest(few):
    found = []
    for cached in (True, False):
        torch.manual_seed(5)
        found.append(generate(few, as_batch(ROWS), do_sample=True, top_k=8, use_cache=cached))
    assert torch.equal(*found)
    for row, new in zip(ROWS, found[0].tolist(), strict=True):
        with torch.no_grad():
            logits = few(**TinySample((*row.ids, *new), row.pictures, row.seed).inputs(), use_cache=False).logits[0]
        likeliest = logits[len(row.ids) - 1 : -1].topk(8).indices
        assert all(token in some for token, some in zip(new, likeliest.tolist(), strict=True))


@pytest.mark.slow
def test_beams_of_a_batch_are_those_of_each_row(model):
    together = generate(model, as_batch(ROWS), num_beams=3)
    assert together.tolist() == [generate(model, row.inputs(), num_beams=3)[0].tolist() for row in ROWS]


def test_beams_are_the_same_without_a_cache(few):
    found = [generate(few, as_batch(ROWS), num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


def test_one_beam_of_three_is_scored_as_one_pass_scores_it(few, close):
    """The images a beam was generated with are those of its own row."""
    sample = ROWS[2]
    output = few.generate(
        **sample.inputs(), max_new_tokens=NEW, do_sample=False, eos_token_id=None, num_beams=3,
        num_return_sequences=3, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3
    for ids, score in zip(output.sequences.tolist(), output.sequences_scores, strict=True):
        with torch.no_grad():
            logits = few(**TinySample(tuple(ids), sample.pictures, sample.seed).inputs()).logits[0]
        chosen = logits[len(sample.ids) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(ids[-NEW:])[:, None])
        torch.testing.assert_close(score.double(), chosen.sum(), rtol=1e-5, atol=1e-5)


def test_several_answers_per_row_see_their_rows_images(few):
    torch.manual_seed(3)
    found = generate(few, as_batch(ROWS), do_sample=True, top_k=1, num_return_sequences=2)
    greedy = generate(few, as_batch(ROWS))
    assert found.tolist() == greedy.repeat_interleave(2, dim=0).tolist()


def test_images_are_encoded_once_for_all_beams(casa_of):
    model, calls = casa_of("parallel"), []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    try:
        generate(model, as_batch(ROWS), num_beams=3)
    finally:
        hook.remove()
    assert len(calls) == 1


def test_text_only_generation_is_the_backbones(casa_of):
    from casa.testing import tiny_text_model

    ids = torch.tensor([[5, 9, 17]])
    wanted = tiny_text_model().eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    found = casa_of("parallel").generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_generation_goes_on_from_a_cache_with_a_new_image(model):
    """All ids so far are given, as in transformers, and image_positions count in them (see test_second_turn)."""
    whole = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 1, 2), (5, 2, 2)), seed=21)
    first, second = whole.calls([4])
    with torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
    assert second["image_positions"].tolist() == [[0, 1]]
    inputs = {**second, "input_ids": whole.inputs()["input_ids"], "image_positions": torch.tensor([[0, 5]])}
    found = generate(model, inputs, past_key_values=cache)
    assert found[0].tolist() == by_hand(model, whole)
    assert cache.num_text == 7 + NEW - 1


def test_a_cache_of_generate_serves_the_next_turn(few):
    sample = TinySample((5, 9, 17, 4), ((1, 2, 2),), seed=22)
    cache = few.new_cache()
    said = few.generate(**sample.inputs(), past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=None)
    turn = torch.cat([said, torch.tensor([[30, 31]])], dim=1)
    found = generate(few, {"input_ids": turn}, past_key_values=cache)
    assert found[0].tolist() == by_hand(few, TinySample(tuple(turn[0].tolist()), sample.pictures, sample.seed))


def test_stop_tokens_end_a_row_and_pad_it():
    model = tiny_casa()
    free = generate(model, as_batch(ROWS))
    stop = int(free[0, 1])
    found = generate(model, as_batch(ROWS), eos_token_id=stop, pad_token_id=0)
    said = free[0].tolist().index(stop) + 1
    assert found[0].tolist() == [*free[0, :said].tolist(), *[0] * (found.shape[1] - said)]


def test_wrong_places_in_generate_are_refused(few):
    with pytest.raises(UserError, match="out of range"):
        generate(few, ROWS[0].inputs() | {"image_positions": torch.tensor([(0, 2), (0, 9)])})
