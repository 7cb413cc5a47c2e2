"""`casa export`: a checkpoint of a run to a plain model folder."""

from pathlib import Path
from typing import Annotated

import typer

from casa.errors import UserError

DTYPES = ("bfloat16", "float16", "float32")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint-<step> of a run, with DDP or FSDP2.")],
    out: Annotated[Path, typer.Argument(help="The new model folder.")],
    ema: Annotated[bool, typer.Option("--ema", help="The running average instead of the last weights.")] = False,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; the checkpoint's if left out.")] = None,
) -> None:
    """Write a checkpoint's weights as one model: safetensors, config and processor, for from_pretrained.

    Example: casa export runs/mine/checkpoint-4000 ./my-casa
    """
    import torch

    from casa.models.loading import quietly
    from casa.training.sharding import export_checkpoint

    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; give one of: {', '.join(DTYPES)}.")
    with quietly(reports=False):
        made = export_checkpoint(checkpoint, out, average=ema, dtype=getattr(torch, dtype) if dtype else None)
    print(f"{made}: the {'running average' if ema else 'weights'} of {checkpoint.name}")
