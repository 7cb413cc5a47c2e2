"""Device maps: parts on disk answer as parts in memory do; blocks are never cut in two; fusion stands on one device."""

import pytest
import torch
from torch import nn

from casa import CasaForConditionalGeneration
from casa.errors import UserError
from casa.models.passes import check_one_device
from casa.testing import BACKBONES, TinySample, tiny_casa, tiny_casa_over

accelerate = pytest.importorskip("accelerate")

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))
WHOLE = {
    "cpu": "cpu",
    "auto": "auto",
    "a dict": {"": "cpu"},
}
# with 9 weights per fused layer of which none are in memory
SPLIT = {
    "fusion on disk": {"backbone": "cpu", "vision": "cpu", "projector": "cpu", "casa_layers": "disk"},
    "tower on disk": {"backbone": "cpu", "vision": "disk", "projector": "disk", "casa_layers": "cpu"},
    "blocks here and there": {
        "backbone.model.embed_tokens": "cpu",
        "backbone.model.layers.0": "cpu",
        "backbone.model.layers.1": "disk",
        "backbone.model.layers.2": "disk",
        "backbone.model.norm": "disk",
        "backbone.model.rotary_emb": "cpu",
        "backbone.lm_head": "cpu",
        "vision": "cpu",
        "projector": "cpu",
        "casa_layers.0": "disk",
        "casa_layers.1": "cpu",
        "casa_layers.2": "disk",
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, folder = tiny_casa(), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def said(model):
    inputs = SAMPLE.inputs()
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return model(**inputs).logits, tokens.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("where", WHOLE | SPLIT)
def test_a_placed_model_answers_as_a_plain_one(saved, tmp_path, where):
    model, folder = saved
    placed = CasaForConditionalGeneration.from_pretrained(
        folder, device_map=(WHOLE | SPLIT)[where], offload_folder=tmp_path
    ).eval()
    assert any(p.is_meta for p in placed.parameters()) == (where in SPLIT)
    for (logits, tokens), (wanted, words) in ((said(placed), said(model)), (said(placed), said(model))):
        torch.testing.assert_close(logits, wanted, rtol=1e-12, atol=1e-12)
        assert tokens == words
    # nothing that was fetched stays
    assert any(p.is_meta for p in placed.parameters()) == (where in SPLIT)


@pytest.mark.parametrize("kind", BACKBONES)
def test_blocks_and_fusion_layers_are_never_split(kind):
    model = tiny_casa_over(kind)
    sizes = accelerate.utils.compute_module_sizes(model)
    room = sizes[""] // 2
    where = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": room, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert set(where.values()) == {"cpu", "disk"}
    prefix = f"backbone.{model.decoder.stack_at}.layers"
    whole = [f"{prefix}.{index}" for index in range(3)] + [f"casa_layers.{index}" for index in range(3)]
    for name in whole:
        assert not [key for key in where if key.startswith(f"{name}.")], name
    assert model._no_split_modules >= set(model.backbone._no_split_modules)


def test_fusion_on_several_devices_is_refused():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, device="meta")]
    check_one_device(layers)
    elsewhere = type("Elsewhere", (nn.Module,), {"parameters": lambda self: [_On("cuda:1")]})()
    with pytest.raises(UserError, match=r"several devices \(cpu, cuda:1\); give a device_map that keeps"):
        check_one_device([*layers, elsewhere])


class _On:
    """A weight on a device that this machine lacks."""

    def __init__(self, device):
        self.device = torch.device(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "auto", None], ids=str)
@torch.no_grad()
def test_dtype_on_load(saved, dtype):
    model, folder = saved
    loaded = CasaForConditionalGeneration.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype})).eval()
    # as it was saved, unless told otherwise
    wanted = torch.float64 if dtype in ("auto", None) else dtype
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert loaded.dtype == loaded.config.dtype == wanted
    logits = loaded(**SAMPLE.inputs()).logits
    assert logits.dtype == wanted
    worst = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}[wanted]
    torch.testing.assert_close(logits.double(), model(**SAMPLE.inputs()).logits, rtol=worst, atol=worst)
