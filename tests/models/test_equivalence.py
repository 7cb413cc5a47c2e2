"""One meaning, however the text is handed over: packed, padded, in pieces, token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from casa.testing import TinySample, as_batch, as_packed
from casa.testing.drawn import SEVERAL, texts, texts_in_pieces


def in_calls(model, calls, grad=False):
    """Logits of all calls, and the cache they leave."""
    cache, logits = None, []
    with torch.set_grad_enabled(grad):
        for call in calls:
            output = model(**call, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def the_same(model, found, wanted, close):
    """Logits of two ways, and for a loss in which each counts differently the gradients of all weights."""
    close(found, wanted)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    ours, theirs = gradients(model, (found * weights).sum()), gradients(model, (wanted * weights).sum())
    for name in ours.keys() | theirs.keys():
        # a part that no text needs is left out by one way, and zero in the other
        zero = torch.zeros_like(model.get_parameter(name))
        close(ours.get(name, zero), theirs.get(name, zero))


@pytest.mark.slow
@torch.no_grad()
def test_packed_samples_are_each_sample_alone(model, samples, close):
    packed = model(**as_packed(samples)).logits[0]
    close(packed, torch.cat([model(**sample.inputs()).logits[0] for sample in samples]))


@pytest.mark.slow
@torch.no_grad()
def test_packed_rows_with_padding_behind_are_each_sample_alone(model, samples, close):
    rows = [samples[:2], samples[2:]]
    parts = [as_packed(row) for row in rows]
    length = max(part["input_ids"].shape[1] for part in parts) + 2

    def padded(name):
        return torch.cat([torch.nn.functional.pad(part[name], (0, length - part[name].shape[1])) for part in parts])

    inputs = {name: torch.cat([part[name] for part in parts]) for name in ("pixel_values", "image_grid_thw")}
    inputs["image_positions"] = torch.cat(
        [part["image_positions"] + torch.tensor([n, 0]) for n, part in enumerate(parts)]
    )
    inputs["attention_mask"] = (padded("input_ids") > 0).long()
    logits = model(input_ids=padded("input_ids"), position_ids=padded("position_ids"), use_cache=False, **inputs).logits
    for row, (part, found) in enumerate(zip(rows, logits, strict=True)):
        alone = torch.cat([model(**sample.inputs()).logits[0] for sample in part])
        close(found[: len(alone)], alone)
        assert len(found) > len(alone), f"row {row} has no padding behind it"


@pytest.mark.slow
def test_packed_gradients_are_the_sum_of_each_sample_alone(model, samples, close):
    weights = torch.randn(sum(len(s.ids) for s in samples), 61, dtype=torch.float64)
    together = gradients(model, (model(**as_packed(samples)).logits[0] * weights).sum())
    parts = weights.split([len(s.ids) for s in samples])
    alone = gradients(
        model, sum((model(**s.inputs()).logits[0] * w).sum() for s, w in zip(samples, parts, strict=True))
    )
    assert together.keys() == alone.keys() == {name for name, _ in model.named_parameters()}
    for name in together:
        close(together[name], alone[name])


@pytest.mark.slow
@torch.no_grad()
def test_left_padded_batch_is_each_row_alone(model, samples, close):
    logits = model(**as_batch(samples)).logits
    for row, sample in zip(logits, samples, strict=True):
        close(row[-len(sample.ids) :], model(**sample.inputs()).logits[0])


@pytest.mark.slow
@torch.no_grad()
def test_left_padded_batch_goes_on_as_each_row_alone(model, samples, close):
    batch = as_batch(samples)
    cache = model(**batch, use_cache=True).past_key_values
    mask = batch["attention_mask"]
    alone = [in_calls(model, [sample.inputs()])[1] for sample in samples]
    for new in ([8, 9, 10, 11], [12, 13, 14, 15]):
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
        logits = model(
            input_ids=torch.tensor(new)[:, None], attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits
        for row, (token, own) in enumerate(zip(new, alone, strict=True)):
            close(logits[row], model(input_ids=torch.tensor([[token]]), past_key_values=own).logits[0])


@pytest.mark.slow
@torch.no_grad()
def test_token_by_token_is_one_pass(model, samples, close):
    for sample in samples:
        whole = model(**sample.inputs()).logits
        close(in_calls(model, sample.calls(range(1, len(sample.ids))))[0], whole)


def test_token_by_token_with_gradients_is_one_pass(few, samples, close):
    """Gradients keep the step that writes in place away."""
    sample = samples[0]
    calls = sample.calls(range(1, len(sample.ids)))
    the_same(few, in_calls(few, calls, grad=True)[0], few(**sample.inputs()).logits, close)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("late", [False, True], ids=["at the end of a call", "at the start of a call"])
def test_prefill_then_tokens_is_one_pass(model, samples, close, late):
    for sample, prompts in ((samples[0], (2, 4, 5)), (samples[2], (3,))):
        whole = model(**sample.inputs()).logits
        for prompt in prompts:
            close(in_calls(model, sample.calls(range(prompt, len(sample.ids)), late))[0], whole)


@pytest.mark.slow
@SEVERAL
@given(drawn=texts_in_pieces())
def test_pieces_of_any_size_are_one_pass(few, close, drawn):
    sample, cuts, late = drawn
    with torch.no_grad():
        close(in_calls(few, sample.calls(cuts, late))[0], few(**sample.inputs()).logits)


@pytest.mark.slow
@SEVERAL
@given(drawn=texts_in_pieces())
def test_pieces_of_any_size_have_the_gradients_of_one_pass(few, close, drawn):
    sample, cuts, late = drawn
    the_same(few, in_calls(few, sample.calls(cuts, late), grad=True)[0], few(**sample.inputs()).logits, close)


@pytest.mark.slow
@SEVERAL
@given(rows=st.lists(texts(), min_size=2, max_size=3))
def test_any_left_padded_batch_is_each_row_alone(few, close, rows):
    logits = few(**as_batch(rows)).logits
    found = torch.cat([row[-len(sample.ids) :] for row, sample in zip(logits, rows, strict=True)])
    the_same(few, found, torch.cat([few(**sample.inputs()).logits[0] for sample in rows]), close)


# a picture behind all text of a sample would be the next one's
@pytest.mark.slow
@SEVERAL
@given(samples=st.lists(texts(behind=False), min_size=1, max_size=3))
def test_any_texts_packed_are_each_alone(few, close, samples):
    packed = few(**as_packed(samples)).logits[0]
    the_same(few, packed, torch.cat([few(**sample.inputs()).logits[0] for sample in samples]), close)


@torch.no_grad()
def test_a_picture_at_the_border_of_packed_samples_is_the_next_ones(few, close):
    first, second = TinySample((5, 6, 7), ((3, 2, 2),), seed=9), TinySample((8, 9))
    packed = few(**as_packed([first, second])).logits[0]
    close(packed, few(**as_packed([TinySample((5, 6, 7)), TinySample((8, 9), ((0, 2, 2),), seed=9)])).logits[0])
    close(packed[3:], few(**TinySample((8, 9), ((0, 2, 2),), seed=9).inputs()).logits[0])


@pytest.mark.slow
@torch.no_grad()
def test_a_stream_of_frames_is_one_interleaved_pass(model, close):
    """Each call ends the old window with what was said, shows a frame, and goes on token by token."""
    stream = TinySample(tuple(range(3, 27)), tuple((place, 2, 2) for place in (3, 4, 9, 15, 21)), seed=50)
    cuts = [5, 6, 7, 8, 11, 12, 13, 14, 17, 18, 22, 23]
    close(in_calls(model, stream.calls(cuts))[0], model(**stream.inputs()).logits)


@torch.no_grad()
def test_images_with_no_text_between_calls_join_one_window(fused, close):
    """A call that ends in an image, and one that opens with another, show both to the text behind them."""
    sample = TinySample((5, 6, 7, 8, 9), ((3, 1, 2), (3, 2, 2)), seed=60)
    first, second = sample.calls([3])[0], sample.calls([3], late=True)[1]
    first_image, second_image = (tiny["pixel_values"].split([8, 16]) for tiny in (first, second))
    first |= {"pixel_values": first_image[0], "image_grid_thw": first["image_grid_thw"][:1]}
    first["image_positions"] = first["image_positions"][:1]
    second |= {"pixel_values": second_image[1], "image_grid_thw": second["image_grid_thw"][1:]}
    second["image_positions"] = second["image_positions"][1:]
    logits, cache = in_calls(fused, [first, second])
    close(logits, fused(**sample.inputs()).logits)
    assert cache.windows.windows[0][-1].images == 6


@pytest.mark.slow
@torch.no_grad()
def test_rows_get_images_in_different_calls(model, close):
    """In the second call only row 1 has a new image; in the third only row 0."""
    rows = [
        TinySample((5, 6, 7, 8, 9, 10, 11), ((1, 2, 2), (5, 1, 3)), seed=70),
        TinySample((15, 16, 17, 18, 19, 20, 21), ((3, 1, 2),), seed=80),
    ]
    cuts = [2, 4]
    parts = [row.calls(cuts) for row in rows]
    calls = []
    for pair in zip(*parts, strict=True):
        call = {"input_ids": torch.cat([part["input_ids"] for part in pair])}
        shown = [part for part in pair if "pixel_values" in part]
        if shown:
            call |= {name: torch.cat([part[name] for part in shown]) for name in ("pixel_values", "image_grid_thw")}
            places = [part["image_positions"] + torch.tensor([n, 0]) for n, part in enumerate(pair) if part in shown]
            call["image_positions"] = torch.cat(places)
        calls.append(call)
    calls.append({"input_ids": torch.tensor([[12], [22]])})
    logits, _ = in_calls(model, calls)
    whole = [TinySample((*row.ids, new), row.pictures, row.seed) for row, new in zip(rows, (12, 22), strict=True)]
    close(logits, torch.cat([model(**row.inputs()).logits for row in whole]))
