"""Runs of casa-tiny's recipe in small: it learns, it can be interrupted anywhere, and what it leaves can be loaded."""

import copy
import json
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from casa.errors import UserError
from casa.evaluation import stream, training_clip
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.loading import resolve
from projects.casa_tiny import stage, tasks
from projects.casa_tiny.fusion import train_fusion
from projects.casa_tiny.recipe import RECIPE, load_recipe, parse_recipe
from projects.casa_tiny.text import new_text_model, train_text
from projects.casa_tiny.tower import train_tower
from projects.casa_tiny.train import train

FIRST_STEPS = json.loads(RECIPE.with_name("first_steps.json").read_text())
SMALL: dict[str, Any] = {
    "name": "small",
    "threads": 0,
    "workers": 0,
    "text": {
        "model": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "optimisation": {"steps": 12, "lr": 0.01, "warmup": 2},
        "vocabulary": 300,
        "documents": 6,
        "samples": 6,
        "row_tokens": 64,
    },
    "tower": {
        "model": {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 24,
            "fullatt_block_indexes": [0, 1],
        },
        "optimisation": {"steps": 12, "lr": 0.005, "muon_lr": 0.01, "warmup": 2},
        "mix": {"sheets": 1},
        "sizes": [{"until": 1, "smallest": 112, "largest": 112}],
        "channels": {"digit": 1, "down": 0.2},
        "patches": 128,
    },
    "fusion": {
        "optimisation": {"steps": 12, "lr": 0.005, "muon_lr": 0.005, "warmup": 2},
        "mix": {"scenes": 2, "clips": 1},
        "batch": {"scenes": 6, "clips": 1},
        "fresh_patches": 96,
        "smallest": 112,
        "largest": 140,
        "pool_draws": 8,
        "prefill": 4,
        "row_tokens": 256,
        "dropout": 0.05,
    },
}


def small(**changes):
    return parse_recipe(SMALL | changes)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Checkpoints and reports at every fourth step, and clips of four frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "SAVE_EVERY", 4)
        patch.setattr(stage, "LOG_EVERY", 4)
        patch.setitem(tasks.CLIPS, "clips", lambda rng: stream(rng, "train", seconds=2, sizes=[(224, 224)]))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert train(small(), out) == out / "final"
    return out


def weights(final):
    return load_file(final / "model.safetensors")


@pytest.mark.slow
def test_every_stage_learns(finished):
    stages = json.loads((finished / "training.json").read_text())["stages"]
    assert list(stages) == ["text", "tower", "fusion"]
    for name, facts in stages.items():
        curve = [loss for _, loss in facts["curve"]]
        assert curve[-1] < 0.9 * curve[0], name
        assert facts["curve"][-1][0] == facts["steps"]


@pytest.mark.slow
def test_the_checkpoint_answers(finished):
    model = CasaForConditionalGeneration.from_pretrained(finished / "final")
    processor = CasaProcessor.from_pretrained(finished / "final")
    content = [{"type": "image"}, {"type": "text", "text": "How many shapes are there?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (56, 84))], text=text)
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 4]]
    said = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert said.shape[1] > inputs["input_ids"].shape[1]
    assert processor.stream_prompt == "Say each new number."
    assert processor.frame_suffix == "<frame>"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.config.text_config.use_cache


@pytest.mark.slow
def test_the_facts_are_kept(finished):
    facts = json.loads((finished / "training.json").read_text())
    assert facts["recipe"]["seed"] == 1
    assert facts["versions"]["torch"]
    card = (finished / "final" / "README.md").read_text()
    assert "# small" in card
    assert f"| fusion | {facts['stages']['fusion']['steps']} |" in card
    assert facts["versions"]["torch"] in card
    assert {path.name for path in finished.iterdir()} == {
        *("text", "tower", "fusion", "final", "recipe.yaml", "training.json")
    }


class PowerError(Exception):
    """The power goes."""


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise PowerError


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_it_had_not_been(finished, tmp_path):
    out = tmp_path / "out"
    for name, step in (("text", 9), ("tower", 8), ("fusion", 10)):
        with pytest.raises(PowerError):
            train(small(), out, until=name, callbacks=[Stop(step)])
        assert (out / f"{name}-checkpoints").is_dir()
        assert train(small(), out, until=name) == out / ("final" if name == "fusion" else name)
    once, again = weights(finished / "final"), weights(out / "final")
    assert once.keys() == again.keys()
    for name in once:
        torch.testing.assert_close(once[name], again[name], rtol=0, atol=0, msg=name)
    # a finished run is not repeated
    train(small(), out, callbacks=[Stop(0)])


@pytest.mark.slow
def test_folders_that_are_taken_are_refused(finished, tmp_path):
    with pytest.raises(UserError, match="another recipe"):
        train(small(seed=2), finished)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train(small(), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        train(small(), tmp_path / "file")
    with pytest.raises(UserError, match="no stage 'eyes'; choose text, tower or fusion"):
        train(small(), tmp_path / "other", until="eyes")
    assert not (tmp_path / "other").exists()


def test_settings_that_make_no_model_are_refused(tmp_path):
    recipe = small()
    recipe.text.model["num_attention_heads"] = 5
    with pytest.raises(UserError, match=r"text\.model does not make a Llama model"):
        train(recipe, tmp_path / "out")


def test_the_learning_rate_rises_stays_and_falls():
    chosen = parse_recipe(copy.deepcopy(SMALL)).text.optimisation
    steps = type(chosen)(steps=100, warmup=10, decay=0.5)
    assert [steps.factor(step) for step in (0, 9, 50, 75, 99)] == pytest.approx([0.1, 1, 1, 0.5, 0.02])
    assert all(0 < type(chosen)(steps=7, warmup=9, decay=1.0).factor(step) <= 1 for step in range(7))


def test_the_recipe_is_read_and_written_back():
    recipe = load_recipe()
    assert recipe.name == "casa-tiny"
    plain = yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(recipe.to_dict()))))
    assert parse_recipe(plain) == recipe


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("sed",), 3, "did you mean 'seed'?"),
        (("tower", "optimisation", "stepz"), 3, "did you mean 'steps'?"),
        (("tower", "sizes", 0, "smallest"), 100, "tower.sizes[0].smallest is 100; it must be a multiple of 28 px."),
        (("tower", "mix"), {}, "mix is {}; it must be a block with at least one entry."),
        (("tower", "mix"), {"page": 1}, "did you mean 'pages'?"),
        (("tower", "channels"), {"digits": 1}, "did you mean 'digit'?"),
        (("tower", "exact"), ["shade"], "exact is 'shade'; it must be one of the channels"),
        (("text", "vocabulary"), 10, "text.vocabulary is 10"),
        (("fusion", "fusion"), {"placement": "paralel"}, "did you mean 'parallel'?"),
        (("fusion", "batch"), {"pages": 3}, "batch names 'pages'"),
        (("fusion", "dropout"), 1.0, "dropout is 1.0"),
        (("workers",), 2, "workers is 2"),
    ],
)
def test_what_is_wrong_is_refused(path, value, message):
    values = copy.deepcopy(SMALL)
    inner: Any = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UserError) as refused:
        parse_recipe(values)
    assert message in str(refused.value)


def train_fusion_over_new_text(recipe, out, callbacks):
    """The last stage over a text model that has learned nothing, and the shipped model's tower."""
    tower = CasaForConditionalGeneration.from_pretrained("casa-tiny").vision
    tokenizer = AutoTokenizer.from_pretrained(resolve("casa-tiny"))
    train_fusion(recipe, new_text_model(recipe, tokenizer), tokenizer, tower, out, callbacks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "tower", "fusion_over_new_text"])
def test_the_first_steps_are_those_of_the_trainer_that_made_the_shipped_model(name, tmp_path, monkeypatch):
    """The recipe as it is, for a few steps, against the losses that were recorded with the code of then."""
    wanted, found = FIRST_STEPS["losses"][name][:4], []
    recipe = load_recipe()
    object.__setattr__(recipe, "workers", 0)
    step = stage.StageTrainer.training_step

    def noted(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        found.append(float(loss))
        return loss

    monkeypatch.setattr(stage.StageTrainer, "training_step", noted)
    monkeypatch.setitem(tasks.CLIPS, "clips", training_clip)
    stages = {"text": train_text, "tower": train_tower, "fusion_over_new_text": train_fusion_over_new_text}
    with pytest.raises(PowerError):
        stages[name](recipe, tmp_path, [Stop(len(wanted))])
    # sums in another order: chunks of tokens, groups of parameters; the worst seen is 2e-7
    assert found == pytest.approx(wanted, rel=1e-4)
