"""From a file, and what the command line changes in it, to a recipe.

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
from casa.training.own.recipe import RunRecipe, parse_run_recipe

_LARGEST_FILE = 1_000_000  # bytes; a recipe is a page of text


def open_recipe(path: str | Path, changes: Sequence[str] = ()) -> RunRecipe:
    """The recipe in a file, with `key=value` changes: dotted keys, values as YAML reads them (text where text belongs).

    Raises UserError, in one sentence, for a file that is no recipe, and for a change that fits none.
    """
    values = _with_base(Path(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no recipe; it must be a block of keys and values.")
    for change in changes:
        _change(values, change, RunRecipe)
    return parse_run_recipe(values)


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


def read_yaml(path: str | Path) -> Any:
    """The plain values in a recipe's file. UserError for a file that is missing, too large, or no safe YAML."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no recipe {str(path)!r}; give the path of a YAML file, such as recipes/lora-own-data.yaml."
        )
    if path.stat().st_size > _LARGEST_FILE:
        raise UserError(f"{path} is larger than a recipe can be; give a YAML file of at most 1 MB.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        place = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(
            f"{path} holds a YAML tag that could run code{place}; a recipe may hold plain values only."
        ) from error
    # a date that no calendar has is a bare ValueError to PyYAML
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" near line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{place}; mend it there.") from error
    return values


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
