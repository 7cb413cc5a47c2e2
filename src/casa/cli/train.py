"""`casa train`: runs a recipe, stage by stage; a stage that is finished is not done again."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/casa-tiny.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<recipe> if left out.")] = None,
) -> None:
    """Train a model from a recipe. Called again, it goes on where it stopped.

    Example: casa train recipes/casa-tiny.yaml --out runs/casa-tiny
    """
    from casa.cli.training_sources import training_sources
    from casa.training import load_recipe
    from casa.training import train as run

    folder = out if out is not None else Path("runs") / recipe.stem
    run(load_recipe(recipe), training_sources(), folder, progress=print)
