"""Inputs that cannot be meant are refused by name."""

import pytest
import torch

from casa import FusionConfig
from casa.errors import UserError
from casa.settings import build
from casa.testing import TinySample, as_batch, as_packed, tiny_casa

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))
LONGER = TinySample(tuple(range(3, 13)), ((4, 1, 2),))


def positions(*pairs):
    return {"image_positions": torch.tensor(pairs)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (positions((0, 2)), "2 images but 1 image_positions"),
        (positions((0, 2), (0, 5), (0, 6)), "2 images but 3 image_positions"),
        (positions((0, 5), (0, 2)), "out of order"),
        (positions((0, 2), (0, 8)), "index 8, out of range 0..7"),
        (positions((0, -1), (0, 2)), "index -1, out of range"),
        (positions((0, 2), (1, 2)), "row 1, but the batch has rows 0..0"),
        (positions((-1, 2), (0, 2)), "row -1"),
        ({"image_positions": torch.tensor([2, 5])}, "shape .* give .images, 2."),
        ({"image_positions": None}, "2 images but no image_positions"),
        ({"image_grid_thw": None}, "come with image_grid_thw"),
        ({"pixel_values": None}, "0 images but 2 image_positions"),
        ({"image_grid_thw": torch.tensor([(2, 4, 6), (1, 2, 4)])}, "2 frames; give a video frame by frame"),
        ({"attention_mask": torch.ones(1, 6)}, "must cover both"),
        ({"attention_mask": torch.ones(1, 8)}, "must cover both"),
        ({"attention_mask": torch.ones(2, 7)}, "must cover both"),
        ({"attention_mask": torch.ones(1, 1, 7, 7)}, "give .rows, cached and new tokens"),
        ({"position_ids": torch.arange(6)[None]}, "position_ids have shape"),
        ({"position_ids": torch.arange(7).expand(3, 1, 7)}, "position_ids have shape"),
        ({"position_ids": torch.arange(7).expand(2, 7)}, "position_ids have shape"),
        ({"inputs_embeds": torch.zeros(1, 7, 32, dtype=torch.float64)}, "not both"),
        ({"input_ids": None}, "not both"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_images_and_masks_that_do_not_fit(few, change, words):
    with pytest.raises(UserError, match=words):
        few(**SAMPLE.inputs() | change)


def test_features_that_do_not_fit_their_grid(few):
    inputs = SAMPLE.inputs()
    features = few.encode_images(inputs.pop("pixel_values"), inputs["image_grid_thw"])
    assert few(image_features=features, **inputs).logits.shape == (1, 7, 61)
    with pytest.raises(UserError, match="does not describe the 7 image tokens"):
        few(image_features=features[1:], **inputs)


def test_image_inside_left_padding(few):
    batch = as_batch([SAMPLE, LONGER])  # three tokens of padding before the first row
    for index in (0, 1, 2):
        batch["image_positions"][0, 1] = index
        with pytest.raises(UserError, match=f"index {index} of row 0, inside its padding"):
            few(**batch)
    batch["image_positions"][0, 1] = 3
    few(**batch)


def test_mask_in_a_later_call_covers_cache_and_new_tokens(few):
    cache = few(**SAMPLE.inputs(), use_cache=True).past_key_values
    token = torch.tensor([[7]])
    for length in (1, 7, 9, 19):
        with pytest.raises(UserError, match="must cover both"):
            few(input_ids=token, attention_mask=torch.ones(1, length), past_key_values=cache)
    few(input_ids=token, attention_mask=torch.ones(1, 8), past_key_values=cache)


def test_packed_rows_with_a_cache(few):
    packed = as_packed([SAMPLE, LONGER])
    with pytest.raises(UserError, match="packed rows cannot use a cache"):
        few(**packed | {"use_cache": True})
    cache = few(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(UserError, match="packed rows cannot use a cache"):
        few(**packed, past_key_values=cache)
    # use_cache defaults to the config's True: packing says no by itself
    del packed["use_cache"]
    assert few(**packed).past_key_values is None


def test_a_refused_call_leaves_the_cache_as_it_was(few, close):
    cache = few(**SAMPLE.inputs(), use_cache=True).past_key_values
    bad = LONGER.inputs() | positions((0, 11))
    with pytest.raises(UserError, match="out of range"):
        few(**bad, past_key_values=cache)
    assert cache.num_text == cache.get_seq_length() == 7
    with torch.no_grad():
        twin = few(**SAMPLE.inputs(), use_cache=True).past_key_values
        close(*(few(**LONGER.inputs(), past_key_values=c).logits for c in (cache, twin)))


def test_a_foreign_cache_is_refused(few, samples):
    from transformers import DynamicCache

    foreign = DynamicCache()
    foreign.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(UserError, match="must come from an earlier call of this model"):
        few(**SAMPLE.inputs(), past_key_values=foreign)


@pytest.mark.parametrize(
    ("fusion", "words"),
    [
        ({"method": "casas"}, "method is 'casas'; did you mean 'casa'"),
        ({"placement": "beside"}, "placement is 'beside'"),
        ({"split": "frame"}, "split is 'frame'"),
        ({"gate": "sigmoid"}, "gate is 'sigmoid'"),
        ({"gate": "tanh", "share_weights": True}, "a gate needs layers with weights of their own"),
        ({"every": 0}, "every is 0"),
        ({"history": -2}, "history is -2"),
        ({"compressor": "qformer"}, "did you mean 'q_former'"),
        ({"placement": "replace"}, "leaves no self-attention"),
        ({"placement": "replace", "layers": [0, 1, 2]}, "leaves no self-attention"),
        ({"layers": [3]}, "not all among the 3 blocks"),
        ({"layers": [-1]}, "not all among the 3 blocks"),
        ({"every": 4}, "no block gets a fusion layer"),
        ({"layers": []}, "no block gets a fusion layer"),
    ],
)
def test_fusions_that_make_no_sense(fusion, words):
    with pytest.raises(UserError, match=words):
        tiny_casa(**fusion)


def test_fusion_reads_back_what_it_wrote_and_refuses_unknown_keys():
    fusion = FusionConfig(placement="before", layers=(0, 2), history=-1)
    assert build(FusionConfig, fusion.to_dict()) == fusion
    with pytest.raises(UserError, match="did you mean 'placement'"):
        build(FusionConfig, {"placment": "before"})


def test_every_nth_block_counts_from_the_nth():
    assert FusionConfig(every=2).blocks(6) == (1, 3, 5)
    assert FusionConfig(every=4).blocks(9) == (3, 7)
    assert FusionConfig(layers=(4, 0)).blocks(6) == (0, 4)
