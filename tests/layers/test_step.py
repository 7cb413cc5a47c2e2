"""Rotary positions are the backbone's own, add up, and can be moved after the fact."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from casa.layers import Rotation, Turner
from casa.testing import tiny_casa, tiny_text_model

SCALINGS = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128},
}


def exact(base=10000.0, scale=1.0):
    """Rotary factors in float64, of heads of 8 channels."""

    def factors(positions):
        turns = positions[:, None].double() * base ** (-torch.arange(4, dtype=torch.float64) / 4)
        angles = torch.cat([turns, turns], dim=-1)
        return Rotation(angles.cos() * scale, angles.sin() * scale)

    return factors


def test_it_turns_as_the_backbone_does():
    model = tiny_casa()
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    positions = torch.tensor([0, 3, 4, 100, 7])
    rotary = model.decoder.rotaries([0], torch.device("cpu"), torch.float64)[0]
    assert rotary is not None
    turn = rotary(positions)
    wanted, _ = apply_rotary_pos_emb(x[None].transpose(1, 2), x[None].transpose(1, 2), turn.cos[None], turn.sin[None])
    assert torch.equal(turn(x), wanted.transpose(1, 2)[0])


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("distance", [-5, 0, 9])
def test_turning_a_key_is_rotating_it_elsewhere(scale, distance):
    rotary = exact(scale=scale)
    x, positions = torch.randn(6, 2, 8, dtype=torch.float64), torch.tensor([5, 6, 7, 8, 9, 20])
    moved = Turner(rotary)(rotary(positions)(x), distance)
    torch.testing.assert_close(moved, rotary(positions + distance)(x), rtol=1e-12, atol=1e-12)


def test_scores_depend_on_the_distance_alone():
    rotary = exact()
    query, key = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def score(q, k):
        return (rotary(torch.tensor([q]))(query) * rotary(torch.tensor([k]))(key)).sum()

    torch.testing.assert_close(score(7, 3), score(1_000_007, 1_000_003), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(score(7, 3), score(7, 4))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_backbones_keep_packed_pieces_and_single_equal(scaling):
    from casa import FusionConfig, adapt
    from casa.testing import TinySample, tiny_encoder

    text = tiny_text_model(rope_parameters=SCALINGS[scaling])
    model = adapt(text, FusionConfig(history=1), vision=tiny_encoder()).eval()
    sample = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))
    with torch.no_grad():
        whole = model(**sample.inputs()).logits
        cache, pieces = None, []
        for call in sample.calls([3, 4, 6]):
            output = model(**call, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
