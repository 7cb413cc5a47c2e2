"""`casa adapt`: gives a text-only model an image tower and CASA layers, ready to be trained."""

from pathlib import Path
from typing import Annotated

import typer

from casa.errors import UserError


def adapt(
    backbone: Annotated[str, typer.Argument(help="A text model's folder (Llama family).")],
    out: Annotated[Path, typer.Option(help="Folder for the new model.")],
    vision: Annotated[str, typer.Option(help="Folder of a Qwen2.5-VL image tower.")],
    method: Annotated[str, typer.Option(help="casa, cross_attention or insertion.")] = "casa",
    placement: Annotated[str, typer.Option(help="parallel, before or replace.")] = "parallel",
    every: Annotated[int, typer.Option(help="A layer in every n-th block.")] = 1,
    share_weights: Annotated[bool, typer.Option("--share-weights", help="Use the blocks' own weights (D1).")] = False,
    gate: Annotated[str | None, typer.Option(help="tanh, for gated cross-attention.")] = None,
) -> None:
    """Join a language model and an image tower; the new layers start as copies of self-attention.

    Example: casa adapt ./my-llama --vision ./my-tower --out ./my-casa
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from casa.models import FusionConfig, processor_for
    from casa.models import adapt as join

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already; name a new folder.")
    fusion = FusionConfig(method=method, placement=placement, every=every, share_weights=share_weights, gate=gate)
    model = join(backbone, fusion=fusion, vision=vision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise UserError(f"{backbone} has no tokenizer that can be read: {str(error).splitlines()[0]}") from error
    processor = processor_for(tokenizer, model.config.vision_config)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    new = sum(p.numel() for p in [*model.casa_layers.parameters(), *model.projector.parameters()])
    total = sum(p.numel() for p in model.parameters())
    print(f"{out}: {total:,} parameters, {new:,} of them new; blocks with a fusion layer: {list(model.fused_blocks)}")
