"""A recipe to a finished model: trained, resumed, with adapters; what is told of it, and what is refused."""

import errno
import json
import multiprocessing
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from casa import CasaForConditionalGeneration, CasaProcessor
from casa.data.settings import Shard
from casa.errors import UserError
from casa.training.checkpoints import newest_checkpoint
from casa.training.config import parse_recipe
from casa.training.models import export_checkpoint, load_model, load_processor
from casa.training.packed_dataset import open_dataset
from casa.training.run import RECIPE, claim_folder, train

# PEFT asks by a name that transformers is about to leave behind


def curve(folder):
    """Losses by step."""
    log = json.loads((folder / "log.json").read_text())
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def learned_from(final):
    """The rows of a model card that say what the model was trained on."""
    return (final / "README.md").read_text().split("| trained on |")[1].split("\n\n")[0]


def adapted(made, **more):
    return {"backbone": str(made.text), "vision": str(made.tower), **more}


@pytest.mark.slow
def test_a_run_gives_a_model_and_resuming_gives_the_same(values, made, tmp_path):
    """Both from a text model: projector and fusion layers are new, and drawn by the seed."""
    recipe = parse_recipe(values(model=adapted(made), evaluation={"every": 2, "data": values()["data"], "packs": 2}))
    out, told = tmp_path / "whole", []
    final = train(recipe, out, on_message=told.append)
    assert final == out / "final"
    model = CasaForConditionalGeneration.from_pretrained(final)
    began = CasaForConditionalGeneration.from_pretrained(out / "checkpoint-2")
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, began.get_parameter(name))]
    assert {name.split(".")[0] for name in moved} == {"backbone", "vision", "projector", "casa_layers"}
    assert CasaProcessor.from_pretrained(final).image_token == "<image>"
    log = json.loads((out / "log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4]
    (first, *_) = (entry for entry in log if "loss" in entry)
    assert (first["lr_new"], first["lr_existing"]) == (0, 0)  # before it rises
    (second,) = (entry for entry in log if "loss" in entry and entry["step"] == 2)
    assert (second["lr_new"], second["lr_existing"]) == pytest.approx((3e-3, 1e-3))
    assert second["learning_rate"] in (second["lr_new"], second["lr_existing"])
    assert 0 < first["packed_text"] <= 1
    assert 0 < first["packed_image"] <= 1
    assert first["memory_gib"] > 0

    # nothing is measured here, which must change nothing; and the last checkpoint is lost
    again = tmp_path / "again"
    plain = parse_recipe(values(model=adapted(made)))
    train(plain, again)
    assert curve(again) == curve(out)
    shutil.rmtree(again / "checkpoint-4")
    shutil.rmtree(again / "final")
    train(plain, again, resume=True)
    assert curve(again) == pytest.approx(curve(out))
    assert learned_from(again / "final") == learned_from(final)
    assert "| packs | 4 |" in learned_from(final)
    other = CasaForConditionalGeneration.from_pretrained(again / "final")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter)

    card = (final / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text"
    assert str(tmp_path) not in card.split("## Recipe")[0]
    assert re.search(r"\| [1-3] \| missing-picture \|", card)
    assert "held-out loss" in card
    assert (final / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert parse_recipe(yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])) == recipe


@pytest.mark.slow
def test_data_that_end_are_measured_at_the_end_and_end_for_good(values, made, tmp_path):
    evaluation = {"every": 1000, "data": values()["data"], "packs": 1}
    blocks = {"data": {"exhausted": "leave"}, "optimisation": {"steps": 1000}, "evaluation": evaluation}
    recipe = parse_recipe(values(**blocks))
    final = train(recipe, tmp_path / "run")
    last = newest_checkpoint(tmp_path / "run")

    def measured():
        log = json.loads((tmp_path / "run" / "log.json").read_text())
        return [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]

    (found,) = measured()
    assert f"checkpoint-{found[0]}" == last.name
    # resumed, it has nothing left to learn from: the same model, and the same score
    weights, told = load_file(final / "model.safetensors"), learned_from(final)
    shutil.rmtree(final)
    train(recipe, tmp_path / "run", resume=True)
    assert learned_from(final) == told
    assert newest_checkpoint(tmp_path / "run").name == last.name
    assert measured() == [found]
    again = load_file(final / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "raised", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left"), UserError, "full before final was whole.*checkpoint-1 is kept"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_finished_model_stays_until_the_next_is_whole(values, tmp_path, monkeypatch, fault, raised, sentence):
    recipe, out = parse_recipe(values(optimisation={"steps": 1, "warmup_steps": 0, "decay_steps": 0})), tmp_path / "run"
    final = train(recipe, out)
    (final / "letter.txt").write_text("of the first end")
    kept = {path.name: path.read_bytes() for path in final.iterdir()}

    def half(model, folder, dtype):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr("casa.training.run._save", half)
        with pytest.raises(raised, match=sentence):
            train(recipe, out, resume=True)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == kept
    train(recipe, out, resume=True)
    assert {path.name for path in final.iterdir()} == kept.keys() - {"letter.txt"}
    assert (final / "model.safetensors").read_bytes() == kept["model.safetensors"]
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_adapters_are_trained_resumed_and_merged(values, made, tmp_path):
    lora = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    blocks = {
        "model": {"backbone": str(made.vlm), "fusion": {"every": 2}, "lora": lora},
        "optimisation": {"trainable": "as given", "steps": 2},
        "saving": {"every": 1},
    }
    recipe = parse_recipe(values(**blocks))
    final = train(recipe, tmp_path / "run")
    model = CasaForConditionalGeneration.from_pretrained(final)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert (tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors").is_file()
    # the last checkpoint, exported, is the model that the run ended with; the one before is another
    same = CasaForConditionalGeneration.from_pretrained(
        export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "exported")
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(same.get_parameter(name), parameter), name
    assert CasaProcessor.from_pretrained(tmp_path / "exported").image_token == "<|image_pad|>"
    other = CasaForConditionalGeneration.from_pretrained(
        export_checkpoint(tmp_path / "run" / "checkpoint-1", tmp_path / "earlier")
    )
    moved = {
        name for name, parameter in model.named_parameters() if not torch.equal(other.get_parameter(name), parameter)
    }
    assert any("q_proj" in name for name in moved)
    assert not any("k_proj" in name and "backbone" in name for name in moved)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    shutil.rmtree(final)
    train(recipe, tmp_path / "run", resume=True)
    again = CasaForConditionalGeneration.from_pretrained(final)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter)


@pytest.mark.slow
@pytest.mark.parametrize("added", ["full", "adapters"])
def test_averages_of_adapters_are_merged_and_odd_folders_refused(values, made, tmp_path, added):
    lora = {"rank": 2, "target_modules": ["q_proj"], "added": added}
    blocks = {
        "model": {"backbone": str(made.text), "vision": str(made.tower), "lora": lora},
        "optimisation": {
            "trainable": "as given",
            "steps": 2,
            "decay_steps": 0,
            "ema_decay": 0.5,
            "precision": "bfloat16",
        },
    }
    final = train(parse_recipe(values(**blocks)), tmp_path / "run")
    # a run with an average ends with it
    exported = export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "average", average=True)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (final, exported))
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype == torch.bfloat16
        assert torch.equal(found[name], weight), name
    wide = export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "wide", dtype=torch.float32)
    assert {weight.dtype for weight in load_file(wide / "model.safetensors").values()} == {torch.float32}
    recipe = tmp_path / "run" / RECIPE
    written = recipe.read_text()
    recipe.write_text(written.replace("rank: 2", "rank: 3"))
    with pytest.raises((UserError, RuntimeError), match=r"adapters|size mismatch"):
        export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "other")
    recipe.write_text(written.replace("- q_proj", "- k_proj"))
    with pytest.raises(UserError, match="are not those of"):
        export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "other")
    recipe.unlink()
    with pytest.raises(UserError, match="put the recipe of the run there"):
        export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_adapters_need_layers(values, made, tmp_path):
    model = {"checkpoint": str(made.checkpoint), "lora": {"target_modules": ["q_prog"]}}
    recipe = parse_recipe(values(model=model, optimisation={"trainable": "as given"}))
    with pytest.raises(UserError, match="no linear layer is called 'q_prog'; did you mean 'q_proj'"):
        train(recipe, tmp_path / "run")


def test_a_folder_belongs_to_one_recipe(values, tmp_path):
    recipe = parse_recipe(values())
    out = tmp_path / "run"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        train(recipe, out)
    (out / "letter.txt").unlink()
    told = [out / "bad-records-0-1.jsonl", out / "tensorboard" / "events"]
    (out / "tensorboard").mkdir()
    for path in told:
        path.write_text("of the run before")
    (out / RECIPE).write_text(yaml.safe_dump(values()))
    claim_folder(recipe, out, resume=False)  # nothing was saved yet
    assert all(path.exists() for path in told)
    (out / RECIPE).write_text(yaml.safe_dump(values(seed=7)))
    claim_folder(recipe, out, resume=False)
    # what another recipe has left would be counted as this one's
    assert not any(path.exists() for path in told)
    (out / RECIPE).write_text(yaml.safe_dump(values(seed=7)))
    (out / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match=r"holds a run already: go on with it \(resume=True\)"):
        train(recipe, out)
    with pytest.raises(UserError, match="holds a run with another seed"):
        train(recipe, out, resume=True)
    changed = parse_recipe(values(seed=7, optimisation={"weight_decay": 0.5, "new_lr": 1e-4}))
    with pytest.raises(UserError, match=r"another optimisation\.weight_decay:"):
        claim_folder(changed, out, resume=True)
    claim_folder(parse_recipe(values(seed=7, optimisation={"new_lr": 1e-4})), out, resume=True)
    with pytest.raises(UserError, match=r"another optimisation\.gradient_accumulation_steps:"):
        claim_folder(parse_recipe(values(seed=7, optimisation={"gradient_accumulation_steps": 2})), out, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train(recipe, tmp_path / "file")


def test_nothing_to_learn_from_is_said(values, made, tmp_path):
    empty = made.module.pages(tmp_path / "data", 4, bad=4)
    recipe = parse_recipe(values(data={"sources": [{"path": str(empty)}]}))
    with pytest.raises(UserError, match=r"has no record that can be learned from .*no picture"):
        train(recipe, tmp_path / "run")
    strict = parse_recipe(values(data={"strict": True, "shuffle": 0}))
    with pytest.raises(UserError, match=r"pages\.jsonl:1: "):
        train(strict, tmp_path / "strict")


class Rates(TrainerCallback):
    """Keeps the rates of every step."""

    def __init__(self):
        self.found = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.found.append({group["name"]: group["lr"] for group in optimizer.param_groups})


@pytest.mark.slow
def test_a_run_goes_on_with_the_recipes_rates(values, tmp_path):
    started = parse_recipe(values(optimisation={"steps": 2, "decay_steps": 0}))
    train(started, tmp_path / "run")
    slower = parse_recipe(values(optimisation={"steps": 4, "decay_steps": 0, "new_lr": 5e-4}))
    rates = Rates()
    train(slower, tmp_path / "run", resume=True, callbacks=[rates])
    assert [found["new"] for found in rates.found] == pytest.approx([5e-4, 5e-4])
    assert [found["existing"] for found in rates.found] == pytest.approx([1e-3, 1e-3])


@pytest.mark.slow
def test_the_rate_of_muon_may_change_and_muon_may_not(values, tmp_path):
    started = parse_recipe(values(optimisation={"steps": 2, "decay_steps": 0, "muon_lr": 0.01}))
    train(started, tmp_path / "run")
    slower = parse_recipe(values(optimisation={"steps": 4, "decay_steps": 0, "muon_lr": 0.004}))
    rates = Rates()
    train(slower, tmp_path / "run", resume=True, callbacks=[rates])
    assert [found["muon"] for found in rates.found] == pytest.approx([0.004, 0.004])
    without = parse_recipe(values(optimisation={"steps": 6, "decay_steps": 0}))
    with pytest.raises(UserError, match=r"a run with another optimisation\.muon_lr"):
        train(without, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_an_insertion_model_is_frozen_and_gets_layers(values, made, tmp_path):
    """Route (b) over a model of casa's own; its pictures are those of its own processor."""
    optimisation = {"trainable": "added", "tower_blocks": 1, "frozen": [r"^projector\."]}
    recipe = parse_recipe(values(model={"backbone": str(made.insertion)}, optimisation=optimisation))
    final = train(recipe, tmp_path / "run")
    model = CasaForConditionalGeneration.from_pretrained(final)
    before = dict(CasaForConditionalGeneration.from_pretrained(made.insertion).named_parameters())
    moved = {name for name, p in model.named_parameters() if name not in before or not torch.equal(p, before[name])}
    assert {".".join(name.split(".")[:3]) for name in moved if not name.startswith("casa_layers")} == {
        "vision.blocks.1"
    }
    assert model.fusion.method == "casa"


def test_a_processor_made_before(values, made, tmp_path):
    given = {"backbone": str(made.text), "vision": str(made.tower)}
    said = parse_recipe(values(model={**given, "processor": str(made.checkpoint)})).model
    assert load_processor(said).stream_prompt == "say it"
    assert load_processor(parse_recipe(values(model=given)).model).stream_prompt != "say it"
    CasaProcessor.from_pretrained(made.checkpoint).save_pretrained(tmp_path / "alone")
    for place in (str(tmp_path / "alone"), "casa-tiny"):
        assert load_processor(parse_recipe(values(model={**given, "processor": place})).model).stream_prompt
    gist = parse_recipe(values(model={**given, "processor": str(made.checkpoint), "fusion": {"gist": 2}})).model
    with pytest.raises(UserError, match=r"0 gist tokens .* is 2; give the same"):
        load_processor(gist)


def test_a_reader_in_a_process_of_its_own_says_one_sentence(values, made, tmp_path, monkeypatch):
    monkeypatch.setattr("casa.training.run.check_run", lambda *_, **__: None)  # it would say so itself
    pages = made.module.pages(tmp_path / "data", 6, bad=6)
    recipe = parse_recipe(values(data={"sources": [{"path": str(pages)}]}, dataloader={"num_workers": 1}))
    with pytest.raises(UserError, match=r"^\S*pages.jsonl has no record that can be read") as caught:
        train(recipe, tmp_path / "run")
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children(), "it would keep the program from ending"


def test_frames_of_videos_are_kept_where_the_recipe_says(values, tmp_path):
    recipe = parse_recipe(values(dataloader={"frame_cache_dir": str(tmp_path / "frames")}))
    loaded = load_model(recipe)
    assert open_dataset(recipe, loaded).open_records(shard=Shard()) is not None
    assert not (tmp_path / "frames").exists(), "a dry run writes nothing"
    open_dataset(recipe, loaded, keep_frames=recipe.dataloader.frame_cache_dir).open_records(shard=Shard())
    assert (tmp_path / "frames").is_dir()
    with pytest.raises(UserError, match=r"dataloader\.frame_cache_dir is ''; it must be the name of a folder"):
        parse_recipe(values(dataloader={"frame_cache_dir": ""}))
