"""Settings from plain values: closed, typed dataclasses out of what YAML or JSON holds.

An unknown key is an error with a suggestion, a wrong type or an impossible value names its place, and nothing is
guessed. Rooms that read settings (training's recipes, the data) share it.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from casa.errors import UserError

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class ImpossibleError(UserError):
    """A value out of range; `build` puts the place of the settings in front, where it is known."""


def require(holds: bool, name: str, value: Any, wanted: str) -> None:
    """For a dataclass's `__post_init__`: ImpossibleError unless the value of the field `name` makes sense."""
    if not holds:
        raise ImpossibleError(f"{name} is {shown(value)}; it must be {wanted}.")


def build(kind: Any, values: Any, at: str = "", what: str = "the settings") -> Any:
    """A `kind` (a dataclass, or a class with `from_dict`) from a mapping of plain values.

    Fields may be int, float, str, bool, None, Literal, Any, unions of those, tuple[X, ...], dict[str, X], and
    further such classes. at: the place of `values`, as sentences name it. what: its name where `at` is empty.

    Raises:
        UserError: an unknown key (with "did you mean"), a missing, wrongly typed or impossible value.
    """
    where = at or what
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a block of keys and values, not {shown(values)}.")
    if (own := getattr(kind, "from_dict", None)) is not None:
        return own(values)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UserError(f"Unknown key {key!r} in {where}; {near(key, fields)}")
    types_of = typing.get_type_hints(kind)
    given = {}
    for name, described in fields.items():
        if name in values:
            given[name] = _value(types_of[name], values[name], f"{at}.{name}" if at else name)
        elif described.default is dataclasses.MISSING and described.default_factory is dataclasses.MISSING:
            raise UserError(f"{where} lacks the key {name!r}; add it.")
    make: Callable[..., Any] = kind
    try:
        return make(**given)
    except ImpossibleError as error:
        raise UserError(f"{at}.{error}" if at else str(error)) from error


def near(name: Any, known: Iterable[str], otherwise: str = "known keys:") -> str:
    """The end of a sentence about an unknown name: what was probably meant, or all that there is."""
    known = list(known)
    close = get_close_matches(str(name), known, 1)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise} {', '.join(known)}."


def shown(value: Any) -> str:
    """A value as sentences show it, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _value(kind: Any, value: Any, at: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) or hasattr(kind, "from_dict"):
        return build(kind, value, at)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{at} must be a list, not {shown(value)}.")
        return tuple(_value(arguments[0], entry, f"{at}[{i}]") for i, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise UserError(f"{at} must be a block of named values, not {shown(value)}.")
        return {key: _value(arguments[1], entry, f"{at}.{key}") for key, entry in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{at} is {shown(value)}; {near(value, map(str, arguments), 'choose from')}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        plain = [entry for entry in arguments if entry is not types.NoneType]
        # a union of several kinds is read as the first that the value fits
        for entry in plain[:-1]:
            try:
                return _value(entry, value, at)
            except UserError:
                continue
        return _value(plain[-1], value, at)
    if kind is Any:
        return value
    # a bool is an int to Python, and not to a recipe
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not right or (isinstance(value, bool) and kind is not bool):
        # YAML 1.1 reads 1e-3 as text, since it has no dot
        if kind is float and isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                pass
            else:
                return _finite(value, at)
        raise UserError(f"{at} must be {_NAMES[kind]}, not {shown(value)}.")
    return _finite(float(value), at) if kind is float else value


def _finite(value: float, at: str) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"{at} is {value}; give a finite number.")
    return value
