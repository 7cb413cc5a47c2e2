"""A processor for every known tower: the pixels its own processor would give, and the same ones after a round trip."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, Siglip2VisionConfig, SiglipVisionConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from casa.errors import UserError
from casa.models import CasaProcessor, processor_for
from casa.models.assembling import image_processor_for
from casa.testing import tiny_processor
from casa.vision import encode, new_encoder, token_grids

VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
}
QWEN: dict[str, Any] = {"depth": 1, "num_heads": 2, "patch_size": 8}
CONFIGS = {
    "qwen2_vl": Qwen2VLVisionConfig(embed_dim=16, hidden_size=16, **QWEN),
    "qwen2_5_vl": Qwen2_5_VLVisionConfig(
        hidden_size=16, intermediate_size=24, out_hidden_size=16, window_size=32, fullatt_block_indexes=[0], **QWEN
    ),
    "qwen3_vl": Qwen3VLVisionConfig(
        hidden_size=16, intermediate_size=24, out_hidden_size=16, deepstack_visual_indexes=[0], **QWEN
    ),
    "siglip": SiglipVisionConfig(image_size=32, **VIT),
    "siglip2": Siglip2VisionConfig(num_patches=36, **VIT),
    "smolvlm": SmolVLMVisionConfig(image_size=32, **VIT),
    "idefics3": Idefics3VisionConfig(image_size=32, **VIT),
}


def _picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    values = np.random.default_rng(height + width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode=None)


PICTURES = [_picture(48, 32), _picture(20, 90), _picture(33, 33), _picture(40, 40, "L"), _picture(40, 24, "RGBA")]


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_every_tower_takes_what_its_processor_gives(config):
    torch.manual_seed(0)
    found = image_processor_for(config)(images=PICTURES, return_tensors="pt")
    assert set(found) == {"pixel_values", "image_grid_thw"}
    grid = found["image_grid_thw"]
    assert grid.dtype == torch.int64
    assert grid.shape == (len(PICTURES), 3)
    tokens = encode(new_encoder(config), found["pixel_values"], grid)
    assert len(tokens) == sum(rows * columns for rows, columns in token_grids(config, grid))
    assert tokens.isfinite().all()


def test_a_processor_is_the_same_after_a_round_trip(config, tmp_path):
    processor = processor_for(tiny_processor().tokenizer, config)
    processor.save_pretrained(tmp_path)
    loaded = CasaProcessor.from_pretrained(tmp_path)
    assert type(loaded.image_processor) is type(processor.image_processor)
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    for one in (loaded.image_processor, AutoImageProcessor.from_pretrained(tmp_path)):
        wanted, found = (made(images=PICTURES, return_tensors="pt") for made in (processor.image_processor, one))
        assert all(torch.equal(found[name], wanted[name]) for name in ("pixel_values", "image_grid_thw"))


def test_squares_are_those_of_siglip():
    config = CONFIGS["siglip"]
    found = image_processor_for(config)(images=PICTURES, return_tensors="pt")
    wanted = SiglipImageProcessorPil(size={"height": 32, "width": 32})(images=PICTURES, return_tensors="pt")
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])
    assert found["image_grid_thw"].tolist() == [[1, 4, 4]] * len(PICTURES)


def test_flexible_pictures_give_the_tokens_that_siglip2_itself_gives():
    config, pictures = CONFIGS["siglip2"], PICTURES[:3]
    torch.manual_seed(0)
    tower = new_encoder(config).double()
    found = image_processor_for(config)(images=pictures, return_tensors="pt")
    tokens = encode(tower, found["pixel_values"].double(), found["image_grid_thw"])
    own = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=36)(images=pictures, return_tensors="pt")
    wanted = tower(**own).last_hidden_state[own["pixel_attention_mask"].bool()]
    torch.testing.assert_close(tokens, wanted, rtol=1e-10, atol=1e-10)
    assert found["image_grid_thw"][:, 1:].tolist() == own["spatial_shapes"].tolist()
    assert len({tuple(row) for row in found["image_grid_thw"].tolist()}) == 3


def test_one_tile_is_the_one_of_smolvlm():
    config, picture = CONFIGS["smolvlm"], PICTURES[2]
    own = SmolVLMImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": 32}, max_image_size={"longest_edge": 32}
    )(images=[picture], return_tensors="pt")
    found = image_processor_for(config)(images=[picture], return_tensors="pt")
    assert torch.equal(found["pixel_values"], own["pixel_values"][0])


def test_colours_are_normalised_as_each_tower_was_trained():
    white = Image.new("RGB", (32, 32), "white")
    highest = {
        name: image_processor_for(config)(images=[white], return_tensors="pt")["pixel_values"].max().item()
        for name, config in CONFIGS.items()
    }
    # CLIP's blue: (1 - 0.408) / 0.276
    assert highest.pop("qwen2_vl") == highest.pop("qwen2_5_vl") == pytest.approx(2.1459, abs=1e-3)
    assert set(highest.values()) == {1.0}


@pytest.mark.parametrize(("name", "most"), [("qwen2_5_vl", 48 * 48), ("siglip2", 36 * 64)])
def test_max_pixels_bound_the_patches(name, most):
    big = _picture(300, 200)
    grid = image_processor_for(CONFIGS[name], max_pixels=most)(images=[big], return_tensors="pt")["image_grid_thw"]
    assert 0.5 * most < grid.prod().item() * 64 <= most


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="squares of one size; leave out max_pixels"):
        image_processor_for(CONFIGS["siglip"], max_pixels=1000)
    with pytest.raises(UserError, match="less than one patch; give 64 or more"):
        image_processor_for(CONFIGS["siglip2"], max_pixels=63)
    with pytest.raises(UserError, match="no image encoder"):
        processor_for(tiny_processor().tokenizer, LlamaConfig())
