"""TensorBoard and Weights & Biases, loaded only where a run asks for them."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerCallback

from casa.errors import UserError

_REMEDY = {"tensorboard": "install casa-vlm[train]", "wandb": "pip install wandb"}


def check_reporters(names: Sequence[str]) -> None:
    """Raises UserError for one that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"logging.to names {name}, which is not installed: {_REMEDY[name]}, or take it out.")


def reporters(names: Sequence[str], out: Path) -> list[TrainerCallback]:
    """Callbacks that send logs to each: TensorBoard into out/tensorboard, Weights & Biases online.

    Raises UserError for one that is not installed.
    """
    check_reporters(names)
    found: list[TrainerCallback] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            from transformers.integrations import TensorBoardCallback

            board = TensorBoardCallback()
            board.logging_dir = str(out / "tensorboard")
            found.append(board)
        else:
            from transformers.integrations import WandbCallback

            found.append(WandbCallback())
    return found
