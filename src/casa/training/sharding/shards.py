"""Weights, moments and averages as torch's distributed checkpoints (DCP): each process writes its own part.

    checkpoint-200/sharded/.metadata          names, shapes, and what lies where
                           __0_0.distcp       what process 0 holds of everything

    weights/<name>    exp_avg/<name>    exp_avg_sq/<name>    step/<name>    average/<name>    average_steps

Any number of processes can read what another number has written. All reading goes through `SafeReader`: `.metadata` is
a pickle, as torch writes it, and no code that one may bring is run.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from casa.errors import UserError
from casa.models.loading import sentence_of
from casa.training.sharding.safe_reader import SafeReader
from casa.training.sharding.wrapping import put_apart

FOLDER = "sharded"
WEIGHTS = "weights/"
_AVERAGE = "average/"
_AVERAGE_STEPS = "average_steps"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def has_shards(checkpoint: Path) -> bool:
    return (checkpoint / FOLDER / ".metadata").is_file()


def write_shards(checkpoint: Path, model: nn.Module, optimizer: Any, ema: Any = None) -> None:
    """Writes all of a run's tensors; every process must call. ema: an `Ema`, or None."""
    put_apart(model)
    tensors = weights_of(model)
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value
    if ema is not None:
        tensors |= {_AVERAGE + name: average for name, average in ema.average.items()}
        tensors[_AVERAGE_STEPS] = torch.tensor(ema.steps)
    dcp.save(tensors, checkpoint_id=checkpoint / FOLDER)


def read_weights(checkpoint: Path, model: nn.Module, ema: Any = None) -> None:
    """Puts the weights, and the averages if there are any, back where they were; every process must call."""
    put_apart(model)
    tensors, stored = weights_of(model), stored_keys(checkpoint)
    steps = torch.tensor(0)
    if ema is not None and _AVERAGE_STEPS in stored:
        tensors |= {_AVERAGE + name: average for name, average in ema.average.items()}
        tensors[_AVERAGE_STEPS] = steps
    _fill(tensors, checkpoint)
    if ema is not None and _AVERAGE_STEPS in stored:
        ema.steps = int(tensors[_AVERAGE_STEPS])


def read_moments(checkpoint: Path, model: nn.Module, optimizer: Any) -> None:
    """Gives AdamW the moments it had; every process must call."""
    stored = stored_keys(checkpoint)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if f"step/{name}" in stored:
            for moment in _MOMENTS:
                like = torch.zeros_like(parameter.detach())
                found = torch.zeros((), dtype=torch.float32, device=parameter.device) if moment == "step" else like
                tensors[f"{moment}/{name}"] = found
    _fill(tensors, checkpoint)
    for name, parameter in model.named_parameters():
        if f"step/{name}" in stored:
            optimizer.state[parameter] = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS}


def read_whole(checkpoint: Path, average: bool = False) -> dict[str, Tensor]:
    """All weights by name, whole, in one process without others. average: the running averages where there are any.

    Raises UserError if there are none of them.
    """
    metadata = _metadata(checkpoint)
    names = [name for name in metadata if name.startswith(WEIGHTS)]
    averages = {name for name in metadata if name.startswith(_AVERAGE)}
    if average and not averages:
        raise UserError(f"{checkpoint} holds no running average: export it without --ema.")
    chosen = {name.removeprefix(WEIGHTS): name for name in names}
    if average:
        chosen |= {name.removeprefix(_AVERAGE): name for name in averages}
    tensors = read_keys(checkpoint, chosen.values())
    # averages are kept wider than weights may be; each goes as soon as it is narrowed
    return {name: tensors.pop(key).to(metadata[WEIGHTS + name].properties.dtype) for name, key in chosen.items()}


def read_keys(checkpoint: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors by their keys, in one process without others."""
    metadata = _metadata(checkpoint)
    tensors = {key: torch.empty(metadata[key].size, dtype=metadata[key].properties.dtype) for key in keys}
    with warnings.catch_warnings():
        # that it reads without other processes, which is what was asked for
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        _fill(tensors, checkpoint, alone=True)
    return tensors


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by key; tied parameters once, under their first name."""
    found = {WEIGHTS + name: parameter.detach() for name, parameter in model.named_parameters()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return found | {WEIGHTS + name: value for name, value in model.state_dict().items() if name not in parameters}


def stored_keys(checkpoint: Path) -> set[str]:
    return set(_metadata(checkpoint))


def _metadata(checkpoint: Path) -> dict[str, Any]:
    return dict(SafeReader(checkpoint / FOLDER).read_metadata().state_dict_metadata)


def _fill(tensors: dict[str, Tensor], checkpoint: Path, alone: bool = False) -> None:
    """Reads into the tensors what is stored under their keys. Every process must call, unless one is `alone`.

    Raises UserError, on all of them, if any cannot read its part.
    """
    try:
        dcp.load(tensors, storage_reader=SafeReader(checkpoint / FOLDER), no_dist=alone)
    # a BaseException, in which torch wraps what any of the processes has raised
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if not isinstance(cause, Exception):
            raise cause from error
        # torch's own words for that tell how to run the code
        damaged = isinstance(cause, UnpicklingError)
        said = "it is damaged, or made to run code" if damaged else sentence_of(cause)
        raise UserError(f"{checkpoint / FOLDER} cannot be read ({said}): take another checkpoint.") from error
