"""Settings from plain values: closed, typed dataclasses out of what YAML or JSON holds.

An unknown key is an error with a suggestion, a wrong type or an impossible value names its place, and nothing is
guessed. Training's recipes and the data share it.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any

from casa.errors import UserError

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class ImpossibleError(UserError):
    """A value out of range; `build` puts the place of the settings in front, where it is known."""


@dataclass(frozen=True)
class Bounds:
    """The range of a number, in the annotation of a field of `Settings`: `steps: Annotated[int, Bounds(ge=1)]`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a value is in the range."""
        above = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        return above and (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)

    def __str__(self) -> str:
        if self.ge is not None:
            return f"from {self.ge} to {self._upper()}" if self._upper() else f"{self.ge} or more"
        return f"above {self.gt}" + (f" and {self._upper('at most ')}" if self._upper() else "")

    def _upper(self, most: str = "") -> str:
        if self.lt is not None:
            return "finite" if self.lt == math.inf else f"below {self.lt}"
        return f"{most}{self.le}" if self.le is not None else ""


Positive = Annotated[int, Bounds(ge=1)]
NonNegative = Annotated[int, Bounds(ge=0)]
Rate = Annotated[float, Bounds(ge=0)]


class Settings:
    """A base of frozen dataclasses: every value is checked against the `Bounds` or `Literal` of its annotation."""

    def __post_init__(self) -> None:
        for name, choices in _choices_of(type(self)):
            if (value := getattr(self, name)) not in choices:
                raise ImpossibleError(_no_choice(name, value, choices), field=name)
        for name, bounds, optional in _bounds_of(type(self)):
            value = getattr(self, name)
            wanted = f"{bounds}{', or null' if optional else ''}"
            require(value is None or bounds.hold(value), name, value, wanted)


@lru_cache
def _bounds_of(kind: type) -> list[tuple[str, Bounds, bool]]:
    """Of each bounded field: name, bounds, and whether it may be None."""
    found = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        plain = typing.get_origin(hint) is Annotated
        for choice in (hint,) if plain else typing.get_args(hint):
            bounds = [entry for entry in getattr(choice, "__metadata__", ()) if isinstance(entry, Bounds)]
            found += [(name, entry, not plain) for entry in bounds]
    return found


@lru_cache
def _choices_of(kind: type) -> list[tuple[str, tuple[Any, ...]]]:
    """Of each field that is a `Literal`: name and choices."""
    hints = typing.get_type_hints(kind).items()
    return [(name, typing.get_args(hint)) for name, hint in hints if typing.get_origin(hint) is typing.Literal]


def require(holds: bool, name: str, value: Any, wanted: str) -> None:
    """For a dataclass's `__post_init__`: ImpossibleError unless the value of the field `name` makes sense."""
    if not holds:
        raise ImpossibleError(f"{name} is {shown(value)}; it must be {wanted}.", field=name)


def build(kind: Any, values: Any, at: str = "", what: str = "the settings") -> Any:
    """A `kind` (a dataclass) from a mapping of plain values.

    Fields may be int, float, str, bool, None, Literal, Any, unions of those, tuple[X, ...], dict[str, X], and
    further dataclasses.

    Args:
        at: The place of `values`, as sentences name it.
        what: Its name where `at` is empty.

    Raises:
        UserError: An unknown key (with "did you mean"), a missing, wrongly typed or impossible value.
    """
    where = at or what
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a block of keys and values, not {shown(values)}.")
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
        raise UserError(f"{at}.{error}" if at else str(error), field=() if at else error.fields) from error


def near(name: Any, known: Iterable[str], otherwise: str = "known keys:") -> str:
    """The end of a sentence about an unknown name: what was probably meant, or all that there is."""
    known = list(known)
    close = get_close_matches(str(name), known, 1)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise} {', '.join(known)}."


def shown(value: Any) -> str:
    """A value as sentences show it, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _no_choice(name: str, value: Any, choices: tuple[Any, ...]) -> str:
    return f"{name} is {shown(value)}; {near(value, map(str, choices), 'choose from')}"


def plain_values(value: Any) -> Any:
    """What `build` takes back: dataclasses as mappings, tuples as lists."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain_values(entry) for key, entry in value.items()}
    return [plain_values(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _value(kind: Any, value: Any, at: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
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
            raise UserError(_no_choice(at, value, arguments))
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
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text, since it has no dot
        with suppress(ValueError):
            value = float(value)
    # a bool is an int to Python, and not to a recipe
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not right or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{at} must be {_NAMES[kind]}, not {shown(value)}.")
    if kind is not float:
        return value
    number = float(value)
    if not math.isfinite(number):
        raise UserError(f"{at} is {number}; give a finite number.")
    return number
