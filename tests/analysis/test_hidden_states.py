"""The logit lens and the norms of image tokens against what is taken out of the model by hand."""

import pytest
import torch

from casa.analysis import image_norms, logit_lens
from casa.errors import UserError
from casa.testing import TinySample, as_batch, tiny_casa, tiny_casa_over

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((3, 2, 3), (5, 1, 2)))
TEXT = {"insertion": [0, 1, 2, 9, 10, 13, 14]}  # where text stands among the tokens of its images


@torch.no_grad()
@pytest.mark.parametrize("method", ["casa", "insertion"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2_5_vl"])
def test_the_lens_reads_each_block_through_the_head(kind, method):
    model, inputs = tiny_casa_over(kind, method=method), SAMPLE.inputs()
    states = []
    handles = [
        block.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for block in model.decoder.blocks
    ]
    logits = model(**inputs, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    lens = logit_lens(model, inputs, [2, 4, 6], best=4)
    place = torch.tensor(TEXT.get(method, range(7)))[[2, 4, 6]]
    assert lens.ids.shape == lens.probabilities.shape == (3, 3, 4)
    for layer, state in enumerate(states):
        seen = model.decoder.logits(model.decoder.stack.norm(state[:, place]))[0].float().softmax(-1)
        torch.testing.assert_close(lens.probabilities[layer], seen.topk(4).values)
        assert torch.equal(lens.ids[layer], seen.topk(4).indices)
        torch.testing.assert_close(lens.entropy[layer], -(seen * seen.log()).sum(-1))
    # the last block's guess is what the model says
    assert torch.equal(lens.ids[-1, :, 0], logits[[2, 4, 6]].argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("fusion", [{}, {"placement": "replace", "layers": [1]}, {"compressor": "pool:2"}], ids=str)
def test_norms_of_image_tokens_and_of_their_values(fusion):
    model, inputs = tiny_casa(**fusion), SAMPLE.inputs()
    norms = image_norms(model, inputs)
    features = model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
    tokens = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    torch.testing.assert_close(norms.tokens, torch.cat(tokens).norm(dim=-1).float())
    parts = model.image_keys_values(features, inputs["image_grid_thw"]).unflatten(
        -1, (len(model.fused_blocks), 2, 2, 8)
    )
    values = parts[:, :, 1].pow(2).sum(-1).mean(-1).sqrt().T
    torch.testing.assert_close(norms.layers, values.float())
    assert norms.blocks == model.fused_blocks
    assert norms.map(0).shape == norms.grids[0]
    assert norms.map(1, 0).flatten().tolist() == norms.layers[0, norms.images[1][0] :].tolist()


@torch.no_grad()
def test_under_insertion_image_tokens_have_a_norm_behind_every_block():
    model, inputs = tiny_casa(method="insertion"), SAMPLE.inputs()
    states = []
    for block in model.decoder.blocks:
        block.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
    model(**inputs, use_cache=False)
    found = states[:3]
    norms = image_norms(model, inputs)
    images = [3, 4, 5, 6, 7, 8, 11, 12]
    wanted = torch.stack([state.view(1, 15, -1)[0, images].norm(dim=-1) for state in found])
    torch.testing.assert_close(norms.layers, wanted.float())
    assert norms.images == ((0, 6), (6, 8))


def test_bad_requests_are_refused():
    model = tiny_casa()
    with pytest.raises(UserError, match="one text"):
        logit_lens(model, as_batch([SAMPLE, SAMPLE]), [0])
    with pytest.raises(UserError, match="no image"):
        image_norms(model, TinySample((5, 6)).inputs())
