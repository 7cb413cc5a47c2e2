"""Which parameters are trained, at what rate: those that are new, those that were there, and those that stay frozen."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from casa.errors import UserError
from casa.models.adapt import ADDED, freeze_backbone
from casa.training.muon import is_inner, parts_of
from casa.training.trainer.settings import OptimisationSettings

MUON = "muon"  # the group of matrices inside blocks, where `OptimisationSettings.muon` is a rate


def is_new(name: str) -> bool:
    """Whether a parameter of that name came with `adapt` (or with LoRA), untrained."""
    parts = name.split(".")
    return any(part in ADDED or part.startswith("lora_") for part in parts)


def below_lora(model: Any) -> Any:
    """The CasaForConditionalGeneration itself, which peft may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def written_weights(model: Any) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: all of it or, under LoRA, the adapters and what is trained whole."""
    if below_lora(model) is model:
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def choose_trained(model: Any, settings: OptimisationSettings) -> None:
    """Sets requires_grad as the settings say. model: a CasaForConditionalGeneration, or one under LoRA as it is.

    Raises UserError for a pattern that fits no parameter, or if nothing is left to train.
    """
    if settings.trained == "all":
        model.requires_grad_(True)
    elif settings.trained == "added":
        freeze_backbone(model, settings.tower_blocks)
    for pattern in settings.frozen:
        found = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise UserError(f"frozen names {pattern!r}, which fits no parameter; the groups are shown by --dry-run.")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("nothing is left to train: take something out of frozen.")


def parameter_groups(model: nn.Module, settings: OptimisationSettings) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, with their `name`, `lr` and `weight_decay`; frozen parameters are in none.

    Muon's has `muon` and `parts` too, as MuonAdamW takes them. Raises UserError for a pattern in `rates` that fits no
    parameter, and for `muon` where no matrix is left to it.
    """
    unused = dict.fromkeys(settings.rates)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in settings.rates if re.search(pattern, name)), None)
        unused.pop(pattern, None)  # type: ignore[arg-type]
        if not parameter.requires_grad:
            continue
        label, rate = _rate_of(name, parameter, pattern, settings)
        decays = parameter.ndim > 1
        group = groups.setdefault(
            (label, decays),
            {
                "params": [],
                "lr": rate,
                "weight_decay": settings.weight_decay if decays else 0.0,
                "name": label if decays else f"{label}, no decay",
            },
        )
        group["params"].append(parameter)
        if label == MUON:
            group.setdefault("parts", []).append(parts_of(name))
            group["muon"] = True
    if unused:
        raise UserError(f"rates names {next(iter(unused))!r}, which fits no parameter; look at --dry-run.")
    if settings.muon and (MUON, True) not in groups:
        raise UserError(f"muon is {settings.muon:g}, but no matrix inside a block is trained by it: leave muon out.")
    return list(groups.values())


def _rate_of(name: str, parameter: Tensor, pattern: str | None, settings: OptimisationSettings) -> tuple[str, float]:
    """A parameter's group, and its rate."""
    if pattern is not None:
        return pattern, settings.rates[pattern]
    if settings.muon and is_inner(name, parameter):
        return MUON, settings.muon
    return ("new", settings.new_rate) if is_new(name) else ("existing", settings.existing_rate)


def set_precision(model: nn.Module, settings: OptimisationSettings) -> None:
    """Puts weights into the precision they are kept in; what is frozen needs no master copy."""
    if settings.precision == "float32":
        return
    for parameter in model.parameters():
        kept = torch.float32 if settings.master and parameter.requires_grad else torch.bfloat16
        parameter.data = parameter.data.to(kept)
