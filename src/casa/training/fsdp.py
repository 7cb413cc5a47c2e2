"""FSDP2: which weights are gathered together and when, and checkpoints of which each process writes its own part.

    root                embeddings, head, projector; norms at the entry of fused blocks; k and v of CASA layers
      encoder block     gathered while it runs, in the forward and again in the backward pass
      block             all but its first norm: self-attention, feed-forward network, the other norms
      CASA layer        q and o

The image keys and values of all layers come from one product at the start of a step, with the gains of the blocks'
norms folded in: those weights are read before their blocks run, and without a call of the modules that own them, on
which FSDP2's gathering hangs. They belong to the root, whose weights are there from the start of a step to its end.
With grouped-query attention they are the lesser part of a CASA layer (a third in Helium-2B, a ninth in Qwen2.5-VL-3B);
the query and output projections are gathered when their block needs them.

    checkpoint-200/sharded/shard-00001-model-00001-of-00001.safetensors      what process 0 holds of everything
                           processes.json                                    how many have written
    weights/<name>    exp_avg/<name>    exp_avg_sq/<name>    step/<name>    average/<name>    average_steps

Any number of processes can read what another number has written. The files are safetensors, so reading runs no code.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from casa.atomic import write_text
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration
from casa.models.adapt import encoder_blocks
from casa.models.loading import UNREADABLE, sentence_of

if TYPE_CHECKING:
    from casa.training.checkpoints import Ema

FOLDER = "sharded"
_PROCESSES = "processes.json"
_WEIGHTS, _AVERAGE, _AVERAGE_STEPS = "weights/", "average/", "average_steps"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_ENTRY, _ATTENTION = "input_layernorm", "self_attn"


def sharded_groups(model: CasaForConditionalGeneration) -> list[list[nn.Module]]:
    """Modules that are gathered together, one group after the other; what is in none of them belongs to the root.

    Raises:
        UserError: The model's image tokens go through the blocks' feed-forward networks ahead of their turn.
    """
    fusion, decoder = model.fusion, model.decoder
    if fusion.update_images:
        raise UserError("update_images runs parts of blocks before their turn: train it with sharding: ddp.")
    groups: list[list[nn.Module]] = [[block] for block in encoder_blocks(model.encoder)]
    early = set() if fusion.method == "insertion" else set(model.fused_blocks)
    for index, block in enumerate(decoder.blocks):
        if index not in early:
            groups.append([block])
            continue
        # a borrowed self-attention has the keys and values of images to make
        kept = {_ENTRY, _ATTENTION} if fusion.borrows else {_ENTRY}
        groups.append([part for name, part in block.named_children() if name not in kept])
        if not fusion.borrows:
            layer = model.casa_layers[str(index)]
            groups.append([layer.get_submodule("q_proj"), layer.get_submodule("o_proj")])
    with_weights = ([part for part in group if any(True for _ in part.parameters())] for group in groups)
    return [group for group in with_weights if group]


def shard_model(model: nn.Module, device: torch.device, compute: torch.dtype | None = None) -> None:
    """Spreads a model's weights over all processes, in place; names stay, and all start from the first one's weights.

    Gradients are added up in float32 at least.

    Args:
        compute: Dtype in which gathered weights are used; None for their own.

    Raises:
        UserError: The model is under LoRA, or there are no processes to spread over.
    """
    if not isinstance(model, CasaForConditionalGeneration):
        raise UserError("sharding: fsdp takes a whole CASA model; LoRA leaves little to spread: use sharding: ddp.")
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError("sharding: fsdp needs processes to spread over: start with torchrun.")
    groups = sharded_groups(model)
    _agree(model, device)
    widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    reduce = torch.float32 if widest.itemsize < 4 or compute is not None else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shards",))
    for group in groups:
        fully_shard(group if len(group) > 1 else group[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@torch.no_grad()
def _agree(model: nn.Module, device: torch.device) -> None:
    """Gives every process the first one's weights, as DDP does."""
    for tensor in chain(model.parameters(), model.buffers()):
        held = tensor.data.to(device)
        dist.broadcast(held, 0)
        tensor.data.copy_(held)


def reshard(model: nn.Module) -> None:
    """Leaves every process its own part of all weights, whatever was gathered; nothing for a model that is not sharded.

    A forward pass without a backward pass, as in evaluation, leaves the root gathered: what is then read or written of
    the parts would not be what the model computes with.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Whole weights in host memory, on the process that keeps them; one by one, so that no other ever holds all."""
    found: dict[str, Tensor] = {}
    reshard(model)
    for name, value in model.state_dict().items():
        whole = full_tensor(value)
        if keep:
            found[name] = whole.cpu()
    return found


def full_tensor(value: Any) -> Any:
    """The whole of what is spread over processes; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def has_shards(checkpoint: Path) -> bool:
    """Whether it was saved by a run with FSDP2."""
    return (checkpoint / FOLDER).is_dir()


def write_shards(checkpoint: Path, model: nn.Module, optimizer: Optimizer, ema: "Ema | None" = None) -> None:
    """Writes all of a run's tensors; every process must call."""
    reshard(model)
    tensors = _weights_of(model, ema)
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value
    folder, alone = checkpoint / FOLDER, not dist.is_initialized()
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _one_process_expected():
        dcp.save(tensors, storage_writer=writer, no_dist=alone)
    if alone or dist.get_rank() == 0:
        write_text(folder / _PROCESSES, json.dumps(1 if alone else dist.get_world_size()))


def read_weights(checkpoint: Path, model: nn.Module, ema: "Ema | None" = None) -> None:
    """Puts the weights, and the averages if there are any, back where they were; every process must call."""
    reshard(model)
    averaged = ema is not None and _AVERAGE_STEPS in stored_tensors(checkpoint)
    tensors = _weights_of(model, ema if averaged else None)
    _load(tensors, checkpoint)
    if ema is not None and averaged:
        ema.steps = int(tensors[_AVERAGE_STEPS])


def read_moments(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Gives AdamW the moments it had; every process must call."""
    stored = stored_tensors(checkpoint)
    trained = {name: p for name, p in model.named_parameters() if f"step/{name}" in stored}
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        for moment in _MOMENTS:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            tensors[f"{moment}/{name}"] = step if moment == "step" else torch.zeros_like(parameter.detach())
    _load(tensors, checkpoint)
    for name, parameter in trained.items():
        optimizer.state[parameter] = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS}


def read_whole_weights(checkpoint: Path, average: bool = False) -> dict[str, Tensor]:
    """All weights by name, whole, in one process without others.

    Args:
        average: The running averages where there are any.

    Raises:
        UserError: There are no averages.
    """
    stored = stored_tensors(checkpoint)
    chosen = {name.removeprefix(_WEIGHTS): name for name in stored if name.startswith(_WEIGHTS)}
    if average:
        averages = {name.removeprefix(_AVERAGE): name for name in stored if name.startswith(_AVERAGE)}
        if not averages:
            raise UserError(f"{checkpoint} holds no running average: export its last weights.")
        chosen |= averages
    tensors = read_whole(checkpoint, {key: stored[key] for key in chosen.values()})
    # averages are kept wider than weights may be; each goes as soon as it is narrowed
    return {name: tensors.pop(key).to(stored[_WEIGHTS + name].properties.dtype) for name, key in chosen.items()}


def read_whole(checkpoint: Path, stored: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Whole tensors by their keys, of those that `stored_tensors` tells of, in one process without others."""
    tensors = {key: torch.empty(tensor.size, dtype=tensor.properties.dtype) for key, tensor in stored.items()}
    _load(tensors, checkpoint, alone=True)
    return tensors


def stored_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and kinds of all tensors by their keys. Raises UserError if a part is damaged or missing."""
    folder = checkpoint / FOLDER
    try:
        written = json.loads((folder / _PROCESSES).read_text(encoding="utf-8"))
        found: dict[str, Any] = dict(dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
    except (*UNREADABLE, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({sentence_of(error)}): take another checkpoint.") from error
    gaps = any(sum(math.prod(part.sizes) for part in one.chunks) != math.prod(one.size) for one in found.values())
    if gaps or len(list(folder.glob("*.safetensors"))) != written:
        raise UserError(f"{folder} lacks a part of its tensors: take another checkpoint.")
    return found


def _weights_of(model: nn.Module, ema: "Ema | None") -> dict[str, Tensor]:
    """Parameters, saved buffers and averages by key; tied parameters once, under their first name."""
    found = {_WEIGHTS + name: parameter.detach() for name, parameter in model.named_parameters()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found |= {_WEIGHTS + name: value for name, value in model.state_dict().items() if name not in parameters}
    if ema is not None:
        found |= {_AVERAGE + name: average for name, average in ema.average.items()}
        found[_AVERAGE_STEPS] = torch.tensor(ema.steps)
    return found


def _load(tensors: dict[str, Tensor], checkpoint: Path, alone: bool = False) -> None:
    """Reads into the tensors what is stored under their keys. Every process must call, unless one is `alone`.

    Raises UserError, on all of them, if any cannot read its part.
    """
    folder = checkpoint / FOLDER
    try:
        with _one_process_expected():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
    # a BaseException, in which torch wraps what any of the processes has raised
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if not isinstance(cause, Exception):
            raise cause from error
        raise UserError(f"{folder} cannot be read ({sentence_of(cause)}): take another checkpoint.") from error


@contextmanager
def _one_process_expected() -> Iterator[None]:
    """Inside, torch does not warn that it works without other processes, where that was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
