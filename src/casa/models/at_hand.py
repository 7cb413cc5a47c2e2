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
    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device.startswith("cuda") and not available:
        raise UserError("this machine has no CUDA device; leave out --device, or use --device cpu.")
    if not device.startswith(("cuda", "cpu")):
        raise UserError(f"device {device!r} is not known; use auto, cpu or cuda.")
    return device
