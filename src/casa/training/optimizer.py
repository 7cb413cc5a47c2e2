"""Which parameters are trained, at what learning rate, and by which method: AdamW, or Muon beside it.

Muon makes the momentum of a matrix orthogonal before it is applied. Matrices of one shape go through the Newton-Schulz
iteration together: on a CPU, one call on a stack costs a fraction of many calls. `torch.optim.Muon` runs the iteration
in bfloat16, one matrix after the other, and knows no joined matrices (`qkv.weight`).

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (coefficients, iteration);
Liu et al., arXiv 2502.16982 (scale 0.2 sqrt(max side), which lets it share AdamW's learning rates and decay).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from casa.errors import UserError
from casa.models.adapt import ADDED, freeze_backbone
from casa.training.config import OptimisationSettings

MUON = "muon"  # the group of matrices inside blocks, where `OptimisationSettings.muon_lr` is above 0
MOMENTUM = 0.95
STACK = 2**26  # numbers of the matrices that are made orthogonal together, at most: some copies of them exist at once
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_JOINED = {"qkv.weight": 3, "key_value.weight": 2}


def is_new(name: str) -> bool:
    """Whether a parameter of that name came with `adapt` (or with LoRA), untrained."""
    return any(part in ADDED or part.startswith("lora_") for part in name.split("."))


def below_lora(model: Any) -> Any:
    """The CasaForConditionalGeneration itself, which peft may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def choose_trained(model: Any, settings: OptimisationSettings) -> None:
    """Sets requires_grad as the settings say.

    Args:
        model: A CasaForConditionalGeneration, or one under LoRA as it is.

    Raises:
        UserError: A pattern fits no parameter, or nothing is left to train.
    """
    if settings.trainable == "all":
        model.requires_grad_(True)
    elif settings.trainable == "added":
        freeze_backbone(model, settings.tower_blocks)
    for pattern in settings.frozen:
        found = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise UserError(f"frozen names {pattern!r}, which fits no parameter; a dry run shows the groups.")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("nothing is left to train: take something out of frozen.")


def set_precision(model: nn.Module, settings: OptimisationSettings) -> None:
    """Puts weights into the precision they are kept in; what is frozen needs no master copy."""
    if settings.precision == "float32":
        return
    for parameter in model.parameters():
        kept = torch.float32 if settings.master_weights and parameter.requires_grad else torch.bfloat16
        parameter.data = parameter.data.to(kept)


def parameter_groups(model: nn.Module, settings: OptimisationSettings) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, with their `name`, `lr` and `weight_decay`; frozen parameters are in none.

    Muon's group has `muon` and `parts` too, as `MuonAdamW` takes them.

    Raises:
        UserError: A pattern in `lr_overrides` fits no parameter, or no matrix is left to Muon.
    """
    unused = dict.fromkeys(settings.lr_overrides)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in settings.lr_overrides if re.search(pattern, name)), None)
        if pattern is not None:
            unused.pop(pattern, None)
        if not parameter.requires_grad:
            continue
        if pattern is not None:
            label, lr = pattern, settings.lr_overrides[pattern]
        elif settings.muon_lr and is_inner(name, parameter):
            label, lr = MUON, settings.muon_lr
        else:
            label, lr = ("new", settings.new_lr) if is_new(name) else ("existing", settings.existing_lr)
        decays = parameter.ndim > 1
        decay, title = (settings.weight_decay, label) if decays else (0.0, f"{label}, no decay")
        new = {"params": [], "lr": lr, "weight_decay": decay, "name": title}
        group = groups.setdefault((label, decays), new)
        group["params"].append(parameter)
        if label == MUON:
            group.setdefault("parts", []).append(parts_of(name))
            group["muon"] = True
    if unused:
        raise UserError(
            f"lr_overrides names {next(iter(unused))!r}, which fits no parameter; a dry run shows the groups."
        )
    if settings.muon_lr and (MUON, True) not in groups:
        raise UserError(
            f"muon_lr is {settings.muon_lr:g}, but no matrix inside a block is trained by it: leave muon_lr out."
        )
    return list(groups.values())


def group_sizes(model: nn.Module, settings: OptimisationSettings) -> list[tuple[str, float | None, int]]:
    """(name, learning rate, parameters) of each group that is trained, and of what is frozen, whose rate is None."""
    rates: dict[str, float | None] = {}
    counts: Counter[str] = Counter()
    for group in parameter_groups(model, settings):
        name = group["name"].removesuffix(", no decay")
        rates[name] = group["lr"]
        counts[name] += sum(parameter.numel() for parameter in group["params"])
    if frozen := sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad):
        rates["frozen"], counts["frozen"] = None, frozen
    return [(name, lr, counts[name]) for name, lr in rates.items()]


def moment_bytes(model: nn.Module, settings: OptimisationSettings) -> int:
    """Bytes of the moments: AdamW keeps two of each weight, as precise as the weight, and Muon one."""
    groups = parameter_groups(model, settings)
    return sum(bytes_of(group["params"]) * (1 if group.get("muon") else 2) for group in groups)


def checkpoint_bytes(model: Any, settings: OptimisationSettings) -> int:
    """Bytes of a checkpoint: under LoRA, of the adapters and what is trained whole.

    Args:
        model: With or without weights; as it is trained.
    """
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    average = 4 * sum(trained) if settings.ema_decay is not None else 0
    step_counts = 4 * len(trained)
    written = model.parameters()
    if below_lora(model) is not model:
        from peft import get_peft_model_state_dict

        written = get_peft_model_state_dict(model).values()
    return bytes_of(written) + moment_bytes(model, settings) + step_counts + average


def final_bytes(model: Any, settings: OptimisationSettings) -> int:
    """Bytes of the finished model, in what it computes with."""
    narrow = 2 if settings.precision == "bfloat16" else None
    return sum(p.numel() * (narrow or p.element_size()) for p in below_lora(model).parameters())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors hold together."""
    return sum(tensor.nbytes for tensor in tensors)


def is_inner(name: str, parameter: Tensor) -> bool:
    """Whether it is a matrix inside a block of the text model, the tower or the compressor, or inside a fusion layer.

    Embeddings, heads, the projector and LoRA are AdamW's, and so are experts that are kept as one (E, r, c).
    """
    parts = name.split(".")
    inside = any(part in ("layers", "blocks", "casa_layers") for part in parts)
    return parameter.ndim == 2 and inside and not any(part.startswith("lora_") for part in parts)


def parts_of(name: str) -> int:
    """How many matrices a parameter of that name is, one above the other: `...qkv.weight` is three."""
    return next((count for ending, count in _JOINED.items() if name.endswith(ending)), 1)


class MuonAdamW(torch.optim.AdamW):
    """Muon for the matrices inside blocks and AdamW for all else, as one torch optimizer.

    It is an AdamW, so transformers saves, loads and schedules it as one. A group with `muon: True` holds matrices (r,
    c) only and is passed over by AdamW; its parameters have a `momentum` instead of two moments. A group's `parts` are,
    for each of its parameters, how many matrices stand in it one above the other.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Moves all parameters that have a gradient."""
        every = self.param_groups
        self.param_groups = [group for group in every if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group.get("muon"):
                self._orthogonal_step(group)
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        members: list[tuple[Tensor, Tensor, Tensor]] = []
        for parameter, parts in zip(group["params"], group["parts"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros(())  # what an AdamW looks for in any state that it loads
            state["step"] += 1
            members += split(parameter, state["momentum"], parts)
        muon_step(members, float(group["lr"]), group["weight_decay"])


def split(parameter: Tensor, momentum: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The matrices of a parameter with their gradients and momenta, as `muon_step` takes them."""
    assert parameter.grad is not None
    return zip(parameter.data.chunk(parts), parameter.grad.chunk(parts), momentum.chunk(parts), strict=True)


@torch.no_grad()
def muon_step(members: Iterable[tuple[Tensor, Tensor, Tensor]], lr: float, weight_decay: float) -> None:
    """Moves matrices in place.

    A matrix whose gradient is zero stays, but for its decay_steps: nothing of the step's data has reached it, and made
    orthogonal, what is left of its momentum would be a whole step.

    Args:
        members: (matrix, gradient, momentum), each (r, c); momentum is updated too.
    """
    shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for matrix, gradient, momentum in members:
        if matrix.shape[0] > matrix.shape[1]:
            matrix, gradient, momentum = matrix.T, gradient.T, momentum.T
        shapes.setdefault((matrix.shape[0], matrix.shape[1]), []).append((matrix, gradient, momentum))
    for (shorter, longer), same in shapes.items():
        at_once = max(1, STACK // (shorter * longer))
        for start in range(0, len(same), at_once):
            stack = same[start : start + at_once]
            steps = orthogonalise(torch.stack([_direction(gradient, momentum) for _, gradient, momentum in stack]))
            for (matrix, _, _), step in zip(stack, steps, strict=True):
                matrix.mul_(1 - lr * weight_decay).add_(step, alpha=-lr * 0.2 * math.sqrt(longer))


def orthogonalise(stack: Tensor) -> Tensor:
    """Matrices (n, r, c), r <= c, to about their nearest with all singular values 1."""
    a, b, c = _COEFFICIENTS
    x = stack / (stack.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _direction(gradient: Tensor, momentum: Tensor) -> Tensor:
    momentum.mul_(MOMENTUM).add_(gradient)
    # a factor, and no question: the device is not waited for
    return gradient.add(momentum, alpha=MOMENTUM) * (gradient != 0).any()
