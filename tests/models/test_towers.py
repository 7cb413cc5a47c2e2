"""Any image encoder beside a text-only model: the same promises with SigLIP and SigLIP2 as with Qwen's towers."""

import pytest
import torch
from transformers import Siglip2VisionConfig, SiglipVisionConfig

from casa import CasaForConditionalGeneration, FusionConfig, adapt
from casa.models import freeze_backbone
from casa.testing import tiny_backbone
from casa.testing.tiny import spread
from casa.vision import new_encoder

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2, "patch_size": 14}
TOWERS = {
    "siglip": SiglipVisionConfig(**SMALL, image_size=56),
    "siglip2": Siglip2VisionConfig(**SMALL, num_patches=16),
}
IDS = torch.tensor([[5, 9, 17, 4, 33, 8, 21]])


@pytest.fixture(scope="module", params=TOWERS)
def tower(request):
    torch.manual_seed(1)
    return request.param, spread(new_encoder(TOWERS[request.param])).double()


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text"])
def model(request, tower):
    model = adapt(tiny_backbone(request.param), FusionConfig(), vision=tower[1]).eval()
    torch.manual_seed(2)
    spread(model.projector)
    return model


def pictures(kind, count):
    """Pictures of 4 x 4 patches, as the tower takes them."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, 3, 56, 56) if kind == "siglip" else (16 * count, 3 * 14 * 14)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}


@torch.no_grad()
def test_text_looks_at_their_tokens(tower, model, close):
    inputs = pictures(tower[0], 2) | {"input_ids": IDS, "image_positions": torch.tensor([[0, 2], [0, 5]])}
    whole = model(**inputs).logits
    assert float((whole - model(input_ids=IDS).logits)[0, 2:].abs().min(-1).values.max()) > 0
    one = {k: v[: len(v) // 2] for k, v in pictures(tower[0], 2).items()}
    first = model(input_ids=IDS[:, :4], image_positions=torch.tensor([[0, 2]]), use_cache=True, **one)
    two = {k: v[len(v) // 2 :] for k, v in pictures(tower[0], 2).items()}
    second = model(
        input_ids=IDS[:, 4:], image_positions=torch.tensor([[0, 1]]), past_key_values=first.past_key_values, **two
    )
    close(torch.cat([first.logits, second.logits], dim=1), whole)


@torch.no_grad()
def test_saved_is_loaded(tower, model, tmp_path):
    model.save_pretrained(tmp_path)
    again = CasaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_last_blocks_of_the_tower_can_be_trained(model):
    freeze_backbone(model, tower_blocks=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("vision.")}
    assert {name.split("layers.")[1][0] for name in trained} == {"3", "4"}
    model.requires_grad_(True)
