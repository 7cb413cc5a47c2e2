"""4 bit weights: which of a model's matrices are left as they are.

bitsandbytes quantises a matrix in blocks of 64 numbers, whatever its width. On CPUs with bf16 instructions it reads
them back row by row (seen in 0.50): rows that are no whole number of blocks come back wrong, and matrices whose rows
32 does not divide end in an AssertionError. Such are the projector's first, 18 columns wider than the encoder, and
those of the MLPs of Qwen2.5-VL's tower, 3,420 wide. Left in full precision, a checkpoint says the same everywhere;
one that was saved with such matrices in 4 bits is read as it is.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert

_BLOCK = 64
_ROWS = 32
# where a hub's config is looked for
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def leave_odd_shapes(settings: Any, kind: Any, path: Any, given: Mapping[str, Any]) -> Any:
    """A `quantization_config` (or its values) that also names what 4 bits do not fit; other kinds stay as they are.

    kind: the model's class. path, given: what else its `from_pretrained` was called with.
    """
    if isinstance(settings, dict):
        settings = AutoQuantizationConfig.from_dict(settings)
    if not getattr(settings, "load_in_4bit", False):
        return settings
    config = given.get("config")
    if not isinstance(config, PreTrainedConfig):
        there = {name: given[name] for name in _WHERE if name in given}
        config = kind.config_class.from_pretrained(config or path, **there)
    with torch.device("meta"):
        # building a model writes into its config
        model = kind(copy.deepcopy(config))
    odd = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module.in_features % _BLOCK or module.out_features % _ROWS)
    }
    settings = copy.deepcopy(settings)
    chosen = settings.llm_int8_skip_modules
    # transformers leaves the output and what is tied to it only where nothing is named
    settings.llm_int8_skip_modules = sorted(odd.union(get_keys_to_not_convert(model) if chosen is None else chosen))
    return settings
