"""From a file, and what the command line changes in it, to a recipe of either kind.

A recipe may begin with `base: other.yaml` and then holds only what differs. Blocks are merged key by key, lists and
single values replace those of the base. A base has no base of its own: what a recipe says stands in two files at most.
"""

import copy
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from casa.errors import UserError
from casa.settings import near
from casa.training.own.recipe import RunRecipe, parse_run_recipe
from casa.training.recipe import Recipe, parse_recipe, read_yaml

# blocks that tell the kinds of recipes apart
_OWN = ("model", "data")
_STAGES = ("text", "tower", "fusion")


def open_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe | RunRecipe:
    """The recipe in a file, with `key=value` changes: dotted keys, values as YAML reads them (text where text belongs).

    A RunRecipe if it has the blocks model and data, casa-tiny's stages if it has those.
    Raises UserError, in one sentence, for a file that is no recipe, and for a change that fits none.
    """
    values = _with_base(Path(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no recipe; it must be a block of keys and values.")
    kind = _kind(values, path)
    for change in changes:
        _change(values, change, kind)
    return parse_run_recipe(values) if kind is RunRecipe else parse_recipe(values)


def _with_base(path: Path) -> Any:
    values = read_yaml(path)
    if not isinstance(values, dict) or "base" not in values:
        return values
    name = values.pop("base")
    if not isinstance(name, str):
        raise UserError(f"base in {path} must be the path of a recipe, not {name!r}.")
    base: Any = read_yaml(path.parent / name)
    if not isinstance(base, dict) or "base" in base:
        raise UserError(f"{path} is based on {name}, which must be a recipe without a base of its own.")
    return merged(base, values)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """base with the changes put over it, block by block."""
    found = copy.deepcopy(dict(base))
    for key, value in changes.items():
        before = found.get(key)
        if isinstance(before, dict) and isinstance(value, Mapping):
            found[key] = merged(before, value)
        else:
            found[key] = copy.deepcopy(value)
    return found


def _known() -> list[str]:
    """The keys of both kinds."""
    return [field.name for kind in (RunRecipe, Recipe) for field in dataclasses.fields(kind)]


def _kind(values: dict[str, Any], path: Any) -> type[Recipe] | type[RunRecipe]:
    own, stages = (any(key in values for key in keys) for keys in (_OWN, _STAGES))
    if own and not stages:
        return RunRecipe
    if stages and not own:
        return Recipe
    what = "blocks of both kinds" if own else "neither"
    hint = "" if own else "; " + near(next(iter(values), ""), _known())
    raise UserError(
        f"{path} is no recipe: one for your own data has the blocks model and data, casa-tiny's has text, tower and "
        f"fusion, and this has {what}{hint.rstrip('.')}."
    )


def _change(values: dict[str, Any], change: str, kind: Any) -> None:
    """Puts one KEY=VALUE into plain values. What is unknown or impossible is left to be refused with the rest."""
    key, equals, text = (part.strip() for part in change.partition("="))
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {change!r} is no setting; write it as in --set optimisation.steps=2000.")
    *blocks, last = key.split(".")
    place: Any = values
    for number, name in enumerate(blocks):
        at = ".".join(blocks[: number + 1])
        if isinstance(place, list):
            place = place[_index(name, place, at, change)]
        else:
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
        if not isinstance(place, (dict, list)):
            raise UserError(f"--set {change}: {at} is a single value, and has no {last!r} inside.")
    value = _read(text, _type_at(kind, [*blocks, last]), change)
    if isinstance(place, list):
        place[_index(last, place, key, change)] = value
    else:
        place[last] = value


def _index(name: str, entries: list[Any], at: str, change: str) -> int:
    if not name.isdecimal() or int(name) >= len(entries):
        raise UserError(f"--set {change}: {at} must be the number of an entry, from 0 to {len(entries) - 1}.")
    return int(name)


def _read(text: str, kind: Any, change: str) -> Any:
    if kind is str:
        return text
    try:
        return yaml.safe_load(text)
    # a date that no calendar has is a bare ValueError to PyYAML
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--set {change}: {text!r} is no value that YAML can read; put it in quotes.") from error


def _type_at(kind: Any, path: Sequence[str]) -> Any:
    """What a key holds, as the settings declare it; None where they do not tell."""
    for name in path:
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            plain = [entry for entry in typing.get_args(kind) if entry is not types.NoneType]
            kind = plain[0] if len(plain) == 1 else None
        if typing.get_origin(kind) in (tuple, dict):
            kind = typing.get_args(kind)[0 if typing.get_origin(kind) is tuple else 1]
        elif dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        else:
            return None
    return kind
