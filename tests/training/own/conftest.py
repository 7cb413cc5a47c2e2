"""Stand-ins for what recipes name, made once."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

RECIPES = Path(__file__).parents[3] / "recipes"


def _module():
    spec = importlib.util.spec_from_file_location("standins", Path(__file__).with_name("standins.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Paths: text, tower, vlm, checkpoint, insertion, and pages, a file of records of which three are bad."""
    folder, module = tmp_path_factory.mktemp("standins"), _module()
    paths = {name: getattr(module, name)(folder / name) for name in ("vlm", "tower", "checkpoint", "insertion")}
    text = module.text_model(folder / "text")
    return SimpleNamespace(**paths, text=text, pages=module.pages(folder / "data", 24, bad=3), module=module)


@pytest.fixture
def values(made):
    """A small run as plain values, over a checkpoint; changes are given by block."""

    def make(**blocks):
        base = {
            "name": "small",
            "model": {"checkpoint": str(made.checkpoint)},
            "data": {"sources": [{"path": str(made.pages)}]},
            "packing": {"budget": {"text": 160, "image": 40}, "buffer": 8},
            "optimisation": {"steps": 4, "warmup": 1, "decay": 1, "new_rate": 3e-3, "existing_rate": 1e-3},
            "saving": {"every": 2},
            "logging": {"every": 1, "to": []},
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
