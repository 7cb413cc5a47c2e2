"""LoRA through PEFT: adapters on the text model, the fusion layers whole or with adapters too; and merged into it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from casa.errors import UserError
from casa.settings import near
from casa.training.own.recipe import LoraSettings, parse_run_recipe
from casa.training.trainer.groups import choose_trained, set_precision

_WHOLE = ("projector", "compressor", "gist")
_FUSION = "casa_layers"
RECIPE = "recipe.yaml"  # in the folder of a run
_ADAPTERS = "adapter_model.safetensors"


def with_lora(model: Any, settings: LoraSettings) -> Any:
    """The model under PEFT: only adapters, and what is trained whole, require gradients.

    model: a CasaForConditionalGeneration, which is changed. Raises UserError without PEFT, and for a target that names
    no linear layer of the text model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("model.lora needs PEFT: pip install peft.") from error
    blocks = {id(part) for block in model.decoder.blocks for part in block.modules()}
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    inside = [name for name, part in linear.items() if id(part) in blocks]
    names = {name.rpartition(".")[2] for name in inside}
    for target in settings.targets:
        if target not in names:
            raise UserError(f"model.lora.targets: no linear layer is called {target!r}; {near(target, sorted(names))}")
    fused = [name for name in linear if name.startswith(f"{_FUSION}.")]
    adapted = inside if settings.added == "whole" else [*inside, *fused]
    chosen = [name for name in adapted if name.rpartition(".")[2] in settings.targets]
    whole = [name for name in _WHOLE if getattr(model, name, None) is not None]
    if settings.added == "whole":
        layers = getattr(model, _FUSION)
        whole += [f"{_FUSION}.{key}" for key in layers if any(True for _ in layers[key].parameters())]
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=chosen,
        modules_to_save=whole or None,
    )
    with warnings.catch_warnings():
        # PEFT asks by a name that newer transformers call old: nothing that a user could mend
        warnings.filterwarnings("ignore", ".*gradient_checkpointing. is deprecated", FutureWarning)
        return get_peft_model(model, config)


def merged_adapters(checkpoint: Path, adjust: Callable[[Any], None]) -> Any:
    """The model of a run's checkpoint of adapters, these merged into what the run began from.

    checkpoint: in the folder of its run, whose recipe names that. adjust: is given the model under PEFT before.
    Raises UserError where the recipe, or what it names, is not there, or is of other adapters.
    """
    from casa.training.own.model import load_model

    path = checkpoint.absolute().parent / RECIPE
    if not path.is_file():
        raise UserError(
            f"{checkpoint} holds LoRA adapters, and there is no {path}, which names the model that they belong to: "
            "put the recipe of the run there."
        )
    recipe = parse_run_recipe(yaml.safe_load(path.read_text(encoding="utf-8")))
    if recipe.model.lora is None:
        raise UserError(
            f"{checkpoint} holds LoRA adapters, and the recipe of {path} has none: put the run's own there."
        )
    model = load_model(recipe).model
    # only now: where PEFT is not installed, `with_lora` has said so
    from peft import set_peft_model_state_dict

    choose_trained(model, recipe.optimisation)
    set_precision(model, recipe.optimisation)
    found = set_peft_model_state_dict(model, load_file(checkpoint / _ADAPTERS))
    lost = [name for name in found.missing_keys if "lora_" in name or "modules_to_save" in name]
    if lost or found.unexpected_keys:
        raise UserError(
            f"the adapters in {checkpoint} are not those of {path}: the first is {[*lost, *found.unexpected_keys][0]}."
        )
    adjust(model)
    merged = model.merge_and_unload()
    if recipe.optimisation.precision == "bfloat16":
        # as the run's own end is written: masters are kept in checkpoints only
        torch.nn.Module.to(merged, dtype=torch.bfloat16)
    return merged
