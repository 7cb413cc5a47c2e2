"""Budgets against published counts, PyTorch's own counter, real caches and arithmetic by hand."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Siglip2VisionConfig, SiglipVisionConfig

from casa.analysis.budget import (
    Scene,
    budget_of,
    budgets,
    fused_token_bytes,
    readable,
    tables,
    text_cache_bytes,
    text_token_bytes,
    variants,
)
from casa.analysis.flops import (
    attention_flops,
    blocks_of,
    connect_flops,
    frame_flops,
    frame_of,
    token_flops,
    tower_flops,
)
from casa.analysis.published_models import SHAPES, shapes_of
from casa.errors import UserError
from casa.models import FusionConfig, adapt
from casa.models.adapt import skeleton
from casa.models.image_processing_casa import image_processor_for
from casa.testing import (
    TinySample,
    tiny_backbone,
    tiny_casa,
    tiny_casa_over,
    tiny_encoder,
    tiny_images,
    tiny_text_model,
)
from casa.vision import new_encoder

FP64 = Scene(dtype=torch.float64)
VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}


@pytest.mark.parametrize(
    ("name", "text", "tower"),
    [
        # text parameters in all; the model cards of Qwen2.5-VL say 3.75 B and 8.29 B with the tower
        ("helium-2b", 2_023_868_416, None),
        ("helium-2b-preview", 2_172_643_840, None),
        ("qwen2_5-vl-3b", 3_085_938_688, 668_684_288),
        ("qwen2_5-vl-7b", 7_615_616_512, 676_550_144),
    ],
)
def test_parameters_of_published_models(name, text, tower):
    config, separate = shapes_of(name, published=True)
    model = skeleton(config, FusionConfig(method="insertion"), separate)
    parts = budget_of(model, "insertion").parts
    assert parts["text model"] == text
    assert (separate is None) == (tower is not None)
    assert parts["image encoder"] == (tower or 668_684_288)


def test_the_papers_stream_of_helium():
    """Paper, section 5: 256 turns of 896 px and 18 tokens; insertion 34.2 GiB and CASA 6.4 GiB, weights included."""
    config, tower = shapes_of("helium-2b", published=True)
    methods = {"insertion": FusionConfig(method="insertion"), "casa": FusionConfig()}
    insertion, casa = budgets(config, tower, methods, Scene(frames=(256, 512)))
    gib = 2**30
    assert (insertion.weight_bytes + insertion.moments[0].cache_bytes) / gib == pytest.approx(34.2, rel=0.03)
    assert (insertion.weight_bytes + insertion.moments[1].cache_bytes) / gib == pytest.approx(63.2, rel=0.03)
    # measured peaks have work space in them too
    assert (casa.weight_bytes + casa.moments[0].cache_bytes) / gib == pytest.approx(6.4, rel=0.04)
    assert (casa.weight_bytes + casa.moments[1].cache_bytes) / gib == pytest.approx(6.8, rel=0.04)


def test_a_tiny_model_by_hand():
    """Two numbers of each kind, from the config of the tiny Llama and its tower (width 16, 24 out, 28 px a token)."""
    model = tiny_casa(placement="parallel", every=2)  # blocks 0, 1, 2: a layer in block 1
    budget = budget_of(model, "x", Scene(56, 84, frames=(1, 3), text_per_frame=5, dtype=torch.float32))
    layer = 32 * 32 * 2 + 32 * 16 * 2  # q, o and k, v
    projector = 2 * 24 + (24 + 18) * 32 + 32 + 32 * 32 + 32
    assert budget.new == layer + projector
    assert budget.frozen == 0
    assert budget.parameters == sum(p.numel() for p in model.parameters())
    assert budget.weight_bytes == 4 * budget.parameters
    assert budget.gradient_bytes == 4 * budget.parameters
    assert budget.moment_bytes == 8 * budget.parameters
    assert budget.master_bytes == 0
    assert budget.frame_tokens == 2 * 3
    assert budget.text_token_bytes == 3 * 2 * 16 * 4
    assert budget.window_token_bytes == 2 * 16 * 4
    assert budget.frame_bytes == 6 * 2 * 16 * 4
    assert budget.moments[0].cache_bytes == 5 * 3 * 128 + 6 * 128 + 5 * 128
    assert budget.moments[1].cache_bytes == 15 * 3 * 128 + 6 * 128 + 5 * 128
    block = layer + 3 * 32 * 48
    tower = 2 * 24 * (3 * 14 * 14 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24)) + 2 * 6 * (64 * 64 + 64 * 24)
    # 4 x 6 patches are one window of 8 x 8, so windowed and full attention are alike
    tower += 2 * 4 * 24 * 24 * 16
    projected = 2 * 6 * ((24 + 18) * 32 + 32 * 32)
    assert budget.moments[0].frame_flops == tower + projected + 2 * 6 * (2 * 32 * 16)
    attention = 3 * 4 * 15 * 32 + 4 * (6 + 5) * 32
    assert budget.moments[1].token_flops == 2 * (3 * block + layer + 61 * 32) + attention


def test_master_copies_are_for_narrow_weights_that_are_trained():
    model = tiny_casa_over("qwen2_5_vl").requires_grad_(False)
    model.casa_layers.requires_grad_(True)
    budget = budget_of(model, "x", Scene(dtype=torch.bfloat16))
    assert budget.existing == 0
    assert budget.new == sum(p.numel() for p in model.casa_layers.parameters())
    assert budget.master_bytes == 4 * budget.new
    assert budget.gradient_bytes == 2 * budget.new
    assert budget.weight_bytes == 2 * budget.parameters


KINDS = ["llama", "gemma3_text", "qwen2_5_vl", "qwen3_vl", "smolvlm"]
FUSIONS = [
    {},
    {"placement": "replace", "every": 2},
    {"method": "cross_attention", "layers": (0, 2)},
    {"method": "cross_attention", "placement": "replace", "layers": (1,)},
    {"method": "insertion"},
    {"history": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_cache_bytes_are_those_of_a_real_cache(kind, fusion):
    model = tiny_casa_over(kind, **fusion)
    frame = frame_of(model, 56, 56)
    pictures = [(2, 2, 2), (5, 2, 2)] if kind != "smolvlm" else [(2, 4, 4), (5, 4, 4)]
    inputs = pixels_for(kind, TinySample(tuple(range(3, 12)), tuple(pictures)))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    blocks, size = blocks_of(model), 8
    inserted = fusion.get("method") == "insertion"
    tokens = 9 + (2 * frame.tokens if inserted else 0)
    assert cache.text_bytes == text_token_bytes(blocks, size) * tokens == text_cache_bytes(blocks, tokens, size)
    if inserted:
        assert cache.image_bytes == fused_token_bytes(blocks, size) == 0
        return
    images = (1 + fusion.get("history", 0)) * frame.tokens
    budget = budget_of(model, "x", FP64)
    assert cache.image_bytes == fused_token_bytes(blocks, size) * images
    # the last picture stands before text token 5 of 9
    assert cache.num_bytes - cache.text_bytes - cache.image_bytes == budget.window_token_bytes * 4


def pixels_for(kind, sample):
    """Inputs of a sample; SmolVLM's tower takes squares of 56 px instead of patches."""
    inputs = sample.inputs()
    if kind == "smolvlm":
        count = len(sample.pictures)
        inputs["pixel_values"] = torch.randn(count, 3, 56, 56, dtype=torch.float64)
        inputs["image_grid_thw"] = torch.tensor([(1, 4, 4)] * count)
    return inputs


def test_a_sliding_window_bounds_the_text_cache():
    model = tiny_casa_over("gemma3_text")  # local, global, local, with 64 tokens in sight
    with torch.no_grad():
        cache = model(input_ids=torch.full((1, 100), 5), use_cache=True).past_key_values
    assert cache.text_bytes == text_cache_bytes(blocks_of(model), 100, 8)
    assert cache.text_bytes < 100 * text_token_bytes(blocks_of(model), 8)


def counted(call):
    """What PyTorch's counter sees, attention included (its fused kernels for the CPU it does not know).

    Rotary positions are left out: transformers 5.17 makes their angles with a product of matrices.
    """
    # a matrix times a vector, which decoding is made of, is nothing that the counter knows
    known = {
        torch.ops.aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
        torch.ops.aten.addmv: lambda plus, matrix, *_, **__: 2 * math.prod(matrix),
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    angles = [ops for name, ops in counter.get_flop_counts().items() if name.endswith(("rotary_emb", "rotary_pos_emb"))]
    return counter.get_total_flops() - sum(sum(ops.values()) for ops in angles)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_tower_flops_against_the_counter(kind):
    model = tiny_casa_over(kind)
    if kind == "smolvlm":
        frame, pixels = frame_of(model, 56, 56), {"pixel_values": torch.randn(1, 3, 56, 56, dtype=torch.float64)}
        pixels["image_grid_thw"] = torch.tensor([(1, 4, 4)])
    else:
        frame, pixels = frame_of(model, 9 * 28, 11 * 28), tiny_images([(9, 11)])
    assert counted(lambda: model.encode_images(**pixels)) == tower_flops(model.encoder, frame)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    "fusion",
    [*FUSIONS[:5], {"update_images": True}, {"compressor": "pixel_shuffle:2"}, {"compressor": "q_former:3"}],
    ids=str,
)
def test_flops_of_a_frame_and_a_token_against_the_counter(kind, fusion):
    # the counter's hooks want no leaves with gradients
    model = tiny_casa_over(kind, **fusion).requires_grad_(False)
    frame = frame_of(model, 6 * 28, 8 * 28)
    first = TinySample(tuple(range(3, 10)), ((2, 6, 8),)).inputs()
    with torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
    inserted = fusion.get("method") == "insertion"
    before = 7 + (frame.tokens if inserted else 0)
    # the next token of the window that is open, its sixth
    token = counted(lambda: model(input_ids=torch.tensor([[4]]), past_key_values=cache))
    images = 0 if inserted else frame.tokens
    assert token == token_flops(model, before + 1, 6, images)
    # a second frame, and the first token behind it
    second = TinySample((5,), ((0, 6, 8),), seed=9).inputs()
    both = counted(lambda: model(**second, past_key_values=cache))
    after = before + 1 + (frame.tokens if inserted else 0)
    expected = frame_flops(model, frame, before + 1) + token_flops(model, after + 1, 1, images)
    if inserted:
        # in one call with the token behind them, inserted images are scored against it too, and masked
        expected += sum(attention_flops(frame.tokens, 1, block.query) for block in blocks_of(model))
    assert both == expected


@pytest.mark.parametrize(
    "config",
    [
        SiglipVisionConfig(image_size=56, vision_use_head=False, **VIT),
        Siglip2VisionConfig(num_patches=36, vision_use_head=False, **VIT),
    ],
    ids=["siglip", "siglip2"],
)
def test_separate_towers_against_the_counter_and_the_processor(config):
    model = adapt(tiny_text_model(), vision=new_encoder(config).double())
    frame = frame_of(model, 120, 90)
    picture = Image.new("RGB", (90, 120))
    pixels = image_processor_for(config)(images=picture, return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, frame.rows, frame.columns]]
    found = counted(lambda: model.requires_grad_(False).encode_images(**pixels))
    # from transformers 5.24 on, SigLIP2 fits its positions to a picture by a product, and not by interpolation
    fitted = 2 * frame.tokens * getattr(config, "num_patches", 0) * config.hidden_size
    assert found - tower_flops(model.encoder, frame) in (0, fitted)


@pytest.mark.parametrize(("height", "width"), [(896, 896), (45, 400), (70, 70), (41, 43)])
def test_frames_are_rounded_as_the_processor_does(height, width):
    model = tiny_casa()
    pixels = image_processor_for(model.config.vision_config)(images=Image.new("RGB", (width, height)))
    frame = frame_of(model, height, width)
    assert pixels["image_grid_thw"].tolist() == [[1, frame.rows, frame.columns]]


def test_flops_of_a_vlms_connector():
    model = tiny_casa_over("smolvlm")
    frame = frame_of(model, 1000, 10)  # the tower takes any picture as a square of 56 px
    assert (frame.patches, frame.connected, frame.tokens) == (16, 4, 4)
    features = torch.randn(16, 16, dtype=torch.float64)
    assert counted(lambda: model.image_tokens(features, [(4, 4)])) == connect_flops(model, frame)


def test_compressors_change_what_a_frame_is():
    sizes = {}
    for spec in (None, "pool:2", "pixel_shuffle:3", "q_former:5"):
        sizes[spec] = frame_of(tiny_casa(compressor=spec), 5 * 28, 7 * 28).tokens
    assert sizes == {None: 35, "pool:2": 12, "pixel_shuffle:3": 6, "q_former:5": 5}


def test_a_picture_of_no_token_is_refused():
    with pytest.raises(UserError, match="less than one image token"):
        frame_of(tiny_casa(), 10, 500)


@pytest.mark.parametrize("bad", [{"height": 0}, {"text_per_frame": 0}, {"frames": (1, 0)}, {"frames": ()}])
def test_scenes_that_show_nothing(bad):
    with pytest.raises(UserError, match="1 or more"):
        Scene(**bad)


def tiny_configs():
    return tiny_backbone("llama").config, tiny_encoder().config


def test_every_method_stands_beside_the_others():
    found = budgets(*tiny_configs(), variants(["pool:2"], FusionConfig(every=3)), Scene(56, 56, (1, 2)))
    names = [budget.name for budget in found]
    # three blocks have no fourth
    assert "CASA ∨, every 4th" not in names
    assert names[0] == "insertion"
    assert names[-3:] == ["insertion, pool:2", "CASA ⊕, pool:2", "yours"]
    assert len(names) == 11
    by_name = {budget.name: budget for budget in found}
    gated, plain = by_name["cross-attention, tanh"], by_name["cross-attention"]
    assert gated.new == plain.new + 3
    assert by_name["CASA ⊕, shared (D1)"].new == by_name["insertion"].new
    assert by_name["CASA ⊕"].moments[0].frame_flops < by_name["CASA ⊕, images updated (D4)"].moments[0].frame_flops
    # each has both frames in sight, and only the new one
    kept, one = by_name["CASA ⊕, all images seen (D5)"].moments[1], by_name["CASA ⊕"].moments[1]
    assert kept.cache_bytes - one.cache_bytes == by_name["CASA ⊕"].frame_bytes
    assert kept.token_flops > one.token_flops
    assert by_name["insertion"].frame_stays
    assert not plain.window_token_bytes
    json.dumps([budget.to_dict() for budget in found])


def test_a_known_method_is_not_repeated_as_yours():
    assert "yours" not in variants(yours=FusionConfig(share_weights=True))


def test_a_wrong_choice_of_ones_own_is_refused():
    with pytest.raises(UserError, match="every=9"):
        budgets(*tiny_configs(), {"yours": FusionConfig(every=9)})


def test_tables_show_every_method_and_unit():
    found = budgets(*tiny_configs(), scene=Scene(56, 56, (1, 2)))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(tables(found))
    text = console.export_text()
    for budget in found:
        assert text.count(f" {budget.name} ") == 3
    assert all(word in text for word in ("KiB", "FLOP", "after 1 frame ", "after 2 frames", "for ever"))


@pytest.mark.parametrize(
    ("count", "unit", "step", "text"),
    [
        (3_754_622_976, "", 1000, "3.75 G"),
        (999_700, "", 1000, "1.00 M"),
        (0, "B", 1024, "0 B"),
        (114_688, "B", 1024, "112 KiB"),
        (1023, "B", 1024, "1.00 KiB"),
        (65e9, "FLOP", 1000, "65 GFLOP"),
        (12_340, "", 1000, "12.3 k"),
    ],
)
def test_readable_numbers(count, unit, step, text):
    assert readable(count, unit, step) == text


def test_shapes_are_found_or_refused(tmp_path):
    with pytest.raises(UserError, match="qwen2_5-vl-3b"):
        shapes_of("qwen", published=True)
    tiny_backbone("qwen2_5_vl").config.save_pretrained(tmp_path / "vlm")
    config, tower = shapes_of(tmp_path / "vlm" / "config.json")
    assert (config.model_type, tower) == ("qwen2_5_vl", None)
    with pytest.raises(UserError, match="of its own"):
        shapes_of(tmp_path / "vlm", tmp_path / "vlm")
    tiny_backbone("llama").config.save_pretrained(tmp_path / "text")
    assert shapes_of(tmp_path / "text", tmp_path / "vlm")[1].out_hidden_size == 32
    assert shapes_of(tmp_path / "text")[1].out_hidden_size == 2048
    (tmp_path / "text" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        shapes_of(tmp_path / "text")


def test_every_shape_is_one_that_casa_can_adapt():
    assert all(shapes_of(name, published=True) for name in SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["helium-2b", "qwen2_5-vl-3b", "qwen2_5-vl-7b"])
def test_the_written_figures_are_those_of_today(shape):
    """docs/results holds what the command gives now, whatever the commit that it was written at."""
    written = json.loads((Path(__file__).parents[2] / "docs" / "results" / f"dry-run-{shape}.json").read_text())
    assert written["dry_run"] == shape
    height, width = written["scene"]["image_size"]
    scene = Scene(height, width, tuple(written["scene"]["frames"]), written["scene"]["text_per_frame"])
    by_name = {method["name"]: method for method in written["methods"]}
    assert list(by_name) == list(variants(["q_former:128", "q_former:32"]))
    chosen = {name: variants()[name] for name in ("insertion", "CASA ⊕", "CASA ∨, every 4th")}
    for budget in budgets(*shapes_of(shape, published=True), chosen, scene):
        assert by_name[budget.name] == json.loads(json.dumps(budget.to_dict())), budget.name
