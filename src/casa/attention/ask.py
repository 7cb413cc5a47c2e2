"""What a call asks of an implementation besides its numbers: enough to say beforehand whether it can do it."""

from dataclasses import dataclass

import torch

from casa.windows import WindowLayout


@dataclass(frozen=True)
class Ask:
    """Handed to an implementation's `refusal(ask)`, which answers with the reason and the remedy, or None.

    A module without `refusal` does every call.
    """

    layout: WindowLayout
    dtype: torch.dtype
    device: torch.device
    width: int  # D, channels of a head
    attend: str  # "both" or "image"
    turning: bool  # keys of earlier windows are to be turned
    backward: bool  # a gradient is wanted
