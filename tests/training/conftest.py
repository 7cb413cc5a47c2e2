"""Records of drawn pictures, for tests of what is made of them; small runs as recipes, and the models they name."""

import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from casa.data.record import Message, Origin, Picture, Record, Text

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPT = Path(__file__).with_name("small_run.py")


def drawn(width: int, height: int, seed: int = 0, kind: str = "PNG") -> bytes:
    """An encoded picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, kind)
    return held.getvalue()


@pytest.fixture
def picture() -> Callable[..., Picture]:
    """A picture of so many px: picture(width, height, seed, time=None)."""

    def make(width: int = 56, height: int = 28, seed: int = 0, time: float | None = None) -> Picture:
        return Picture(drawn(width, height, seed), time)

    return make


@pytest.fixture
def chat() -> Callable[..., Record]:
    """A record of turns: chat(("user", picture, "read it"), ("assistant", "407"), line=3)."""

    def make(*turns: tuple, line: int = 1) -> Record:
        messages = []
        for role, *parts in turns:
            messages.append(Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts)))
        return Record(tuple(messages), Origin("drawn.jsonl", line))

    return make


def _module():
    spec = importlib.util.spec_from_file_location("standins", Path(__file__).with_name("standins.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Paths of what recipes name: text, tower, vlm, checkpoint, insertion; adapted, which is made of vlm; and pages, a
    file of records of which three are bad. module: standins.py, which makes them."""
    folder, module = tmp_path_factory.mktemp("standins"), _module()
    paths = {name: getattr(module, name)(folder / name) for name in ("vlm", "tower", "checkpoint", "insertion")}
    paths["text"] = module.text_model(folder / "text")
    paths["adapted"] = module.adapted(folder / "adapted", paths["vlm"])
    return SimpleNamespace(**paths, pages=module.pages(folder / "data", 24, bad=3), module=module)


@pytest.fixture
def values(made):
    """A small run as plain values, over a checkpoint; changes are given by block."""

    def make(**blocks):
        base = {
            "name": "small",
            "model": {"checkpoint": str(made.checkpoint)},
            "data": {"sources": [{"path": str(made.pages)}]},
            "packing": {"budget": {"text": 160, "image": 40}, "buffer_size": 8},
            "optimisation": {"steps": 4, "warmup_steps": 1, "decay_steps": 1, "new_lr": 3e-3, "existing_lr": 1e-3},
            "saving": {"every": 2},
            "logging": {"every": 1, "report_to": []},
            "device": "cpu",
        }
        for name, block in blocks.items():
            replaced = name == "model" or not isinstance(block, dict)
            base[name] = block if replaced else {**base.get(name, {}), **block}
        return base

    return make


@pytest.fixture(
    params=sorted(path for path in RECIPES.rglob("*.yaml") if path.stem != "casa-tiny"), ids=lambda p: p.stem
)
def shipped(request):
    """Each recipe for data of one's own, as its file."""
    return request.param


@pytest.fixture(scope="session")
def small() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_small_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # processes that read data find it by name
    sys.modules["training_small_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script() -> Path:
    return SCRIPT


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory) -> dict[int, float]:
    """The loss curve of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    small.trainer(folder).train()
    return small.curve(folder)
