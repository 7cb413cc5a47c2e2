"""Nothing later reaches anything earlier, and no row, sample or window touches one it must not touch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from casa.testing import TinySample, as_batch, as_packed, tiny_casa
from casa.testing.drawn import SEVERAL, texts

TEXT = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 2), (5, 1, 3)), seed=1)


def followed(past, future):
    """One text of both; pictures stand before the same tokens as they did."""
    later = tuple((len(past.ids) + place, rows, columns) for place, rows, columns in future.pictures)
    return TinySample(past.ids + future.ids, past.pictures + later, past.seed)


def heard(model, inputs, which):
    """Some of the logits, and how much each patch (P, channels) moves them."""
    pixels = inputs.pop("pixel_values").requires_grad_()
    logits = which(model(pixel_values=pixels, **inputs).logits)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), pixels)[0]


@pytest.mark.slow
@torch.no_grad()
def test_no_future_token_changes_an_earlier_logit(model, close):
    wanted = model(**TEXT.inputs()).logits
    for changed in range(1, len(TEXT.ids)):
        ids = (*TEXT.ids[:changed], 60, *TEXT.ids[changed + 1 :])
        found = model(**TinySample(ids, TEXT.pictures, TEXT.seed).inputs()).logits
        close(found[:, :changed], wanted[:, :changed])
        assert not torch.allclose(found[:, changed], wanted[:, changed])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("picture", "tokens", "place"), [(0, slice(0, 16), 2), (1, slice(16, 28), 5)])
def test_no_future_frame_changes_an_earlier_logit(model, close, picture, tokens, place):
    inputs = TEXT.inputs()
    wanted = model(**inputs).logits
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][tokens] += 1
    found = model(**inputs).logits
    close(found[:, :place], wanted[:, :place])
    changed = (found - wanted).abs().amax(-1)[0] > 1e-6
    assert changed[place:].all(), "text behind a frame sees it, in its window or through self-attention"


@torch.no_grad()
def test_no_gradient_flows_from_an_earlier_logit_to_a_later_frame(model):
    inputs = TEXT.inputs()
    with torch.enable_grad():
        pixels = inputs.pop("pixel_values").requires_grad_()
        model(pixel_values=pixels, **inputs).logits[:, 4].sum().backward()
    model.zero_grad()
    assert not pixels.grad[16:].any()
    assert pixels.grad[:16].abs().amin(-1).max() > 0


# a picture of the past stands before one of its tokens, which sees it
@pytest.mark.slow
@SEVERAL
@given(past=texts(fewest=1, behind=False), futures=st.tuples(texts(fewest=1), texts(fewest=1)))
def test_no_future_whatever_changes_what_is_before_it(few, close, past, futures):
    """Other text and other pictures from a token on, and the gradients of their pixels."""
    found = []
    for number, future in enumerate(futures):
        inputs = followed(past, future).inputs()
        inputs["pixel_values"][4 * past.image_tokens :] += number
        logits, gradient = heard(few, inputs, lambda logits: logits[:, : len(past.ids)])
        seen, unseen = gradient.split([4 * past.image_tokens, 4 * future.image_tokens])
        assert not unseen.any()
        assert all(patches.any() for patches in seen.split([4 * r * c for _, r, c in past.pictures]))
        found.append(logits)
    close(*found)


@pytest.mark.slow
@SEVERAL
@given(mine=texts(fewest=1, behind=False), others=st.tuples(texts(fewest=1), texts(fewest=1)), first=st.booleans())
def test_no_row_touches_another_whatever_it_holds(few, close, mine, others, first):
    found = []
    for other in others:
        rows = [mine, other] if first else [other, mine]
        logits, gradient = heard(few, as_batch(rows), lambda logits: logits[int(not first), -len(mine.ids) :])
        parts = gradient.split([4 * row.image_tokens for row in rows])
        assert parts[int(not first)].any()
        assert not parts[int(first)].any()
        found.append(logits)
    close(*found)


@torch.no_grad()
def test_no_row_touches_another(model, close):
    other = TinySample((40, 41, 42, 43), ((1, 1, 2),), seed=2)
    changed = TinySample((50, 51, 52, 53), ((0, 2, 1),), seed=5)
    first, second = (model(**as_batch([TEXT, sample])).logits for sample in (other, changed))
    close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


@pytest.mark.slow
@torch.no_grad()
def test_no_packed_sample_touches_another(model, close):
    other = TinySample((40, 41, 42, 43), ((1, 1, 2),), seed=2)
    changed = TinySample((50, 51, 52, 53), ((1, 2, 1),), seed=5)
    for order in (lambda x: [TEXT, x], lambda x: [x, TEXT]):
        first, second = (model(**as_packed(order(x))).logits[0] for x in (other, changed))
        mine = slice(0, 7) if order(0)[0] is TEXT else slice(4, 11)
        close(first[mine], second[mine])


@torch.no_grad()
@pytest.mark.parametrize(
    ("history", "split", "seen"), [(0, "image", 1), (1, "image", 2), (-1, "image", 3), (0, "sample", 3)]
)
def test_how_many_windows_back_a_layer_sees(history, split, seen):
    """Of three frames, the last text token's CASA update hears exactly the visible ones."""
    model = tiny_casa(placement="replace", layers=[2], history=history, split=split)
    inputs = TinySample((5, 6, 7, 8, 9, 10), ((1, 1, 1), (3, 1, 1), (4, 1, 1)), seed=8).inputs()
    with torch.enable_grad():
        pixels = inputs.pop("pixel_values").requires_grad_()
        model(pixel_values=pixels, **inputs).logits[0, -1].sum().backward()
    model.zero_grad()
    heard = [bool(grad.any()) for grad in pixels.grad.split(4)]
    assert heard == [number >= 3 - seen for number in range(3)]
