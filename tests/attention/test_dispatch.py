"""What `casa_attention` refuses before any implementation sees it, and in which words."""

import subprocess
import sys

import pytest
import torch

from casa.attention import casa_attention, implementations
from casa.errors import UserError
from casa.windows import WindowLayout

LAYOUT = WindowLayout.from_insertions([3], [[(1, 2)]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.zeros(3, 3, 4)}, "3 query heads cannot share 2 key heads"),
        ({"query": torch.zeros(2, 4, 4)}, r"query has shape \(2, 4, 4\)"),
        ({"query": torch.zeros(3, 4)}, "3 dimensions"),
        ({"text_key": torch.zeros(3, 2, 5)}, "text_key has shape"),
        ({"text_value": torch.zeros(4, 2, 4)}, "text_value has shape"),
        ({"image_key": torch.zeros(2, 1, 4)}, "image_key has shape"),
        ({"image_value": torch.zeros(2, 2, 4, dtype=torch.float64)}, "image_value is torch.float64"),
        ({"image_key": torch.zeros(2, 2, 4, device="meta")}, "image_key is on meta"),
        ({"attend": "text"}, "'both'"),
        ({"impl": "spda"}, "known are auto, reference, sdpa, flex. Did you mean 'sdpa'"),
        ({"impl": "varlen"}, "known are"),
    ],
)
def test_refusals(change, words):
    sizes = {"query": (3, 4), "text_key": (3, 2), "text_value": (3, 2), "image_key": (2, 2), "image_value": (2, 2)}
    args = {name: torch.zeros(*size, 4) for name, size in sizes.items()}
    with pytest.raises(ValueError, match=words):
        casa_attention(**{**args, "layout": LAYOUT, **change})


def test_unknown_names_are_the_users_to_mend(tools):
    with pytest.raises(UserError):
        casa_attention(*tools.tensors(LAYOUT), LAYOUT, impl="fast")


def test_integers_are_refused():
    args = [torch.zeros(n, h, 4, dtype=torch.int64) for n, h in [(3, 4), (3, 2), (3, 2), (2, 2), (2, 2)]]
    with pytest.raises(ValueError, match="floating"):
        casa_attention(*args, LAYOUT)


def test_auto_is_sdpa(tools):
    args = tools.tensors(LAYOUT)
    assert torch.equal(casa_attention(*args, LAYOUT), casa_attention(*args, LAYOUT, impl="sdpa"))


def test_a_past_asks_for_fewer_queries(tools):
    layout = WindowLayout.from_insertions([3], [[(1, 2)]], past=[2])
    args = tools.tensors(LAYOUT)
    with pytest.raises(ValueError, match=r"ask for \(1, 4, 4\)"):
        casa_attention(*args, layout)


@pytest.mark.parametrize("name", implementations())
def test_no_implementation_loads_another(name):
    others = [f"casa.attention.{other}" for other in implementations() if other != name]
    code = f"import sys, casa.attention.{name}; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
