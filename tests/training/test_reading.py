"""From files to recipes of either kind: bases, changes from the command line, and what is refused in one sentence."""

import re
from pathlib import Path

import pytest
import yaml

from casa.errors import UserError
from casa.models import FusionConfig
from casa.training.config import merged, open_recipe, parse_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def file(tmp_path, values):
    """Writes a recipe's values; blocks as `values` takes them."""

    def write(name="mine.yaml", content=None, **blocks):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values(**blocks) if content is None else content))
        return path

    return write


def test_shipped_recipes_are_read_and_written_back(shipped):
    recipe = open_recipe(shipped)
    assert recipe.name == shipped.stem
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


PAPER = {
    # steps, text and image tokens of a pack, what is trained (paper, section 4)
    "helium-2b-casa": (40_000, 2048, 20_480, "all"),
    "qwen2_5-vl-3b-adapt": (25_000, 2048, 20_480, "added"),
    "qwen2_5-vl-3b-video": (15_000, 3072, 46_080, "added"),
    "qwen2_5-vl-3b-livecc": (20_000, 3072, 30_720, "added"),
}


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers_and_twins_differ_in_how_they_see_alone(name):
    recipe = open_recipe(RECIPES / f"{name}.yaml")
    chosen, budget = recipe.optimisation, recipe.packing.budget
    assert (chosen.steps, budget.text, budget.image, chosen.trainable) == PAPER[name]
    assert (chosen.new_lr, chosen.existing_lr, chosen.tower_blocks) == (1e-4, 1e-5, 4)
    assert chosen.warmup_steps
    assert chosen.decay_steps
    for method in ("insertion", "cross-attention"):
        twin = open_recipe(RECIPES / "twins" / f"{name.removesuffix('-casa')}-{method}.yaml")
        one, other = recipe.to_dict(), twin.to_dict()
        if one["model"]["fusion"] is not None:
            assert other["model"]["fusion"]["method"] == method.replace("-", "_")
        for values in (one, other):
            values["model"].pop("fusion")
            values["model"].pop("checkpoint")
            values.pop("name")
            # see test_plan for what insertion trains in the place of fusion layers
            values["optimisation"].pop("trainable")
            values["optimisation"].pop("frozen")
        assert one == other


TINY = sorted((RECIPES / "tiny").glob("*.yaml"))


def test_tiny_twins_differ_in_how_they_see_alone():
    found = {path.stem: open_recipe(path).to_dict() for path in TINY}
    names = {values.pop("name"): values["model"]["fusion"].pop("method") for values in found.values()}
    assert names == {
        "tiny-casa": "casa",
        "tiny-cross-attention": "cross_attention",
        "tiny-insertion": "insertion",
        "tiny-adapt": "casa",
        "tiny-adapt-cross-attention": "cross_attention",
    }
    assert found["tiny-casa"] == found["tiny-cross-attention"] == found["tiny-insertion"]
    assert found["tiny-adapt"] == found["tiny-adapt-cross-attention"]
    # both routes learn from the same records, and are looked at alike
    for block in ("seed", "data", "spike_detection", "saving", "evaluation", "device"):
        assert found["tiny-casa"][block] == found["tiny-adapt"][block]
    assert found["tiny-adapt"]["evaluation"]["tasks"] == ["pages", "scenes", "stream"]
    assert found["tiny-adapt"]["optimisation"]["lr_overrides"] == {"^vision\\.": 3e-4}


def test_make_runs_every_tiny_recipe_on_the_data_that_they_name():
    target = (RECIPES.parent / "Makefile").read_text(encoding="utf-8").partition("\nresults-tiny:")[2]
    (names,) = re.findall(r"for name in ([\w -]+);", target)
    assert sorted(names.split()) == sorted(path.stem for path in TINY)
    made = re.compile(r"casa data make data/tiny(?:\.part)?((?: --\w+ \d+)+)")
    (one,), (other,) = made.findall(target), made.findall((RECIPES / "tiny" / "tiny-casa.yaml").read_text())
    assert one == other


def test_live_captions_are_two_frames_a_second_of_448_px():
    recipe = open_recipe(RECIPES / "qwen2_5-vl-3b-livecc.yaml")
    (source,) = recipe.data.sources
    assert (source.fps, source.frame_side, source.shape) == (2, 448, "live-whisperx")
    assert recipe.packing.oversize.images == "split"
    # its lines are lists, which `datasets` cannot stream
    assert not source.path.startswith("hub:")


def test_hub_sources_name_a_subset(shipped):
    """All hub sets of the recipes have several, and cannot be opened without one."""
    for source in open_recipe(shipped).data.sources:
        assert source.subset or not source.path.startswith("hub:")


def test_muon_and_spread_weights_are_refused_together(file):
    changes = ["optimisation.muon_lr=0.01", "sharding=fsdp"]
    with pytest.raises(UserError, match=r"optimisation\.muon_lr is 0\.01; it must be 0 with sharding: fsdp"):
        open_recipe(file(), changes)
    assert open_recipe(file(), changes[:1]).optimisation.muon_lr == 0.01


def test_changes_are_typed_by_what_they_change(file):
    changes = [
        "optimisation.steps=7",
        "optimisation.warmup_steps=0",
        "optimisation.new_lr=1e-3",
        "optimisation.frozen=[lm_head, embed]",
        "data.sources.0.weight=2",
        "data.sources.0.path=0123",  # a number to YAML, text here
        "model.lora.rank=4",
        "optimisation.trainable=as given",
        "model.max_pixels=null",
        "optimisation.lr_overrides={lm_head: 1e-6}",
    ]
    recipe = open_recipe(file(), changes)
    assert (recipe.optimisation.steps, recipe.optimisation.new_lr) == (7, 1e-3)
    assert recipe.optimisation.frozen == ("lm_head", "embed")
    assert recipe.optimisation.lr_overrides == {"lm_head": 1e-6}
    assert (recipe.data.sources[0].weight, recipe.data.sources[0].path) == (2, "0123")
    assert recipe.model.lora.rank == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("optimisation.stepz=3", "Unknown key 'stepz' in optimisation; did you mean 'steps'?"),
        ("optimization.steps=3", "did you mean 'optimisation'?"),
        ("optimisation.steps=many", "optimisation.steps must be a whole number, not 'many'."),
        ("optimisation.steps=0", "optimisation.steps is 0"),
        ("optimisation.frozen=['*proj']", "optimisation.frozen is '*proj'; it must be a regular expression"),
        ("optimisation.lr_overrides={'(': 1e-4}", "optimisation.lr_overrides is '('; it must be a regular expression"),
        ("optimisation.lr_overrides={head: -1}", "optimisation.lr_overrides.head is -1.0; it must be 0 or more."),
        ("optimisation.beta1=1.5", "optimisation.beta1 is 1.5; it must be from 0 to below 1."),
        ("optimisation.beta2=-0.1", "optimisation.beta2 is -0.1; it must be from 0 to below 1."),
        ("optimisation.muon_lr=-1", "optimisation.muon_lr is -1.0; it must be 0 or more."),
        ("evaluation.max_side=100", "evaluation.max_side is 100; it must be 112 or more, or null."),
        ("optimisation.weight_decay=-1", "optimisation.weight_decay is -1.0; it must be 0 or more."),
        ("optimisation.tower_blocks=-1", "optimisation.tower_blocks is -1; it must be 0 or more."),
        ("packing.oversize.min_tokens=0", "packing.oversize.min_tokens is 0; it must be 1 or more."),
        ("optimisation.steps=2024-13-01", "'2024-13-01' is no value that YAML can read; put it in quotes."),
        ("optimisation.steps", "is no setting; write it as in optimisation.steps=2000."),
        (".steps=3", "is no setting"),
        ("data.sources.1.path=x", "must be the number of an entry, from 0 to 0"),
        ("data.sources.first.path=x", "must be the number of an entry"),
        ("name.first=x", "name is a single value, and has no 'first' inside"),
        ("optimisation.frozen=[", "is no value that YAML can read"),
        ("model.lora.rank=4", "optimisation.trainable is 'all'; it must be as given, beside model.lora."),
        ("model.backbone=x", "model.backbone is 'x'; it must be left out, since a checkpoint has its own."),
        ("evaluation.every=5", "evaluation.every is 5; it must be 0, or beside data or tasks to measure."),
        ("evaluation.tasks=[page]", "evaluation.tasks[0] is 'page'; did you mean 'pages'?"),
        ("logging.report_to=[wand]", "did you mean 'wandb'?"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(file, change, sentence):
    with pytest.raises(UserError) as caught:
        open_recipe(file(), [change])
    assert sentence in str(caught.value)


def test_a_base_is_changed_block_by_block(file, values):
    file("base.yaml")
    path = file("twin.yaml", {"base": "base.yaml", "name": "twin", "optimisation": {"steps": 9}})
    wanted = parse_recipe(values(name="twin", optimisation={"steps": 9}))
    assert open_recipe(path) == wanted
    base = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    assert merged(base, {"a": {"c": [3]}, "d": 5}) == {"a": {"b": 1, "c": [3]}, "d": 5}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"base": "twin.yaml"}, "without a base of its own"),
        ({"base": "none.yaml"}, "There is no recipe"),
        ({"base": 3}, "must be the path of a recipe"),
        ([1], "block of keys and values"),
        ({"modell": {}}, "did you mean 'model'?"),
        ({}, "lacks the key 'optimisation'"),
    ],
)
def test_files_that_are_no_recipes(file, content, sentence):
    with pytest.raises(UserError) as caught:
        open_recipe(file("twin.yaml", content))
    assert sentence in str(caught.value)


def test_a_date_that_no_calendar_has_is_no_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: 2024-13-01\nmodel: {}\n")
    with pytest.raises(UserError, match=r"mine\.yaml is not valid YAML"):
        open_recipe(tmp_path / "mine.yaml")


def test_a_model_needs_a_source(values):
    with pytest.raises(UserError, match=r"model\.backbone is None; it must be a folder or hub name"):
        parse_recipe(values(model={"fusion": FusionConfig().to_dict()}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "could run code"),
        ("a: !!python/name:os.system", "could run code"),
        ("a: [1", "is not valid YAML near line 1"),
        ("- 1", "block of keys and values"),
        ("", "block of keys and values"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_files_that_hold_no_plain_values(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        open_recipe(path)
    assert "\n" not in str(refused.value)


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the path of a YAML file"):
        open_recipe(tmp_path / "none.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="is not valid YAML"):
        open_recipe(path)
