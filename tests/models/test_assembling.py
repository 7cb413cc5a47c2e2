"""A processor for every known tower: the pixels its own processor would give, and the same ones after a round trip."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    PreTrainedTokenizerFast,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from casa.errors import UserError
from casa.models import CasaProcessor, processor_for
from casa.models.image_processing_casa import image_processor_for
from casa.testing import tiny_backbone, tiny_processor, tiny_tokenizer
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


COLOURS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7], "rescale_factor": 0.002, "resample": 0}
# what a tower's own file may say, as published models have it, and the class of transformers that reads it
FILES = {
    "qwen2_vl": (Qwen2VLImageProcessorPil, {"min_pixels": 32 * 32, "max_pixels": 48 * 48, "patch_size": 8}),
    "qwen2_5_vl": (Qwen2VLImageProcessorPil, {"size": {"shortest_edge": 1024, "longest_edge": 4096}, "patch_size": 8}),
    "qwen3_vl": (Qwen2VLImageProcessorPil, {"size": {"shortest_edge": 256, "longest_edge": 2048}, "patch_size": 8}),
    "siglip": (SiglipImageProcessorPil, {"size": {"height": 32, "width": 32}}),
    "siglip2": (Siglip2ImageProcessorPil, {"max_num_patches": 20, "patch_size": 8}),
    "smolvlm": (SmolVLMImageProcessorPil, {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}),
}


def tower_folder(kind, folder, inside=False):
    """Config and own processor file of a tower, the file as one by itself or a part of the whole processor's."""
    settings = {"image_processor_type": f"{FILES[kind][0].__name__[:-3]}", **COLOURS, **FILES[kind][1]}
    CONFIGS[kind].save_pretrained(folder)
    if inside:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings, "image_seq_len": 4}))
        settings = {"image_mean": [0.5] * 3}  # what an older program left there; transformers does not look at it
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def same_pictures(one, other):
    found, wanted = (made(images=PICTURES[:3], return_tensors="pt") for made in (one, other))
    return all(torch.equal(found[name], wanted[name]) for name in ("pixel_values", "image_grid_thw"))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("inside", [False, True])
def test_a_towers_own_file_rules_wherever_it_lies(kind, inside, tmp_path, hub):
    folder = tower_folder(kind, tmp_path / "tower", inside)
    images = image_processor_for(folder)
    own = FILES[kind][0](**COLOURS, **FILES[kind][1]) if kind != "smolvlm" else None
    if kind.startswith("qwen"):
        assert same_pictures(images, own)
    elif kind == "siglip":
        assert torch.equal(*(made(PICTURES[:3], return_tensors="pt")["pixel_values"] for made in (images, own)))
    elif kind == "siglip2":
        wanted = own(PICTURES[:3], return_tensors="pt")
        found = images(PICTURES[:3], return_tensors="pt")
        assert found["image_grid_thw"][:, 1:].tolist() == wanted["spatial_shapes"].tolist()
        assert torch.equal(found["pixel_values"], wanted["pixel_values"][wanted["pixel_attention_mask"].bool()])
    assert list(images.image_std) == COLOURS["image_std"]
    assert not same_pictures(images, image_processor_for(CONFIGS[kind])), "the kin's usual settings are others"
    name = hub(folder)
    text = tiny_processor().tokenizer
    shutil.copytree(folder, tmp_path / "whole" / "vision")
    for there in (
        image_processor_for(str(folder)),
        image_processor_for(name),
        image_processor_for(tmp_path / "whole", subfolder="vision"),
        processor_for(text, name).image_processor,
    ):
        assert same_pictures(there, images)


def test_a_revision_has_its_own_settings(tmp_path, hub):
    first, second = (tower_folder("siglip", tmp_path / name) for name in ("one", "two"))
    (second / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3}))
    name = hub(first)
    hub(second, "v2")
    assert list(image_processor_for(name).image_mean) == COLOURS["image_mean"]
    assert list(image_processor_for(name, revision="v2").image_mean) == [0.4] * 3
    assert list(processor_for(tiny_processor().tokenizer, name, revision="v2").image_processor.image_mean) == [0.4] * 3


def test_an_encoder_that_was_read_brings_the_file_it_was_read_with(tmp_path, hub):
    folder = tower_folder("siglip", tmp_path / "tower")
    new_encoder(CONFIGS["siglip"]).save_pretrained(folder)
    wanted = image_processor_for(folder)
    tower = SiglipVisionModel.from_pretrained(folder)
    cached = SiglipVisionModel.from_pretrained(hub(folder))
    for vision in (tower, tower.config, cached, cached.config):
        assert same_pictures(image_processor_for(vision), wanted)
    shutil.rmtree(folder)
    assert same_pictures(image_processor_for(tower), image_processor_for(CONFIGS["siglip"]))


def test_a_caller_and_casa_tiny_have_the_last_word(tmp_path):
    folder = tower_folder("qwen2_5_vl", tmp_path / "tower")
    assert dict(image_processor_for(folder, max_pixels=2048).size) == {"shortest_edge": 1024, "longest_edge": 2048}
    own = CasaProcessor.from_pretrained("casa-tiny").image_processor
    assert image_processor_for("casa-tiny").to_dict() == own.to_dict()
    assert processor_for(tiny_processor().tokenizer, "casa-tiny").image_processor.to_dict() == own.to_dict()


def test_a_tower_out_of_a_whole_model_keeps_its_settings(tmp_path):
    config = tiny_backbone("qwen2_5_vl").config
    config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(COLOURS | {"min_pixels": 784, "max_pixels": 7840}))
    images = image_processor_for(tmp_path)
    assert dict(images.size) == {"shortest_edge": 784, "longest_edge": 7840}
    assert images.patch_size == config.vision_config.patch_size
    assert list(images.image_std) == COLOURS["image_std"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"size": {"shortest_edge": 224}}, True),  # a side in px, as CLIP's processor has it
        ({"size": {"min_pixels": 1024, "max_pixels": 4096}}, False),
        ({"max_pixels": 4096}, False),
        ({"size": {"longest_edge": 2048}}, True),
        ({"size": 224, "image_mean": None}, True),
    ],
)
def test_sizes_are_read_for_what_they_are(settings, kept, tmp_path):
    CONFIGS["qwen2_vl"].save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    images, usual = image_processor_for(tmp_path), image_processor_for(CONFIGS["qwen2_vl"])
    assert (dict(images.size) == dict(usual.size)) == kept
    assert kept or images.size["longest_edge"] == 4096
    assert images.image_mean == usual.image_mean


def test_what_cannot_be_known_is_said(tmp_path, hub):
    folder = tower_folder("siglip", tmp_path / "tower")
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be read; fetch it again"):
        image_processor_for(folder)
    (folder / "preprocessor_config.json").write_text('{"min_pixels": 9, "max_pixels": 3}')
    assert image_processor_for(folder).size["height"] == 32, "squares have no such bounds"
    (folder / "preprocessor_config.json").unlink()
    assert same_pictures(image_processor_for(folder), image_processor_for(CONFIGS["siglip"]))
    with pytest.warns(UserWarning, match="the cache holds no picture settings of someone/model; those usual"):
        image_processor_for(hub(folder))
    with pytest.raises(UserError, match="the config of someone/else cannot be read"):
        image_processor_for("someone/else")


def test_a_whole_processor_from_a_subfolder_and_a_hubs_cache(tmp_path, hub):
    made = processor_for(tiny_processor().tokenizer, "casa-tiny")
    made.save_pretrained(tmp_path / "all" / "processor")
    LlamaConfig().save_pretrained(tmp_path / "all" / "processor")
    name = hub(tmp_path / "all")
    hub(tmp_path / "all" / "processor", "v2")
    wanted = made(images=PICTURES[0], text=f"a{made.image_token}")
    for loaded in (
        CasaProcessor.from_pretrained(tmp_path / "all", subfolder="processor"),
        CasaProcessor.from_pretrained(name, subfolder="processor"),
        CasaProcessor.from_pretrained(name, revision="v2"),
    ):
        found = loaded(images=PICTURES[0], text=f"a{made.image_token}")
        assert all(found[name].equal(wanted[name]) for name in wanted)
    with pytest.raises(UserError, match=r"all has no processor_config\.json"):
        CasaProcessor.from_pretrained(tmp_path / "all")


def test_a_tokenizer_keeps_its_special_tokens():
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a", eos_token="b")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "<frame>"]})
    processor_for(tokenizer, CONFIGS["siglip"])
    assert set(tokenizer.all_special_tokens) == {"a", "b", "<tool>", "<frame>", "<image>"}


def test_without_a_template_each_turn_is_a_line_and_answers_end():
    tokenizer = tiny_tokenizer("gpt2")
    turns = [("user", "one"), ("assistant", "2"), ("user", "three")]
    chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    text = processor_for(tokenizer, CONFIGS["siglip"]).apply_chat_template(chat, add_generation_prompt=True)
    assert text == "User: one\nAssistant: 2</s>\nUser: three\nAssistant:"


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="squares of one size; leave out max_pixels"):
        image_processor_for(CONFIGS["siglip"], max_pixels=1000)
    with pytest.raises(UserError, match="less than one patch; give 64 or more"):
        image_processor_for(CONFIGS["siglip2"], max_pixels=63)
    with pytest.raises(UserError, match="no image encoder"):
        processor_for(tiny_processor().tokenizer, LlamaConfig())
