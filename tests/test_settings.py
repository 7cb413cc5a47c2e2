"""Settings from plain values: what is right is read, and what is wrong is refused in one sentence that names it."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.errors import UserError
from casa.settings import build, require


@dataclass(frozen=True)
class Span:
    until: float
    side: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.until <= 1, "until", self.until, "above 0, at most 1")


@dataclass(frozen=True)
class Stage:
    steps: int
    spans: tuple[Span, ...]
    model: dict[str, Any]
    lr: float = 1e-3
    shape: Literal["linear", "cosine"] = "linear"
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole:
    name: str
    stage: Stage
    seed: int = 1


@pytest.fixture
def values() -> dict[str, Any]:
    return {"name": "micro", "stage": {"steps": 3, "spans": [{"until": 1, "side": 140}], "model": {"depth": 1}}}


def read(values: Any) -> Whole:
    return build(Whole, values, what="the recipe")


def test_what_is_right_is_read(values: dict[str, Any]) -> None:
    before = copy.deepcopy(values)
    assert read(values) == Whole("micro", Stage(3, (Span(1.0, 140),), {"depth": 1}))
    assert values == before


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("sed",), 3, "Unknown key 'sed' in the recipe; did you mean 'seed'?"),
        (("stage", "stepz"), 3, "Unknown key 'stepz' in stage; did you mean 'steps'?"),
        (("stage", "spans", 0, "until"), 2, "stage.spans[0].until is 2.0; it must be above 0, at most 1."),
        (("stage", "steps"), 2.5, "stage.steps must be a whole number, not 2.5."),
        (("stage", "steps"), True, "stage.steps must be a whole number, not True."),
        (("stage", "lr"), "fast", "stage.lr must be a number, not 'fast'."),
        (("stage", "lr"), math.nan, "stage.lr is nan; give a finite number."),
        (("stage", "model"), 3, "stage.model must be a block of named values, not 3."),
        (("stage", "shares"), {"a": "b"}, "stage.shares.a must be a number, not 'b'."),
        (("stage", "spans"), {"until": 1}, "stage.spans must be a list"),
        (("stage", "shape"), "cosinus", "stage.shape is 'cosinus'; did you mean 'cosine'?"),
        (("stage",), [1], "stage must be a block of keys and values, not [1]."),
        (("name",), 3, "name must be text, not 3."),
    ],
)
def test_what_is_wrong_is_refused(values: dict[str, Any], path: tuple, value: Any, message: str) -> None:
    inner: Any = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UserError) as refused:
        read(values)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", [("name",), ("stage",), ("stage", "model"), ("stage", "spans", 0, "until")])
def test_what_is_missing_is_named(values: dict[str, Any], path: tuple) -> None:
    inner: Any = values
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(UserError, match=f"lacks the key '{path[-1]}'"):
        read(values)


def test_numbers_that_yaml_takes_for_text_are_numbers(values: dict[str, Any]) -> None:
    values["stage"]["lr"] = yaml.safe_load("1e-3")
    assert read(values).stage.lr == 1e-3


@settings(max_examples=40, deadline=None)
@given(junk=st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)))
def test_junk_is_refused_in_plain_words(junk: Any) -> None:
    with pytest.raises(UserError):
        read(junk)
