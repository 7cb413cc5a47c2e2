"""A model and its processor by name, on the device at hand, quietly: for what people run, not for what they build."""

from typing import Any

import torch

from casa.errors import UserError
from casa.models.model import CasaForConditionalGeneration
from casa.models.processor import CasaProcessor
from casa.models.quiet import quietly


def load_at_hand(name: Any, device: str = "auto") -> tuple[CasaForConditionalGeneration, CasaProcessor]:
    """Model (in evaluation mode) and processor; transformers' progress bars and reports are left out meanwhile.

    Raises UserError for a model that is not there, or a device that this machine does not have.
    """
    chosen = pick_device(device)
    with quietly(reports=False):
        model = CasaForConditionalGeneration.from_pretrained(name)
        processor = CasaProcessor.from_pretrained(name)
    return model.to(torch.device(chosen)).eval(), processor


def pick_device(device: str) -> str:
    """ "auto" is the GPU if there is one. Raises UserError for a device that is unknown or not there."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if there else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not known; use auto, cpu or cuda.")
    if wanted.type == "cuda" and not there:
        raise UserError("this machine has no CUDA device; leave out --device, or use --device cpu.")
    if wanted.type == "cuda" and (wanted.index or 0) >= there:
        raise UserError(f"this machine has no {device}, only {', '.join(f'cuda:{i}' for i in range(there))}.")
    return device
