"""LoRA through PEFT: an adapter on a projection acts on text and on images alike, merges, and is saved by itself."""

import copy

import pytest
import torch

from casa.errors import UserError
from casa.models import freeze_backbone
from casa.testing import TinySample, tiny_casa_over

peft = pytest.importorskip("peft")

# PEFT asks by a name that transformers is about to leave behind
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))
KINDS = ["llama", "qwen2_5_vl"]
# projections of the fusion layers only, and everywhere
CHOICES = {
    "queries and values": r".*casa_layers\.\d+\.(q|v)_proj",
    "keys and values": r".*casa_layers\.\d+\.(k|v)_proj",
    "one layer's keys": r".*casa_layers\.1\.k_proj",
    "all attention": r".*(casa_layers\.\d+|self_attn)\.(q|k|v|o)_proj",
}


def with_lora(model, modules, **settings):
    torch.manual_seed(0)
    model.requires_grad_(False)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules, **settings)).eval()


def stirred(model):
    """Adapters start with no effect; this gives them one."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def logits(model, sample=SAMPLE, **how):
    return model(**sample.inputs(), **how).logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fusion", [{}, {"share_weights": True}, {"placement": "replace", "every": 2}, {"method": "insertion"}], ids=str
)
def test_an_adapter_is_its_weights_added(kind, fusion, close):
    """Text, cached image keys and all, in a model whose weights were changed by hand."""
    plain = tiny_casa_over(kind, **fusion)
    wrapped = stirred(with_lora(copy.deepcopy(plain), CHOICES["all attention"]))
    changed = copy.deepcopy(plain)
    touched = 0
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            touched += 1
            with torch.no_grad():
                changed.get_submodule(name).weight += module.get_delta_weight("default")
    assert touched == 4 * (3 if fusion else 6)
    close(logits(wrapped), logits(changed))
    assert float((logits(wrapped) - logits(plain)).abs().max()) > 1e-2


def test_an_adapter_on_keys_moves_what_images_are_found_by(close):
    """Of the images alone: text before them is the same, text behind them is not."""
    model = tiny_casa_over("llama", method="cross_attention")
    before = logits(model)
    wrapped = stirred(with_lora(model, CHOICES["one layer's keys"]))
    moved = (logits(wrapped) - before)[0].abs().amax(-1)
    assert float(moved[:2].max()) == 0
    assert float(moved[2:].min()) > 1e-6
    with wrapped.disable_adapter():
        close(logits(wrapped), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_trained_merged_saved_loaded(kind, choice, close, tmp_path):
    wrapped = with_lora(tiny_casa_over(kind), CHOICES[choice])
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    before = logits(wrapped)
    inputs = SAMPLE.inputs() | {"labels": SAMPLE.inputs()["input_ids"]}
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = wrapped.train()(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is None for name, p in wrapped.named_parameters() if name not in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    found = logits(wrapped.eval())
    assert float((found - before).abs().max()) > 1e-3
    # one pass, and piece by piece from a cache
    tokens = wrapped.generate(**SAMPLE.inputs(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_casa_over(kind), tmp_path).eval()
    close(logits(loaded), found)
    merged = wrapped.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    close(logits(merged), found)
    assert (
        merged.generate(**SAMPLE.inputs(), max_new_tokens=4, do_sample=False, eos_token_id=None).tolist()
        == tokens.tolist()
    )


def test_checkpointed_adapters_have_the_same_gradients():
    wrapped = stirred(with_lora(tiny_casa_over("qwen2_5_vl"), CHOICES["keys and values"])).train()

    def gradients():
        wrapped.zero_grad()
        wrapped(**SAMPLE.inputs(), labels=SAMPLE.inputs()["input_ids"]).loss.backward()
        return [p.grad.clone() for p in wrapped.parameters() if p.requires_grad]

    wanted = gradients()
    model = wrapped.base_model.model
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    for one, other in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_fusion_layers_can_be_trained_whole_beside_an_adapter(close):
    """Route b with a LoRA on the language model: PEFT keeps a copy of each fusion layer, and images go through it."""
    model = tiny_casa_over("qwen2_5_vl")
    before = logits(model)
    whole = [f"casa_layers.{index}" for index in range(3)]
    wrapped = with_lora(model, r".*language_model.*\.(q|v)_proj", modules_to_save=whole)
    close(logits(wrapped), before)
    with torch.no_grad():
        wrapped.base_model.model.casa_layers["1"].modules_to_save["default"].k_proj.weight += 0.5
    moved = (logits(wrapped) - before)[0].abs().amax(-1)
    assert float(moved[:2].max()) == 0
    assert float(moved[2:].min()) > 1e-6
    names = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("casa_layers.2.modules_to_save" in name for name in names)
    assert not any("original_module" in name for name in names)


def test_freezing_goes_with_adapters():
    model = tiny_casa_over("llama")
    freeze_backbone(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*mlp\.up_proj"))
    assert not any(p.requires_grad for name, p in wrapped.named_parameters() if "lora" not in name)


PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_virtual_tokens_before_the_text_are_refused_by_name(name):
    """They would move the text and not the places of its pictures."""
    sizes = {"num_layers": 3, "token_dim": 32, "num_attention_heads": 2, "num_transformer_submodules": 1}
    config = PROMPTS[name]()
    for key, value in sizes.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match=rf"{name}.*use one that changes weights: LoRA, DoRA, IA3"):
        peft.get_peft_model(tiny_casa_over("llama"), config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fusion", [{}, {"placement": "replace", "every": 2}, {"method": "insertion"}], ids=str)
def test_ia3_scales_text_and_images_alike(kind, fusion, close):
    model = tiny_casa_over(kind, **fusion)
    before = logits(model)
    attended = r".*(casa_layers\.\d+|self_attn)\.(k|v)_proj"
    fed = r".*mlp\.down_proj"
    config = peft.IA3Config(target_modules=f"{attended}|{fed}", feedforward_modules=fed)
    wrapped = peft.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "ia3_l" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    found = logits(wrapped)
    assert float((found - before).abs().max()) > 1e-2
    close(logits(wrapped.merge_and_unload()), found)
