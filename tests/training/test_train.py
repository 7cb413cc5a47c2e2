"""A whole run of seconds: it learns, it can be interrupted anywhere, and what it leaves can be loaded."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.training import Progress, loop, train


def _toy() -> ModuleType:
    # tests are no package (importlib mode), so a neighbour is imported by its path
    spec = importlib.util.spec_from_file_location("training_toy", Path(__file__).with_name("toy.py"))
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_toy"] = module
    spec.loader.exec_module(module)
    return module


toy = _toy()


@pytest.fixture(scope="module", autouse=True)
def often() -> Iterator[None]:
    """Reports and saved states at every fourth step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "EVERY", 4)
        patch.setattr(loop, "SAVE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    train(toy.recipe(), toy.SOURCES, out)
    return out


def _weights(final: Path) -> dict[str, torch.Tensor]:
    return load_file(final / "model.safetensors")


def test_every_stage_learns(finished: Path) -> None:
    stages = json.loads((finished / "training.json").read_text())["stages"]
    assert list(stages) == ["text", "tower", "fusion"]
    for name, facts in stages.items():
        curve = [loss for _, loss in facts["curve"]]
        assert curve[-1] < 0.8 * curve[0], name
        assert facts["curve"][-1][0] == facts["steps"]


def test_the_checkpoint_answers(finished: Path) -> None:
    model = CasaForConditionalGeneration.from_pretrained(finished / "final")
    processor = CasaProcessor.from_pretrained(finished / "final")
    content = [{"type": "image"}, {"type": "text", "text": "How many rows are there?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (56, 84))], text=text)
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 4]]
    said = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert said.shape[1] > inputs["input_ids"].shape[1]
    assert processor.stream_prompt == "Say each shade."
    assert processor.frame_suffix == "<frame>"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_the_facts_are_kept(finished: Path) -> None:
    facts = json.loads((finished / "training.json").read_text())
    assert facts["seed"] == 1
    assert facts["versions"]["torch"]
    assert facts["recipe"]["name"] == "toy"
    card = (finished / "final" / "README.md").read_text()
    assert "# toy" in card
    assert f"| fusion | {facts['stages']['fusion']['steps']} |" in card
    assert facts["versions"]["torch"] in card
    assert (finished / "final" / "loss.png").exists()
    assert not list(finished.rglob("*.part"))
    assert not list(finished.rglob("state.safetensors"))


class StopError(Exception):
    """The power goes."""


def _stop_at(stage: str, step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            raise StopError

    return report


def test_an_interrupted_run_ends_as_if_it_had_not_been(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for stage, step in [("text", 8), ("tower", 12), ("fusion", 16)]:
        with pytest.raises(StopError):
            train(toy.recipe(), toy.SOURCES, out, progress=_stop_at(stage, step))
        assert (out / stage / "state.safetensors").is_file()
    final = train(toy.recipe(), toy.SOURCES, out, resume=True)
    once, again = _weights(finished / "final"), _weights(final)
    assert once.keys() == again.keys()
    for name in once:
        torch.testing.assert_close(once[name], again[name], rtol=0, atol=0, msg=name)


def test_a_finished_run_is_not_repeated(finished: Path) -> None:
    seen: list[Progress] = []
    before = _weights(finished / "final")
    train(toy.recipe(), toy.SOURCES, finished, resume=True, progress=seen.append)
    assert seen == []
    after = _weights(finished / "final")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_ends_with_the_stage_that_is_asked_for_and_goes_on_behind_it(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for last, made in (("text", {"text"}), ("tower", {"text", "tower"})):
        assert train(toy.recipe(), toy.SOURCES, out, until=last) == out / last
        assert {path.name for path in out.iterdir() if path.is_dir()} == made
    final = train(toy.recipe(), toy.SOURCES, out, until="fusion")
    once, again = _weights(finished / "final"), _weights(final)
    assert all(torch.equal(once[name], again[name]) for name in once)
    with pytest.raises(UserError, match="no stage 'fusing'; choose text, tower or fusion"):
        train(toy.recipe(), toy.SOURCES, tmp_path / "other", until="fusing")
    assert not (tmp_path / "other").exists()


def test_the_monitor_sees_every_stage(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    train(toy.recipe(), toy.SOURCES, tmp_path / "out", monitor=lambda stage, step, model: seen.append((stage, step)))
    assert {stage for stage, _ in seen} == {"text", "tower", "fusion"}


def test_folders_that_are_taken_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        train(toy.recipe(), toy.SOURCES, finished, resume=False)
    with pytest.raises(UserError, match="another recipe"):
        train(toy.recipe(seed=2), toy.SOURCES, finished, resume=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train(toy.recipe(), toy.SOURCES, tmp_path, resume=True)
    with pytest.raises(UserError, match="is a file"):
        train(toy.recipe(), toy.SOURCES, tmp_path / "file")


def test_a_run_from_before_a_key_was_known_goes_on(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    said = json.loads((out / "recipe.json").read_text())
    assert all(span.pop("patches") is None for span in said["tower"]["sizes"])
    (out / "recipe.json").write_text(json.dumps(said))
    assert train(toy.recipe(), toy.SOURCES, out, resume=True) == out / "final"
    (out / "recipe.json").write_text(json.dumps(said | {"unknown": 1}))
    with pytest.raises(UserError, match="another recipe"):
        train(toy.recipe(), toy.SOURCES, out, resume=True)


def test_names_that_do_not_exist_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    recipe = toy.recipe()
    for field, value in (("mix", {"shade": 1.0}), ("channels", {"shades": 1.0})):
        object.__setattr__(recipe.tower, field, value)
        with pytest.raises(UserError, match="did you mean"):
            train(recipe, toy.SOURCES, tmp_path / "out")
        recipe = toy.recipe()
    assert not (tmp_path / "out").exists()


def test_settings_that_make_no_model_are_refused(tmp_path: Path) -> None:
    recipe = toy.recipe()
    recipe.text.model["num_attention_heads"] = 5
    with pytest.raises(UserError, match=r"text\.model does not make a Llama model"):
        train(recipe, toy.SOURCES, tmp_path / "out")
