"""Training: recipes, samples within a budget, packs, and one trainer whose runs are never lost.

    train("mine.yaml", out="runs/mine")                    # a whole run: recipe.yaml to out/final
    train("mine.yaml", out="runs/mine", resume=True)       # goes on from its newest checkpoint
    open_recipe("mine.yaml", ["optimisation.steps=2000"])  # what a run is told, checked

Parts are of use alone: `SampleMaker`, `PackedDataset` and `CasaTrainer` take any model and records.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casa.training.config import OptimisationSettings, Recipe, TokenBudget, TrainerSettings, open_recipe
    from casa.training.models import export_checkpoint
    from casa.training.packed_dataset import PackedDataset
    from casa.training.run import train
    from casa.training.samples import SampleMaker
    from casa.training.trainer import CasaTrainer

_FILES = {
    "CasaTrainer": "trainer",
    "OptimisationSettings": "config",
    "PackedDataset": "packed_dataset",
    "Recipe": "config",
    "SampleMaker": "samples",
    "TokenBudget": "config",
    "TrainerSettings": "config",
    "export_checkpoint": "models",
    "open_recipe": "config",
    "train": "run",
}
__all__ = [
    "CasaTrainer",
    "OptimisationSettings",
    "PackedDataset",
    "Recipe",
    "SampleMaker",
    "TokenBudget",
    "TrainerSettings",
    "export_checkpoint",
    "open_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
