"""Recipes: what is right is read, and what is wrong is refused in one sentence that names it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.errors import UserError
from casa.training.recipe import Recipe, load_recipe, parse_recipe, recipe_values

SHIPPED = [Path(__file__).parents[2] / "recipes" / "casa-tiny.yaml"]


@pytest.fixture
def values() -> dict[str, Any]:
    steps = {"steps": 3}
    return {
        "name": "micro",
        "text": {"model": {"hidden_size": 32}, "optimisation": dict(steps)},
        "tower": {
            "model": {"depth": 1},
            "optimisation": {"steps": 3, "muon": 0.01},
            "mix": {"pages": 1},
            "sizes": [{"until": 1, "smallest": 112, "largest": 140}],
            "channels": {"digit": 1.0},
        },
        "fusion": {"optimisation": dict(steps), "mix": {"pages": 1}, "batch": {"pages": 4}},
    }


def test_shipped_recipes_are_read() -> None:
    assert SHIPPED
    for path in SHIPPED:
        recipe = load_recipe(path)
        assert isinstance(recipe, Recipe)
        assert parse_recipe(recipe_values(recipe)) == recipe


def test_a_recipe_and_its_values_are_one(values: dict[str, Any]) -> None:
    recipe = parse_recipe(values)
    assert recipe.tower.sizes[0].largest == 140
    assert recipe.tower.mix == {"pages": 1.0}
    plain = yaml.safe_load(yaml.safe_dump(_lists(recipe_values(recipe))))
    assert parse_recipe(plain) == recipe


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("sed",), 3, "Unknown key 'sed' in the recipe; did you mean 'seed'?"),
        (("tower", "optimisation", "stepz"), 3, "Unknown key 'stepz' in tower.optimisation; did you mean 'steps'?"),
        (("tower", "sizes", 0, "until"), 2, "tower.sizes[0].until is 2.0; it must be above 0, at most 1."),
        (("tower", "sizes", 0, "smallest"), 100, "tower.sizes[0].smallest is 100; it must be a multiple of 28 px."),
        (("tower", "sizes", 0, "patches"), 3, "tower.sizes[0].patches is 3; it must be 16 or more."),
        (("tower", "sizes"), [], "tower.sizes is []; it must be one entry or more."),
        (("tower", "mix"), {}, "tower.mix is {}; it must be a block with at least one entry."),
        (("tower", "mix"), {"pages": -1}, "tower.mix.pages is -1.0; it must be above 0."),
        (("tower", "smoothing"), 1, "tower.smoothing is 1.0"),
        (("text", "vocabulary"), 10, "text.vocabulary is 10"),
        (("text", "optimisation", "steps"), 0, "text.optimisation.steps is 0; it must be 1 or more."),
        (("text", "optimisation", "steps"), 2.5, "text.optimisation.steps must be a whole number, not 2.5."),
        (("text", "optimisation", "steps"), True, "text.optimisation.steps must be a whole number, not True."),
        (("text", "optimisation", "rate"), "fast", "text.optimisation.rate must be a number, not 'fast'."),
        (("text", "optimisation", "rate"), float("nan"), "text.optimisation.rate is nan; give a finite number."),
        (("text", "model"), 3, "text.model must be a block of named values, not 3."),
        (("text",), [1], "text must be a block of keys and values, not [1]."),
        (("fusion", "fusion"), {"placement": "paralel"}, "Did you mean 'parallel'?"),
        (("tower", "exact"), ["shade"], "tower.exact is 'shade'; it must be one of the channels"),
        (("fusion", "dropout"), 1.0, "fusion.dropout is 1.0; it must be from 0 to below 1"),
        (("fusion", "batch"), {"scenes": 3}, "fusion.batch is 'scenes'; it must be a source of the mix (pages)."),
        (("seed",), -1, "seed is -1; it must be 0 or more."),
        (("name",), 3, "name must be text, not 3."),
    ],
)
def test_what_is_wrong_is_refused(values: dict[str, Any], path: tuple, value: Any, message: str) -> None:
    inner: Any = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UserError) as refused:
        parse_recipe(values)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", [("name",), ("text",), ("text", "model"), ("tower", "optimisation", "steps")])
def test_what_is_missing_is_named(values: dict[str, Any], path: tuple[str, ...]) -> None:
    inner: Any = values
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(UserError, match=f"lacks the key '{path[-1]}'"):
        parse_recipe(values)


def test_numbers_that_yaml_takes_for_text_are_numbers(values: dict[str, Any]) -> None:
    values["text"]["optimisation"]["rate"] = yaml.safe_load("1e-3")
    assert parse_recipe(values).text.optimisation.rate == 1e-3


@settings(max_examples=40, deadline=None)
@given(junk=st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)))
def test_junk_is_refused_in_plain_words(junk: Any) -> None:
    with pytest.raises(UserError):
        parse_recipe(junk)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "could run code"),
        ("a: !!python/name:os.system", "could run code"),
        ("a: [1", "is not valid YAML near line 1"),
        ("- 1", "must be a block of keys and values"),
        ("", "must be a block of keys and values"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        load_recipe(path)
    assert "\n" not in str(refused.value)


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the path of a YAML file"):
        load_recipe(tmp_path / "none.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_recipe(path)


def test_values_are_copies(values: dict[str, Any]) -> None:
    before = copy.deepcopy(values)
    parse_recipe(values)
    assert values == before
