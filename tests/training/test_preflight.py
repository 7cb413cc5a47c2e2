"""What would end a run at step N is said before step 0, in a dry run too, and leaves nothing behind."""

import json
import os
import shutil

import pytest
from transformers import TrainerCallback

from casa.errors import UserError
from casa.training import checkpoints
from casa.training.config import parse_recipe
from casa.training.models import load_model, outline
from casa.training.optimizer import checkpoint_bytes, final_bytes
from casa.training.plan import check_run
from casa.training.run import train


def sizes(model, recipe):
    """Bytes of a checkpoint, and of the finished model."""
    return checkpoint_bytes(model, recipe.optimisation), final_bytes(model, recipe.optimisation)


@pytest.fixture
def refused(tmp_path):
    """The sentence in which a recipe is refused, by the look before a run and by the run alike."""

    def look(values, out=None, **how):
        out = out if out is not None else tmp_path / "run"
        before = sorted(tmp_path.rglob("*"))
        recipe = parse_recipe(values)
        with pytest.raises(UserError) as looked:
            check_run(recipe, out, **how)
        with pytest.raises(UserError) as ran:
            train(recipe, out, callbacks=[Never()], **how)
        assert str(ran.value) == str(looked.value)
        assert sorted(tmp_path.rglob("*")) == before
        return str(looked.value)

    return look


class Never(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise AssertionError("a step was done")


def evaluated(path, **rest):
    return {"every": 100, "data": {"sources": [{"path": str(path), **rest}]}}


def test_a_typo_in_what_is_measured_later(values, made, refused, tmp_path):
    assert "There is no nowhere.jsonl" in refused(values(evaluation=evaluated("nowhere.jsonl")))
    said = refused(values(evaluation=evaluated(made.pages, columns={"image": "foto"})))
    assert "pages.jsonl has no record that can be learned from" in said
    assert "no column 'foto'" in said
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl has no record" in refused(values(evaluation=evaluated(tmp_path / "empty.jsonl")))


def test_a_source_that_gives_nothing_in_a_mixture(values, made, refused, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"no": "shape"}\n' * 5)
    both = {"sources": [{"path": str(made.pages)}, {"path": str(tmp_path / "odd.jsonl"), "weight": 0.001}]}
    said = refused(values(data=both))
    assert "odd.jsonl has no record that can be learned from" in said
    assert "odd.jsonl:1: The row's keys (no) fit no shape" in said


def test_folders_that_cannot_be_written(values, refused, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is no folder: write elsewhere" in refused(values(), out=tmp_path / "file" / "run")
    kept = {"frame_cache_dir": str(tmp_path / "file" / "frames")}
    assert "is no folder: write elsewhere" in refused(values(dataloader=kept))
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "locked cannot be written" in refused(values(), out=tmp_path / "locked" / "run")


def test_what_the_log_goes_to(values, refused, monkeypatch):
    monkeypatch.setattr("casa.training.callbacks.find_spec", lambda name: None)
    assert "wandb, which is not installed" in refused(values(logging={"report_to": ["wandb"]}))


@pytest.mark.parametrize("part", ["checkpoint", "backbone", "vision"])
def test_weights_that_are_not_there_or_cut_off(values, made, refused, tmp_path, part):
    source = {"checkpoint": made.checkpoint, "backbone": made.text, "vision": made.tower}[part]
    broken = shutil.copytree(source, tmp_path / part)
    model = {"checkpoint": str(broken)}
    if part != "checkpoint":
        model = {"backbone": str(made.text), "vision": str(made.tower), part: str(broken)}
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{part} cannot be loaded: model.safetensors" in refused(values(model=model))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    file.rename(broken / "model-00001-of-00002.safetensors")
    (broken / "model-00001-of-00002.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{part} cannot be loaded: model-00002-of-00002" in refused(values(model=model))
    for path in broken.glob("*.safetensors*"):
        path.unlink()
    assert f"{part} has no weights" in refused(values(model=model))


@pytest.mark.slow
def test_room_for_all_checkpoints_is_looked_for_at_the_start(values, refused, tmp_path, monkeypatch):
    plain = values(saving={"every": 1, "keep": 2}, optimisation={"ema_decay": 0.9})
    recipe = parse_recipe(plain)
    each, result = sizes(outline(recipe), recipe)
    most = max(3 * each, 2 * each + result) + checkpoints._BESIDE
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: most - 1)
    assert "free some space, keep fewer, or train elsewhere" in refused(plain)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: most)
    check_run(recipe, tmp_path / "run")
    # the first checkpoint is what it was said to be
    monkeypatch.undo()
    found = {}
    monkeypatch.setattr(checkpoints, "check_room", lambda folder, needed, what, _: found.update({what: needed}))
    train(recipe, tmp_path / "run")
    assert found["The checkpoint of step 1 needs"] == pytest.approx(each, rel=0.02)
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "final").glob("*.safetensors"))
    assert written == pytest.approx(result, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "oversize", "word"),
    [
        ({"text": 8, "image": 40}, {"text": "refuse", "images": "refuse"}, "text"),
        ({"text": 160, "image": 1}, {"text": "refuse", "images": "refuse"}, "image"),
        ({"text": 8, "image": 1}, {"text": "split", "images": "downscale", "min_tokens": 4}, "both"),
    ],
)
def test_a_budget_that_holds_nothing_says_which_one_would_do(values, made, refused, tmp_path, budget, oversize, word):
    rows = [json.loads(line) for line in made.pages.read_text().splitlines()[3:]]
    for row in rows:
        row["messages"][0]["content"] = "<image>" + row["messages"][0]["content"]
        row["images"] *= 2
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"sources": [{"path": str(tmp_path / "two.jsonl"), "root": str(made.pages.parent)}]}

    def values_of(**packing):
        return values(data=data, packing=packing)

    said = refused(values_of(budget=budget, oversize=oversize))
    assert f"none fit into a pack of {budget['text']} text and {budget['image']} image tokens" in said
    least, most = (
        dict(zip(("text", "image"), map(int, part.replace(",", "").split(" and ")), strict=True))
        for part in said.split("a packing.budget of ")[1].split(" all of them")[0].split(" would hold the smallest, ")
    )
    assert (least["text"] > budget["text"]) == (word != "image")
    # what it says does: with a token less, nothing fits; with the other, everything does
    for name in ("text", "image"):
        if least[name] > budget[name]:
            fewer = {**least, name: least[name] - 1}
            assert "none fit" in refused(values_of(budget=fewer, oversize=oversize))
    told = []
    check_run(parse_recipe(values_of(budget=least, oversize=oversize)), tmp_path / "x", on_message=told.append)
    for sentence in told:
        assert "fit into a pack" in sentence
    told.clear()
    check_run(parse_recipe(values_of(budget=most, oversize=oversize)), tmp_path / "x", on_message=told.append)
    assert not told


def test_a_budget_that_holds_few_is_told(values, made, tmp_path):
    lengths = [10, 200, 300]
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]} for n in lengths
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    packing = {"budget": {"text": 64, "image": 40}, "oversize": {"text": "refuse"}}
    source = {"sources": [{"path": str(tmp_path / "rows.jsonl")}]}
    told = []
    check_run(parse_recipe(values(packing=packing, data=source)), tmp_path / "run", on_message=told.append)
    (sentence,) = told
    assert "of the first 3 records" in sentence
    assert "1 fit into a pack of 64 text" in sentence


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_gone_on_from(values, made, tmp_path):
    out = tmp_path / "run"
    train(parse_recipe(values(optimisation={"steps": 2, "decay_steps": 0})), out)
    longer = values(optimisation={"steps": 3, "decay_steps": 0})
    check_run(parse_recipe(longer), out, resume=True)
    for changed, sentence in (
        ({"dataloader": {"num_workers": 2}}, "saved with 1 readers and cannot go on with 2"),
        ({"sharding": "fsdp"}, "was saved with sharding: ddp, not fsdp"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_run(parse_recipe({**longer, **changed}), out, resume=True)
    with pytest.raises(UserError, match="not saved by 2 processes"):
        check_run(parse_recipe(longer), out, resume=True, processes=2)
    moved = made.module.pages(tmp_path / "data", 5)
    with pytest.raises(UserError, match="The data changed"):
        check_run(parse_recipe({**longer, "data": {"sources": [{"path": str(moved)}]}}), out, resume=True)


def test_adapters_checkpoints_are_weighed_as_they_are(values, made):
    lora = {"rank": 2, "target_modules": ["q_proj"]}
    blocks = {"model": {"checkpoint": str(made.checkpoint), "lora": lora}, "optimisation": {"trainable": "as given"}}
    recipe = parse_recipe(values(**blocks))
    each, result = sizes(outline(recipe), recipe)
    plain = parse_recipe(values())
    assert each < sizes(outline(plain), plain)[0]
    loaded = load_model(recipe)
    assert (each, result) == sizes(loaded.model, recipe)
