"""The small run that these tests start, as a module and as the path of a script."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("small_run.py")


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
