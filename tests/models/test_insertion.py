"""The insertion baseline is transformers' own forward over text and image embeddings in one stream."""

import torch

from casa.testing import TinySample, as_batch, tiny_casa

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((0, 1, 2), (2, 2, 3), (2, 1, 1), (7, 1, 2)), seed=4)


def stream(model, sample):
    """(1, S, d) embeddings of text and images in order, and the places of the text tokens."""
    inputs = sample.inputs()
    text = model.get_input_embeddings()(inputs["input_ids"])[0]
    features = model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
    grids = [(rows, columns) for _, rows, columns in sample.pictures]
    images = model.projector(features, grids).split([rows * columns for rows, columns in grids])
    parts, places, slot = [], [], 0
    for index in range(len(text) + 1):
        for picture, image in zip(sample.pictures, images, strict=True):
            if picture[0] == index:
                parts.append(image)
                slot += len(image)
        if index < len(text):
            parts.append(text[index : index + 1])
            places.append(slot)
            slot += 1
    return torch.cat(parts)[None], places


@torch.no_grad()
def test_it_is_a_plain_pass_over_the_merged_stream():
    model = tiny_casa(method="insertion")
    embeddings, places = stream(model, SAMPLE)
    assert embeddings.shape[1] == 7 + SAMPLE.image_tokens
    wanted = model.backbone(inputs_embeds=embeddings).logits[:, places]
    found = model(**SAMPLE.inputs()).logits
    assert found.shape == (1, 7, 61), "logits at text positions only"
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    last = model(**SAMPLE.inputs(), logits_to_keep=2).logits
    torch.testing.assert_close(last, wanted[:, -2:], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_later_calls_continue_the_stream():
    model = tiny_casa(method="insertion")
    more = TinySample((*SAMPLE.ids, 40, 41, 42), (*SAMPLE.pictures, (8, 2, 2)), SAMPLE.seed)
    embeddings, places = stream(model, more)
    wanted = model.backbone(inputs_embeds=embeddings).logits[0, places]
    cache, found = None, []
    for call in more.calls([7, 8]):
        output = model(**call, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0])
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_rows_with_different_images_are_padded_to_one_stream():
    model = tiny_casa(method="insertion")
    rows = [SAMPLE, TinySample((7, 8, 9)), TinySample((10, 11, 12, 13), ((4, 3, 3),), seed=5)]
    logits = model(**as_batch(rows)).logits
    for row, sample in zip(logits, rows, strict=True):
        torch.testing.assert_close(row[-len(sample.ids) :], model(**sample.inputs()).logits[0], rtol=1e-10, atol=1e-10)


def test_no_fusion_layers_are_made():
    model = tiny_casa(method="insertion")
    assert not model.fused_blocks
    assert not list(model.casa_layers)
