"""A checkpoint of a run, of whichever kind, to a plain model folder: config, safetensors, processor, nothing else."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from casa.errors import UserError
from casa.models import CasaConfig, CasaForConditionalGeneration, CasaProcessor
from casa.models.convert import check_new, new_folder
from casa.training.sharding.shards import has_shards, read_whole

EMA_FILE = "ema.safetensors"
_STATE, _ADAPTER = "trainer_state.json", "adapter_config.json"


def export_checkpoint(checkpoint: Any, out: Any, *, average: bool = False, dtype: torch.dtype | None = None) -> Path:
    """Writes the new folder `out`, for `from_pretrained`, and returns it; the model is in memory once meanwhile.

    checkpoint: a `checkpoint-<step>` of a run with DDP or FSDP2; LoRA's adapters are merged into the model that the
    run began from, as its recipe beside the checkpoint names it. average: its running average (EMA) in place of the
    last weights. dtype: of all weights; theirs if left out.
    Raises UserError for what is no whole checkpoint, or holds no average, and if `out` exists.
    """
    source = Path(checkpoint)
    # before anything is read: the largest models take minutes
    check_new(out)
    _check(source)
    if (source / _ADAPTER).is_file():
        model = _from_adapters(source, average)
    else:
        model = _from_shards(source, average) if has_shards(source) else _from_model(source, average)
    if dtype is not None:
        torch.nn.Module.to(model, dtype=dtype)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        if (source / "processor_config.json").is_file() or (source / "preprocessor_config.json").is_file():
            CasaProcessor.from_pretrained(source).save_pretrained(folder)
    return Path(out)


def _check(source: Path) -> None:
    if not source.is_dir():
        raise UserError(f"there is no checkpoint at {source}: give a folder checkpoint-<step> of a run.")
    if source.name.startswith("."):
        raise UserError(f"{source} was never finished: give the folder of a whole checkpoint.")
    if (source / _STATE).is_file():
        return
    steps = [path for path in source.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    if steps:
        newest = max(steps, key=lambda path: int(path.name.split("-")[1]))
        raise UserError(f"{source} is a run: give one of its checkpoints, such as {newest}.")
    raise UserError(f"{source} is no checkpoint of a run, it has no {_STATE}: give a folder checkpoint-<step>.")


def _from_model(source: Path, average: bool) -> CasaForConditionalGeneration:
    model = CasaForConditionalGeneration.from_pretrained(source, dtype="auto")
    if average:
        _put_averages(model, source)
    return model


def _put_averages(model: torch.nn.Module, source: Path) -> None:
    if not (source / EMA_FILE).is_file():
        raise UserError(f"{source} holds no running average: export its last weights.")
    averages = load_file(source / EMA_FILE)
    for name, parameter in model.named_parameters():
        if name in averages:
            parameter.data = averages[name].to(parameter.dtype)


def _from_adapters(source: Path, average: bool) -> CasaForConditionalGeneration:
    # runs by recipes stand above this room, and only they know what adapters were put into
    from casa.training.own.lora import merged_adapters

    return merged_adapters(source, lambda model: _put_averages(model, source) if average else None)


def _from_shards(source: Path, average: bool) -> CasaForConditionalGeneration:
    config = CasaConfig.from_pretrained(source)
    # an outline: all that a folder keeps is in the shards, and what is not (tables of rotary positions) it never had
    with torch.device("meta"):
        model = CasaForConditionalGeneration(config)
    weights: dict[str, Tensor] = read_whole(source, average)
    _, surplus = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    lost = [name for name, value in model.state_dict().items() if value.is_meta]
    if lost or surplus:
        raise UserError(f"the weights in {source} are not those of its config: the first is {(lost or surplus)[0]}.")
    return model
