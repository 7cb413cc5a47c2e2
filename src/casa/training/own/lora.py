"""LoRA through PEFT: adapters on the text model, the fusion layers whole or with adapters too."""

from typing import Any

from torch import nn

from casa.errors import UserError
from casa.settings import near
from casa.training.own.recipe import LoraSettings

_WHOLE = ("projector", "compressor", "gist")
_FUSION = "casa_layers"


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
    return get_peft_model(model, config)
