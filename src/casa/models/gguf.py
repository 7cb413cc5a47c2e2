"""A GGUF file's weights as transformers would have them, sooner and without other packages: of the Llama family alone.

transformers needs a quarter of a minute for the 98 MB of SmolLM2. Floats are those that it makes of them, bit for bit.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_SINGLE = "BbHhIif?  QqdE"  # values by their kind; 8 is a text, 9 a list
_PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# by kind: values of a block, and what it is made of
_BLOCKS: dict[int, tuple[int, Any]] = {
    0: (1, [("d", "<f4")]),
    3: (32, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),
    8: (32, [("d", "<f2"), ("q", "i1", 32)]),
}


def llama_weights(file: Path) -> dict[str, Tensor] | None:
    """float32, by transformers' names; None for another family, weights of a kind not known here, or a damaged file."""
    try:
        with file.open("rb") as opened:
            return _weights(opened)
    except (struct.error, ValueError, LookupError):
        return None


def _weights(file: BinaryIO) -> dict[str, Tensor]:
    def number(form: str) -> Any:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

    def text() -> str:
        return file.read(number("Q")).decode("utf-8", "replace")

    def value(kind: int) -> Any:
        if kind == 9:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return text() if kind == 8 else number(_SINGLE[kind])

    _, _, tensors, fields = number("I"), number("I"), number("Q"), number("Q")
    told = {text(): value(number("I")) for _ in range(fields)}
    listed = [(text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")) for _ in range(tensors)]
    edge = told.get("general.alignment", 32)
    start = -(-file.tell() // edge) * edge
    heads = {"attn_q": told["llama.attention.head_count"], "attn_k": told["llama.attention.head_count_kv"]}
    found = {}
    for name, sides, kind, offset in listed:
        file.seek(start + offset)
        shape = sides[::-1]
        values = _floats(file, kind, math.prod(shape)).reshape(shape)
        *block, part, suffix = name.split(".")
        if part in heads:  # rotary pairs stand side by side there
            values = values.reshape(heads[part], -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        inside = f"model.layers.{block[1]}.{_PARTS[part]}" if block else _WHOLE[part]
        found[f"{inside}.{suffix}"] = torch.from_numpy(np.ascontiguousarray(values))
    return found


def _floats(file: BinaryIO, kind: int, count: int) -> np.ndarray:
    size, form = _BLOCKS[kind]
    block = np.fromfile(file, np.dtype(form), count // size)
    scale = block["d"].astype(np.float32)[:, None]
    if kind == 0:
        return scale
    if kind == 8:
        return block["q"].astype(np.float32) * scale
    halves = np.concatenate([block["q"] & 15, block["q"] >> 4], axis=1).astype(np.float32)
    return halves * scale + block["m"].astype(np.float32)[:, None]
