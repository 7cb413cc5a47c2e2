"""Every known encoder gives what transformers' own forward gives, for one picture and for many at once."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeVisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from casa.errors import UserError
from casa.vision import (
    encode,
    encoder_class,
    extra_depths,
    is_known,
    load_encoder,
    new_encoder,
    output_width,
    spec_of,
    token_grids,
)
from casa.vision.encoder import SPECS
from casa.vision.page_encoder import PageEncoderConfig
from casa.vision.towers import PatchProduct

QWEN: dict[str, Any] = {"num_heads": 2, "patch_size": 4, "temporal_patch_size": 2}
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}
QWEN3 = QWEN | {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": 20,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 2],
}
CONFIGS = {
    "qwen2_vl_vision": lambda: Qwen2VLVisionConfig(depth=2, embed_dim=16, hidden_size=20, **QWEN),
    "qwen2_5_vl_vision": lambda: Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        out_hidden_size=20,
        window_size=16,
        fullatt_block_indexes=[1],
        **QWEN,
    ),
    "qwen3_vl_vision": lambda: Qwen3VLVisionConfig(**QWEN3),
    "qwen3_vl_moe_vision": lambda: Qwen3VLMoeVisionConfig(**QWEN3),
    "siglip_vision_model": lambda: SiglipVisionConfig(image_size=16, **VIT),
    "siglip2_vision_model": lambda: Siglip2VisionConfig(num_patches=16, **VIT),
    "smolvlm_vision": lambda: SmolVLMVisionConfig(image_size=16, **VIT),
    "idefics3_vision": lambda: Idefics3VisionConfig(image_size=16, **VIT),
    "casa_page_encoder": lambda: PageEncoderConfig(
        characters="ab", stem_sizes=(4, 6), hidden_size=8, dilations=(1, 2), token_size=(8, 8)
    ),
}
WIDTHS = {name: 20 if name.startswith("qwen") else 16 for name in CONFIGS} | {"casa_page_encoder": 2 * (8 + 3)}


def tiny_tower(name: str) -> Any:
    """A float64 tower with no weight near zero, so that every part of it matters."""
    torch.manual_seed(3)
    tower = new_encoder(CONFIGS[name]())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return tower.to(torch.float64).eval()


@pytest.fixture(scope="session")
def tower_of() -> Any:
    """The tower of a kind, made once; tests leave it as it was."""
    made: dict[str, Any] = {}

    def tower(name: str) -> Any:
        if name not in made:
            made[name] = tiny_tower(name)
        return made[name]

    return tower


@pytest.fixture(params=CONFIGS)
def tower(request: Any, tower_of: Any) -> Any:
    """Every kind in turn."""
    return tower_of(request.param)


def pictures_for(config: Any) -> list[tuple[Tensor, Tensor]]:
    """(pixel_values, image_grid_thw) of three pictures, of different sizes where the tower can see those."""
    generator = torch.Generator().manual_seed(5)
    kind = spec_of(config).pictures
    grids = (
        [(4, 4)] * 3
        if kind == "squares"
        else [(2, 6), (8, 4), (4, 4)]
        if kind == "patches"
        else [(3, 5), (1, 2), (4, 4)]
    )
    found = []
    for rows, columns in grids:
        if kind == "squares":
            shape = (1, 3, rows * 4, columns * 4)
        elif kind == "own":
            shape = (rows * columns, 3 * 8 * 8)
        else:
            shape = (rows * columns, 3 * 4 * 4 * (2 if kind == "patches" else 1))
        pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
        found.append((pixels, torch.tensor([[1, rows, columns]])))
    return found


def as_transformers_does(tower: Any, pixels: Tensor, grid: Tensor) -> Tensor:
    """The tokens of one picture by the tower's own forward, called as its own model calls it."""
    kind = spec_of(tower.config).pictures
    if kind == "patches":
        found = tower(pixels, grid_thw=grid)
        return torch.cat(
            [found.pooler_output, *(found.deepstack_features if extra_depths(tower.config) else ())], dim=1
        )
    if kind == "flexible":
        count = len(pixels)
        padded = torch.full((1, count + 3, pixels.shape[1]), 7.0, dtype=pixels.dtype)
        padded[0, :count] = pixels
        mask = (torch.arange(count + 3) < count)[None].int()
        return tower(padded, pixel_attention_mask=mask, spatial_shapes=grid[:, 1:]).last_hidden_state[0, :count]
    if kind == "own":
        _, rows, columns = grid[0].tolist()
        blocks = pixels.view(rows, columns, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(1, 3, rows * 8, columns * 8)
        cells = tower(blocks)
        known = tower.classifier(cells).softmax(1)
        return torch.cat([part.unflatten(3, (-1, 2)).permute(0, 2, 3, 4, 1).flatten(0, 2).flatten(1)
                          for part in (cells, known)], dim=1)  # fmt: skip
    if tower.config.model_type == "siglip_vision_model":
        return tower(pixel_values=pixels).last_hidden_state[0]
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    return tower(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state[0]


def test_every_family_is_tried_here():
    assert set(CONFIGS) == set(SPECS)


def test_pictures_together_are_the_pictures_alone_by_transformers(tower):
    pictures = pictures_for(tower.config)
    grid = torch.cat([one for _, one in pictures])
    found = encode(tower, torch.cat([pixels for pixels, _ in pictures]), grid)
    wanted = torch.cat([as_transformers_does(tower, *picture) for picture in pictures])
    assert found.dtype == torch.float64
    # order of sums only; a token in the wrong place is off by 0.1 and more
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    counts = [rows * columns for rows, columns in token_grids(tower.config, grid)]
    assert found.shape == (sum(counts), (1 + extra_depths(tower.config)) * output_width(tower.config))


def test_no_picture_touches_another(tower):
    pictures = pictures_for(tower.config)
    grid = torch.cat([one for _, one in pictures])
    before = encode(tower, torch.cat([pixels for pixels, _ in pictures]), grid)
    changed = [pictures[0][0] + 1.0, *(pixels for pixels, _ in pictures[1:])]
    after = encode(tower, torch.cat(changed), grid)
    rows, columns = token_grids(tower.config, grid)[0]
    first = rows * columns
    assert torch.equal(before[first:], after[first:])
    assert not torch.isclose(before[:first], after[:first]).all(dim=1).any()


def test_gradients_reach_the_pixels_and_the_first_weights(tower_of):
    for name in ("qwen3_vl_vision", "siglip2_vision_model"):
        tower = tower_of(name)
        pixels, grid = pictures_for(tower.config)[0]
        pixels.requires_grad_()
        encode(tower, pixels, grid).sum().backward()
        assert pixels.grad is not None
        assert pixels.grad.abs().min() > 0
        tower.zero_grad()


def test_widths_and_depths(tower):
    name = tower.config.model_type
    assert output_width(tower.config) == WIDTHS[name]
    assert extra_depths(tower.config) == (2 if name.startswith("qwen3") else 0)


def test_deep_stack_features_stand_after_the_token_itself(tower_of):
    tower = tower_of("qwen3_vl_vision")
    pixels, grid = pictures_for(tower.config)[0]
    own = tower(pixels, grid_thw=grid)
    parts = encode(tower, pixels, grid).chunk(3, dim=1)
    for part, wanted in zip(parts, (own.pooler_output, *own.deepstack_features), strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-12, atol=1e-12)


def test_squares_of_another_size_are_placed_by_interpolation(tower_of):
    tower = tower_of("siglip_vision_model")
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = encode(tower, pixels, torch.tensor([[1, 6, 6]] * 2))
    wanted = tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(found, wanted.flatten(0, 1), rtol=1e-12, atol=1e-12)


def test_no_pictures_are_no_tokens(tower):
    pixels, grid = pictures_for(tower.config)[0]
    none = encode(tower, pixels[:0], grid[:0])
    assert none.shape == (0, (1 + extra_depths(tower.config)) * output_width(tower.config))
    assert token_grids(tower.config, grid[:0]) == []


def test_grids_that_do_not_fit_the_pixels_are_refused(tower):
    pixels, grid = pictures_for(tower.config)[0]
    with pytest.raises(UserError, match="does not describe"):
        encode(tower, pixels, torch.cat([grid, grid]))
    with pytest.raises(UserError, match="frame by frame"):
        token_grids(tower.config, torch.tensor([[2, 4, 4]]))


def test_other_models_are_refused_with_the_known_ones_named():
    with pytest.raises(UserError, match=r"'llama' is no image encoder .* siglip2_vision_model"):
        output_width(LlamaConfig())
    assert not is_known(LlamaConfig())
    with pytest.raises(UserError, match="whole model; give its image encoder, a 'qwen2_5_vl_vision'"):
        new_encoder(Qwen2_5_VLConfig())
    with pytest.raises(UserError, match="NoneType"):
        encoder_class(None)


def test_an_encoder_is_loaded_from_its_own_folder(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    loaded, info = load_encoder(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert type(loaded) is type(tower)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    for name, weight in tower.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def _whole_models():
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 30,
    }
    pair = {name: value for name, value in text.items() if name != "num_key_value_heads"}
    yield SiglipModel(SiglipConfig(text_config=pair, vision_config=VIT | {"image_size": 16})), "vision_model"
    yield Siglip2Model(Siglip2Config(text_config=pair, vision_config=VIT | {"num_patches": 16})), "vision_model"
    tower = CONFIGS["qwen2_5_vl_vision"]().to_dict()
    yield Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=tower)), "model.visual"


def test_the_tower_of_a_whole_model_is_loaded_alone(tmp_path):
    for number, (whole, where) in enumerate(_whole_models()):
        whole.save_pretrained(tmp_path / str(number))
        loaded, info = load_encoder(tmp_path / str(number), output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
        wanted = whole.get_submodule(where).state_dict()
        assert loaded.state_dict().keys() == wanted.keys()
        assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in wanted.items())


def test_a_folder_without_an_image_encoder_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no image encoder"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("qwen")])
def test_patches_are_multiplied_as_the_convolution_would(name: str) -> None:
    tower = tiny_tower(name)
    (pixels, grid), *_ = pictures_for(tower.config)
    wanted = as_transformers_does(tower, pixels, grid)
    keys = list(tower.state_dict())
    torch.testing.assert_close(encode(tower, pixels, grid), wanted, rtol=1e-10, atol=1e-10)
    assert type(tower.patch_embed.proj) is PatchProduct
    assert list(tower.state_dict()) == keys
    tower.patch_embed.proj.__class__ = torch.nn.Conv3d
    torch.testing.assert_close(as_transformers_does(tower, pixels, grid), wanted)
