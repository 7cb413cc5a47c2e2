"""Loads the model and processor that a verb names, on the device it asks for, quietly."""

from typing import TYPE_CHECKING

from casa.errors import UserError

if TYPE_CHECKING:
    from casa.models import CasaForConditionalGeneration, CasaProcessor


def load(name: str, device: str = "auto") -> tuple["CasaForConditionalGeneration", "CasaProcessor"]:
    """Raises UserError for a model that is not there, or a device that this machine does not have."""
    import torch
    from transformers.utils import logging

    from casa.models import CasaForConditionalGeneration, CasaProcessor

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    chosen = pick_device(device)
    model = CasaForConditionalGeneration.from_pretrained(name)
    return model.to(torch.device(chosen)).eval(), CasaProcessor.from_pretrained(name)


def pick_device(device: str) -> str:
    """ "auto" is the GPU if there is one."""
    import torch

    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device.startswith("cuda") and not available:
        raise UserError("this machine has no CUDA device; leave out --device, or use --device cpu.")
    if not device.startswith(("cuda", "cpu")):
        raise UserError(f"device {device!r} is not known; use auto, cpu or cuda.")
    return device
