"""The trainer's arithmetic: groups and rates, accumulation, the schedule, precision, checkpointed blocks, averages."""

import pytest
import torch
from transformers import TrainerCallback

from casa.errors import UserError
from casa.testing import tiny_casa, tiny_casa_over
from casa.training.checkpoints import Ema
from casa.training.config import OptimisationSettings
from casa.training.optimizer import choose_trained, is_new, parameter_groups, set_precision


def test_new_and_existing_parameters_have_rates_of_their_own():
    model = tiny_casa()
    settings = OptimisationSettings(
        steps=10, lr_overrides={r"\.embed_tokens\.": 5e-6}, frozen=(r"^vision\.blocks\.0\.",)
    )
    choose_trained(model, settings)
    groups = {group["name"]: group for group in parameter_groups(model, settings)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "new": (1e-4, 0.05),
        "new, no decay": (1e-4, 0.0),
        "existing": (1e-5, 0.05),
        "existing, no decay": (1e-5, 0.0),
        r"\.embed_tokens\.": (5e-6, 0.05),
    }
    found = [id(p) for group in groups.values() for p in group["params"]]
    assert len(found) == len(set(found))
    named = dict(model.named_parameters())
    assert set(found) == {id(p) for name, p in named.items() if not name.startswith("vision.blocks.0.")}
    new = {id(p) for p in [*groups["new"]["params"], *groups["new, no decay"]["params"]]}
    assert new == {id(p) for name, p in named.items() if name.startswith(("casa_layers.", "projector."))}


def test_an_adapted_model_trains_what_was_added_and_the_towers_last_blocks():
    model = tiny_casa_over("qwen2_5_vl")
    choose_trained(model, OptimisationSettings(steps=1, trainable="added", tower_blocks=1))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("casa_layers.", "backbone.model.visual.blocks.1.")) for name in trained)
    assert any("visual" in name for name in trained)


def test_lora_is_new():
    assert is_new("base_model.model.backbone.layers.0.self_attn.q_proj.lora_A.default.weight")
    assert not is_new("backbone.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("choice", [{"frozen": ("nowhere",)}, {"frozen": ("",)}])
def test_patterns_that_cannot_be_meant_are_refused(choice):
    with pytest.raises(UserError, match=r"fits no parameter|nothing is left"):
        choose_trained(tiny_casa(), OptimisationSettings(steps=1, **choice))


def test_a_rate_for_nothing_is_refused():
    with pytest.raises(UserError, match="fits no parameter"):
        parameter_groups(tiny_casa(), OptimisationSettings(steps=1, lr_overrides={"nowhere": 1.0}))


class Rates(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.found.append([group["lr"] for group in optimizer.param_groups])


def test_rates_rise_stay_and_fall(small, tmp_path):
    rates = Rates()
    run = small.trainer(
        tmp_path, steps=10, warmup_steps=2, decay_steps=4, gradient_accumulation_steps=1, save_every=100
    )
    run.add_callback(rates)
    run.train()
    groups = {group["name"]: number for number, group in enumerate(run.optimizer.param_groups)}
    wanted = [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    for name, full in (("new", 3e-3), ("existing", 1e-3)):
        assert [found[groups[name]] / full for found in rates.found] == pytest.approx(wanted)


class Gradients(TrainerCallback):
    """Keeps the first step's gradients, and ends the run there."""

    def __init__(self, model):
        self.model, self.found = model, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.found = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        control.should_training_stop = True


def first_gradients(small, folder, **choice):
    folder.mkdir()
    torch.manual_seed(0)
    model = small.model(dropout=0.0, dtype=choice.pop("dtype", torch.float64))
    run = small.trainer(folder, own_model=model, steps=1, max_grad_norm=0.0, save_every=100, **choice)
    kept = Gradients(model)
    run.add_callback(kept)
    forward = model.forward

    def widened(*args, pixel_values=None, **kwargs):
        return forward(*args, pixel_values=pixel_values, **kwargs)

    model.forward = widened
    run.train()
    return kept.found, run


def test_uneven_batches_accumulate_to_the_mean_over_tokens(small, tmp_path):
    """Four packs in one step, by the trainer and by hand: their answers differ in length."""
    found, run = first_gradients(small, tmp_path / "run", gradient_accumulation_steps=4)
    counts = [batch.facts["learned"] for batch in run.batches]
    assert len(set(counts)) > 1
    model = small.model(dropout=0.0, dtype=torch.float64).train().requires_grad_(True)
    model.loss_chunk = 100
    for batch in run.batches:
        (model(**batch.inputs).loss * batch.facts["learned"] / sum(counts)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_blocks_that_run_again_give_the_same_gradients(small, tmp_path):
    plain, _ = first_gradients(small, tmp_path / "plain")
    again, run = first_gradients(small, tmp_path / "again", gradient_checkpointing=True)
    assert run.model.checkpoints_blocks
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_bf16_keeps_a_float32_master_of_what_is_trained(small, tmp_path):
    single, _ = first_gradients(small, tmp_path / "single", dtype=torch.float32)
    frozen = (r"^backbone\.model\.embed_tokens",)
    half, _ = first_gradients(small, tmp_path / "half", dtype=torch.float32, precision="bfloat16")
    for name, gradient in half.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - single[name]).norm()) < 0.1 * float(single[name].norm()), name
    model = tiny_casa()
    choose_trained(model, OptimisationSettings(steps=1, frozen=frozen))
    set_precision(model, OptimisationSettings(steps=1, precision="bfloat16"))
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds.pop("backbone.model.embed_tokens.weight") == torch.bfloat16
    assert set(kinds.values()) == {torch.float32}
    set_precision(model, OptimisationSettings(steps=1, precision="bfloat16", master_weights=False))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_the_average_follows_the_weights_and_survives_a_resume(small, tmp_path):
    run = small.trainer(tmp_path, steps=4, save_every=2, ema_decay=0.5)
    run.train()
    average = {name: value.clone() for name, value in run.ema.average.items()}
    name = "projector.down.weight" if "projector.down.weight" in average else next(iter(average))
    weight = run.model.get_parameter(name).detach().clone()
    assert not torch.equal(average[name], weight)
    with run.ema.in_place():
        assert torch.equal(run.model.get_parameter(name), average[name])
    assert torch.equal(run.model.get_parameter(name), weight)
    (tmp_path / "checkpoint-4").rename(tmp_path / "away")
    again = small.trainer(tmp_path, steps=4, save_every=2, ema_decay=0.5)
    again.train(resume_from_checkpoint=True)
    for name, value in average.items():
        torch.testing.assert_close(again.ema.average[name], value, rtol=1e-6, atol=1e-7)


def test_an_average_is_what_its_formula_says():
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(module.weight, 0.0)
    ema = Ema(module, decay=0.5)
    wanted = 0.0
    for step in range(1, 20):
        torch.nn.init.constant_(module.weight, float(step))
        ema.update()
        decay = min(0.5, step / (step + 10))
        wanted = decay * wanted + (1 - decay) * step
    assert float(ema.average["weight"]) == pytest.approx(wanted, rel=1e-12)
