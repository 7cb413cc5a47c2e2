"""Every shipped recipe, dry-run on tiny stand-ins: the plan counts right, and the first batch is drawn."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from casa.data import SourceSettings
from casa.errors import UserError
from casa.models import FusionConfig
from casa.training.config import ModelSettings, open_recipe, parse_recipe
from casa.training.models import load_model, outline
from casa.training.optimizer import choose_trained, group_sizes, set_precision
from casa.training.plan import make_plan, plan_tables, show_first_pack

RECIPES = Path(__file__).parents[2] / "recipes"


def on_standins(recipe, made):
    """The recipe with tiny models and local records in the place of the hub's."""
    model = recipe.model
    if model.checkpoint is not None:
        model = replace(model, checkpoint=str(made.adapted))
    elif model.vision is not None:
        model = replace(model, backbone=str(made.text), vision=str(made.tower))
    else:
        ours = model.backbone.startswith("runs/")
        model = replace(model, backbone=str(made.insertion if ours else made.vlm))
    if model.processor is not None:
        model = replace(model, processor=str(made.checkpoint))
    sources = tuple(SourceSettings(str(made.pages), weight=source.weight) for source in recipe.data.sources)
    return replace(recipe, model=model, data=replace(recipe.data, sources=sources))


@pytest.mark.slow
def test_every_recipe_has_a_plan_and_a_first_batch(shipped, made, tmp_path):
    recipe = on_standins(open_recipe(shipped), made)
    plan = make_plan(recipe, processes=2)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(plan_tables(plan))
    told = console.export_text()
    assert f"{recipe.optimisation.steps:,}: {recipe.optimisation.warmup_steps:,} rising" in told
    assert plan.files == [1] * len(recipe.data.sources)
    rates = {name: rate for name, rate, _ in plan.groups}
    assert rates.get("frozen") is None
    assert rates.get("muon", 0) == recipe.optimisation.muon_lr
    if "new" in rates:
        assert rates["new"] == recipe.optimisation.new_lr
    else:
        # nothing is new; or CASA's matrices are, which go by Muon, and the projector of what it adapts is frozen
        only_matrices = "muon" in rates and r"^projector\." in recipe.optimisation.frozen
        assert only_matrices or "insertion" in recipe.name
    assert ("frozen" in rates) == (recipe.optimisation.trainable != "all" or bool(recipe.optimisation.frozen))
    page = tmp_path / "batch.html"
    batch = show_first_pack(recipe, page)
    assert batch.facts["text_tokens"] <= recipe.packing.budget.text
    shown = page.read_text(encoding="utf-8")
    assert f"{recipe.name}: the first packed batch" in shown
    assert shown.count("<img ") > 0
    assert f"{batch.facts['learned']:,} learned" in shown or batch.facts["samples"] > 1


@pytest.mark.parametrize("lora", [None, {"rank": 2}, {"rank": 2, "added": "adapters"}])
def test_an_outline_counts_what_is_loaded(values, made, lora):
    optimisation = {"trainable": "added" if lora is None else "as given", "tower_blocks": 1, "precision": "bfloat16"}
    model = {"backbone": str(made.vlm), "fusion": {"every": 2}, "lora": lora}
    recipe = parse_recipe(values(model=model, optimisation=optimisation))
    loaded = load_model(recipe).model
    choose_trained(loaded, recipe.optimisation)
    set_precision(loaded, recipe.optimisation)
    plan = make_plan(recipe)
    assert plan.groups == group_sizes(loaded, recipe.optimisation)
    parameters = list(loaded.parameters())
    assert plan.memory["weights"] == sum(p.numel() * p.element_size() for p in parameters)
    assert plan.memory["gradients"] == sum(4 * p.numel() for p in parameters if p.requires_grad)
    assert plan.memory["moments"] == 2 * plan.memory["gradients"]


def test_muon_keeps_one_moment_of_its_matrices(values):
    plan = make_plan(parse_recipe(values(optimisation={"muon_lr": 0.01})))
    ((rate, count),) = [(rate, count) for name, rate, count in plan.groups if name == "muon"]
    assert rate == 0.01
    assert plan.memory["moments"] == 2 * plan.memory["gradients"] - 4 * count
    assert plan.memory["work space of Muon"] == 4 * 4 * count


def test_published_models_are_planned_without_being_fetched(values):
    """Qwen2.5-VL-3B's parameters, as analysis counts them from its shape."""
    model = {"backbone": "Qwen/Qwen2.5-VL-3B-Instruct"}
    optimisation = {"trainable": "added", "precision": "bfloat16"}
    plan = make_plan(parse_recipe(values(model=model, optimisation=optimisation)))
    counts = {name: count for name, _, count in plan.groups}
    # 36 layers of 2 x 2048 x 2048 + 2 x 2048 x 256 weights and 2048 + 2 x 256 biases
    assert counts["new"] == 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 2048 + 2 * 256)
    assert 3.5e9 < counts["frozen"] + counts["existing"] < 3.9e9


def test_insertion_twins_train_the_text_model_and_as_much_of_the_tower():
    """Where their bases train fusion layers. Names are those of the published model; there are no weights."""
    base = open_recipe(RECIPES / "qwen2_5-vl-3b-adapt.yaml")
    published, tower = str(base.model.backbone), "backbone.model.visual."
    fused, inserted = (
        outline(replace(base, model=ModelSettings(backbone=published, fusion=FusionConfig(method=method))))
        for method in ("casa", "insertion")
    )

    def trained(model, recipe):
        choose_trained(model, recipe.optimisation)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        of_tower = {name for name in names if name.startswith(tower)}
        return of_tower, names - of_tower

    text = {name for name, _ in inserted.named_parameters() if not name.startswith(tower)}
    for name in ("adapt", "video", "livecc"):
        seen, new = trained(fused, open_recipe(RECIPES / f"qwen2_5-vl-3b-{name}.yaml"))
        twin = trained(inserted, open_recipe(RECIPES / "twins" / f"qwen2_5-vl-3b-{name}-insertion.yaml"))
        assert twin == (seen, text)
        assert {name.removeprefix(tower).split(".")[1] for name in seen} == {"28", "29", "30", "31"}
        assert all(name.startswith("casa_layers.") for name in new)


def test_a_model_that_is_not_there(values, tmp_path):
    recipe = parse_recipe(values(model={"checkpoint": str(tmp_path / "none")}))
    with pytest.raises(UserError, match="there is no model at"):
        make_plan(recipe)


def test_lora_on_data_of_ones_own_fits_one_gpu_of_24_gb(made):
    recipe = open_recipe(RECIPES / "lora-own-data.yaml", [f"data.sources.0.path={made.pages}"])
    plan = make_plan(recipe)
    # the input of each block, in two bytes a number
    assert plan.memory["inputs of blocks, kept for the backward pass"] == 36 * recipe.packing.budget.text * 2048 * 2
    assert plan.memory_bytes < 20e9
