"""Which weights FSDP2 gathers together, and when.

    root                embeddings, head, projector; norms at the entry of fused blocks; k and v of CASA layers
      tower block       gathered while it runs, in the forward and again in the backward pass
      block             all but its first norm: self-attention, feed-forward network, the other norms
      CASA layer        q and o

The image keys and values of all layers come from one product at the start of a step, with the gains of the blocks'
norms folded in (`project_images`): those weights are read before their blocks run, and without a call of the
modules that own them, on which FSDP2's gathering hangs. They belong to the root, whose weights are there from the start
of a step to its end. With grouped-query attention they are the lesser part of a CASA layer (a third in Helium-2B, a
ninth in Qwen2.5-VL-3B); the query and output projections are gathered when their block needs them.
"""

from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration
from casa.models.adapt import encoder_blocks

_ENTRY = "input_layernorm"
_ATTENTION = "self_attn"


def sharded_groups(model: CasaForConditionalGeneration) -> list[list[nn.Module]]:
    """Modules that are gathered together, one group after the other; what is in none of them belongs to the root.

    Raises UserError for a model whose image tokens go through the blocks' feed-forward networks ahead of their turn.
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


def shard_model(model: Any, device: torch.device, compute: torch.dtype | None = None) -> None:
    """Spreads a model's weights over all processes, in place; names stay, and all start from the first one's weights.

    compute: dtype in which gathered weights are used; None for their own. Gradients are added up in float32 at least.
    Raises UserError for a model under LoRA, and without processes to spread over.
    """
    if not isinstance(model, CasaForConditionalGeneration):
        raise UserError("sharding: fsdp takes a whole CASA model; LoRA leaves little to spread: use sharding: ddp.")
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError("sharding: fsdp needs processes to spread over: start with torchrun --nproc-per-node.")
    groups = sharded_groups(model)
    _agree(model, device)
    widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    reduce = torch.float32 if widest.itemsize < 4 or compute is not None else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shards",))
    for group in groups:
        fully_shard(group if len(group) > 1 else group[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def put_apart(model: nn.Module) -> None:
    """Leaves every process its own part of all weights, whatever was gathered; nothing for a model that is not sharded.

    A forward pass without a backward pass, as in evaluation, leaves the root gathered: what is then read or written of
    the parts would not be what the model computes with.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def _agree(model: nn.Module, device: torch.device) -> None:
    """Gives every process the first one's weights, as DDP does."""
    for tensor in chain(model.parameters(), model.buffers()):
        held = tensor.data.to(device)
        dist.broadcast(held, 0)
        tensor.data.copy_(held)
