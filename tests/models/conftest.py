"""The variants that every promise is tried on, as tiny float64 models, and what the tests compare with."""

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from casa.testing import TinySample, tiny_casa
from tests.few import few_first

FUSIONS = {
    "parallel": {},
    "before": {"placement": "before"},
    "replace": {"placement": "replace", "every": 2},
    "replace first": {"placement": "replace", "layers": [0]},
    "shared": {"share_weights": True},
    "before shared": {"placement": "before", "share_weights": True},
    "gated": {"gate": "tanh", "every": 2},
    "history 1": {"history": 1},
    "history all": {"history": -1, "placement": "before"},
    "sample": {"split": "sample"},
    "replace sample": {"placement": "replace", "every": 2, "split": "sample"},
    "replace history": {"placement": "replace", "every": 2, "history": 1},
    "cross": {"method": "cross_attention"},
    "cross shared": {"method": "cross_attention", "share_weights": True},
    "cross gated before": {"method": "cross_attention", "gate": "tanh", "placement": "before"},
    "cross replace": {"method": "cross_attention", "placement": "replace", "every": 2},
    "cross sample": {"method": "cross_attention", "split": "sample"},
    "cross history": {"method": "cross_attention", "history": 1},
    "insertion": {"method": "insertion"},
}
# one of each kind, for what is slow to try
FEW = ("parallel", "replace sample", "history 1", "cross gated before", "insertion")


FAMILIES = ("llama", "gemma3_text", "qwen2_5_vl", "smolvlm")

# ids from 3 on: 0 pads, 1 and 2 open and stop
SAMPLES = (
    TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)), seed=10),
    TinySample((7, 30, 11, 12), (), seed=20),
    TinySample((40, 6, 13, 22, 50), ((0, 2, 2), (0, 1, 1), (3, 3, 1)), seed=30),
    TinySample((19, 3, 28), ((3, 1, 3),), seed=40),
)


@pytest.fixture(autouse=True, scope="module")
def offline() -> Iterator[None]:
    """No test of a model asks for another machine, not even one that would take the answer for an absent file."""
    asked: list[str] = []
    found = socket.getaddrinfo

    def ask(host, *args, **kwargs):
        if host in ("localhost", "127.0.0.1"):
            return found(host, *args, **kwargs)
        asked.append(str(host))
        raise OSError(f"tests of models are offline, and this one asks for {host}")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", ask)
        yield
    assert not asked, f"asked for {sorted(set(asked))}"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Callable[..., str]:
    """Puts a folder into a hub's cache as the hub's client keeps it, and gives its name there. No way to the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(folder: Path, revision: str = "main") -> str:
        repository = tmp_path / "cache" / "models--someone--model"
        commit = {"main": "a" * 40, "v2": "b" * 40}[revision]
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        return "someone/model"

    return put


@pytest.fixture(scope="session")
def casa_of() -> Callable:
    """The model of a variant, made once; tests leave it as it was."""
    made = {}

    def model(name: str):
        if name not in made:
            made[name] = tiny_casa(**FUSIONS[name])
        return made[name]

    return model


@pytest.fixture(params=few_first(FUSIONS, FEW))
def model(request, casa_of):
    """Every variant in turn."""
    return casa_of(request.param)


@pytest.fixture(params=few_first([name for name in FUSIONS if name != "insertion"], FEW))
def fused(request, casa_of):
    """Every variant that keeps images out of the text stream."""
    return casa_of(request.param)


@pytest.fixture(params=FEW)
def few(request, casa_of):
    """One variant of each kind."""
    return casa_of(request.param)


@pytest.fixture
def samples() -> tuple[TinySample, ...]:
    """Two pictures apart; no picture; two pictures as one run and a third; a picture after all text."""
    return SAMPLES


@pytest.fixture
def close() -> Callable:
    """Equal up to the order of float64 sums; a wrong mask is off by 1e-3 and more."""

    def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)

    return check
