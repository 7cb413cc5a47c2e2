"""What `casa_attention` refuses before any implementation sees it, and in which words."""

import subprocess
import sys

import pytest
import torch

from casa.attention import casa_attention, flex, implementations, varlen
from casa.attention.common import AttentionRequest
from casa.attention.dispatch import choose, refusal
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
        ({"impl": "spda"}, "known are auto, reference, sdpa, flex, varlen. Did you mean 'sdpa'"),
        ({"impl": "varlen"}, "varlen is a CUDA kernel and the tensors are on cpu; use impl='sdpa'"),
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


def test_auto_is_sdpa_on_a_cpu(tools):
    args = tools.tensors(LAYOUT)
    assert choose(asked(device="cpu", dtype=torch.bfloat16)) == "sdpa"
    assert torch.equal(casa_attention(*args, LAYOUT), casa_attention(*args, LAYOUT, impl="sdpa"))


def test_a_past_asks_for_fewer_queries(tools):
    layout = WindowLayout.from_insertions([3], [[(1, 2)]], past=[2])
    args = tools.tensors(LAYOUT)
    with pytest.raises(ValueError, match=r"ask for \(1, 4, 4\)"):
        casa_attention(*args, layout)


def asked(device="cuda", dtype=torch.bfloat16, width=64, turning=False, backward=True):
    return AttentionRequest(LAYOUT, dtype, torch.device(device), width, "both", turning, backward)


@pytest.fixture
def modern_gpu(monkeypatch):
    """What the machine is asked about its GPU and Triton, answered without either."""
    monkeypatch.setattr(varlen, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(flex, "_has_triton", lambda: True)


@pytest.mark.usefixtures("modern_gpu")
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "varlen"),
        ({"dtype": torch.float16, "turning": True, "backward": False}, "varlen"),
        ({"dtype": torch.float32}, "flex"),
        ({"width": 20}, "flex"),
        ({"width": 512}, "flex"),
        ({"dtype": torch.float32, "backward": False}, "sdpa"),
        ({"dtype": torch.float32, "turning": True}, "sdpa"),
        ({"dtype": torch.float32, "width": 8}, "sdpa"),
        ({"dtype": torch.float64}, "sdpa"),
        ({"device": "mps"}, "sdpa"),
    ],
)
def test_auto_on_a_gpu_is_the_first_that_does_not_refuse(change, name):
    assert choose(asked(**change)) == name


def test_auto_on_an_old_gpu_and_without_triton(modern_gpu, monkeypatch):
    monkeypatch.setattr(varlen, "_capability", lambda device: (7, 5))
    assert choose(asked()) == "flex"
    monkeypatch.setattr(flex, "_has_triton", lambda: False)
    assert choose(asked()) == "sdpa"


@pytest.mark.usefixtures("modern_gpu")
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("varlen", {"device": "cpu"}, "CUDA kernel"),
        ("varlen", {"dtype": torch.float32}, "not torch.float32; use impl='sdpa'"),
        ("varlen", {"width": 20}, "not 20"),
        ("flex", {"device": "cpu"}, "no backward on CPU"),
        ("flex", {"device": "mps"}, "the tensors are on mps"),
        ("flex", {"turning": True}, "cannot turn"),
        ("flex", {"dtype": torch.float64}, "not torch.float64"),
        ("flex", {"width": 8}, "at least 16"),
    ],
)
def test_every_refusal_names_the_reason_and_the_remedy(name, change, words):
    reason = refusal(name, asked(**change))
    assert reason is not None
    assert words in reason
    assert name in reason
    assert "use impl='sdpa'" in reason
    assert refusal("sdpa", asked(**change)) is None
    assert refusal("reference", asked(**change)) is None


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_what_is_asked_is_what_the_arguments_say(tools, monkeypatch, impl):
    """A refusal sees the call as it is, and is never passed over."""
    seen = []
    monkeypatch.setattr(
        "casa.attention.dispatch.refusal", lambda name, request: seen.append((name, request)) or "no, thanks"
    )
    layout = WindowLayout.from_insertions([3], [[(1, 2)]], history=1)
    args = tools.tensors(layout, D=8)
    with pytest.raises(UserError, match="no, thanks"):
        casa_attention(*args, layout, attend="image", impl=impl, turn=lambda key, delta: key)
    with torch.no_grad(), pytest.raises(UserError):
        casa_attention(*args, layout, impl=impl)
    cpu = torch.device("cpu")
    assert seen == [
        (impl, AttentionRequest(layout, torch.float64, cpu, 8, "image", turning=True, backward=True)),
        (impl, AttentionRequest(layout, torch.float64, cpu, 8, "both", turning=False, backward=False)),
    ]


LOADED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"casa.attention.{name}")
    print(*[other for other in sys.argv[1:] if f"casa.attention.{other}" in sys.modules])
    for module in [module for module in sys.modules if module.partition(".")[0] == "casa"]:
        del sys.modules[module]
"""


@pytest.mark.slow
def test_no_implementation_loads_another():
    names = list(implementations())
    done = subprocess.run([sys.executable, "-c", LOADED, *names], capture_output=True, text=True, check=True)
    assert done.stdout.split() == names


def test_under_autocast_all_are_taken_to_its_precision():
    layout = WindowLayout.from_insertions([4], [[(1, 2)]])
    torch.manual_seed(0)
    query, text, image = torch.randn(4, 2, 8), torch.randn(4, 2, 8), torch.randn(2, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = casa_attention(query, text, text.bfloat16(), image.bfloat16(), image, layout)
    assert found.dtype == torch.bfloat16
    wanted = casa_attention(query, text, text, image, image, layout)
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="one dtype"):
        casa_attention(query, text, text.bfloat16(), image, image, layout)
