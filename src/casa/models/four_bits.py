"""4 bit weights: which of a model's matrices are left as they are.

bitsandbytes quantises a matrix in blocks of 64 numbers, whatever its width. On CPUs with bf16 instructions it reads
them back row by row (seen in 0.50): rows that are no whole number of blocks come back wrong, and matrices whose rows
32 does not divide end in an AssertionError. Such are the projector's first, 18 columns wider than the encoder, and
those of the MLPs of Qwen2.5-VL's tower, 3,420 wide. Left in full precision, a checkpoint says the same everywhere.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import get_keys_to_not_convert

_BLOCK = 64
_ROWS = 32


def leave_odd_shapes(settings: Any, make: Callable[[], Any]) -> Any:
    """`quantization_config` with the names of what 4 bits do not fit, unless it says itself what is left out.

    make: the model, here without weights. Settings of other kinds come back as they are.
    """
    if not getattr(settings, "load_in_4bit", False) or settings.llm_int8_skip_modules is not None:
        return settings
    with torch.device("meta"):
        model = make()
    odd = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module.in_features % _BLOCK or module.out_features % _ROWS)
    ]
    settings = copy.deepcopy(settings)
    settings.llm_int8_skip_modules = sorted({*get_keys_to_not_convert(model), *odd})
    return settings
