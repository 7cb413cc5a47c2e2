"""CASA attention through FlexAttention: one compiled kernel that skips the blocks no window touches.

Shapes as in dispatch.py; keys and values are images then text, N + T of them. Compiling needs a C++ compiler
on a CPU and Triton on a GPU. On a CPU torch (2.13) has no backward for it.
"""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor

from casa.attention.common import AttentionInputs, AttentionRequest, zeros_of
from casa.windows import WindowLayout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 128  # sides of the mask's blocks: torch's default, a multiple of every tile its kernels choose

# Kernels that may be compiled in one process. Sizes are powers of two, about nine for queries and as many for keys,
# few of which meet in one run; torch's own bound of 8 is for code that was not meant to be compiled per size.
KERNELS = 64


def refusal(request: AttentionRequest) -> str | None:
    """Why flex cannot do what is asked, with the remedy; None if it can."""
    kind = request.device.type
    if kind not in ("cpu", "cuda"):
        return f"flex runs on CPU and CUDA and the tensors are on {kind}; use impl='sdpa'."
    if kind == "cpu" and request.backward:
        return "flex has no backward on CPU; use impl='sdpa', or torch.no_grad() for forward only."
    if request.turning:
        return "flex cannot turn the keys of earlier windows (history), a key has one angle here; use impl='sdpa'."
    if request.dtype not in DTYPES:
        return f"flex takes float32, float16 and bfloat16, not {request.dtype}; use impl='sdpa', or convert the model."
    if kind == "cuda" and request.width < 16:
        return f"flex takes heads of at least 16 channels on CUDA, not {request.width}; use impl='sdpa'."
    if kind == "cuda" and not _has_triton():
        return "flex needs Triton on CUDA and it is not installed; use impl='sdpa', or install triton."
    # not inside somebody else's compile, which cannot trace a search for files
    if kind == "cpu" and not torch.compiler.is_compiling() and which(_cxx()) is None:
        return (
            f"flex needs a C++ compiler on a CPU and there is no {_cxx()!r}; use impl='sdpa', or install one and "
            "name it in CXX."
        )
    return None


def attention(inputs: AttentionInputs) -> Tensor:
    """See `casa_attention`. `turn` has nothing to turn: with history it is refused."""
    query, layout, attend = inputs.query, inputs.layout, inputs.attend
    if not len(query) or not sum(map(len, inputs.keys)):
        return zeros_of(query)

    device = query.device
    mask = layout.cached(("flex", attend, device), lambda: _block_mask(layout, attend, device))
    q, k, v = (_padded(*rows).transpose(0, 1)[None] for rows in ([query], inputs.keys, inputs.values))
    with _room_for_kernels():
        out = _compiled()(q, k, v, block_mask=mask, scale=inputs.scale, enable_gqa=q.shape[1] != k.shape[1])
    out = out[0].transpose(0, 1)[: len(query)]
    if attend == "image":
        out = torch.where(layout.on(device, "sees_image")[:, None, None], out, out.new_zeros(()))
    return out


@cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    # Not dynamic: torch 2.13 then generates C++ that does not compile. One kernel per padded size instead; where
    # torch gives up on compiling ever more of them, fullgraph makes it say so rather than run a dense mrequest.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _room_for_kernels():
    """torch's bound on compiled sizes, raised for the call; inside somebody else's compile it is theirs to set."""
    if torch.compiler.is_compiling():
        return nullcontext()
    from torch._dynamo import config

    return config.patch(recompile_limit=max(KERNELS, config.recompile_limit))


def _size(length: int) -> int:
    """A power of two from one block on, so that there are few sizes to compile; empty blocks cost nothing."""
    return max(BLOCK, 1 << (length - 1).bit_length())


def _padded(*rows: Tensor, fill: float = 0) -> Tensor:
    """(n, ...), (m, ...), ... -> (_size(n + m + ...), ...), in one copy"""
    length = sum(map(len, rows))
    first = rows[0]
    return torch.cat([*rows, first.new_full((_size(length) - length, *first.shape[1:]), fill)])


def _cxx() -> str:
    """The C++ compiler that torch calls: what CXX names, or the usual one of the system."""
    return os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _block_mask(layout: WindowLayout, attend: str, device: torch.device):
    """The layout's mask by blocks, computed by rule from a few numbers per token."""
    from torch.nn.attention.flex_attention import create_block_mask

    # Every key has a window and stands before a text token; a text token stands before itself.
    # Queries see text of their own window, and images from the first window visible to them on.
    query, mine = layout.query_index, layout.text_window[layout.query_index]
    window, stands = layout.image_window, layout.image_text_index
    is_image = torch.ones(layout.num_image, dtype=torch.bool)
    if attend == "both":
        window = torch.cat([window, layout.text_window])
        stands = torch.cat([stands, torch.arange(layout.num_text)])
        is_image = torch.cat([is_image, torch.zeros(layout.num_text, dtype=torch.bool)])
    # padding lies in windows that do not exist, another for queries than for keys
    token, latest, oldest = (
        _padded(x, fill=-2).to(device, torch.int32) for x in (query, mine, layout.first_visible[mine])
    )
    window, stands = (_padded(x, fill=fill).to(device, torch.int32) for x, fill in ((window, -1), (stands, 0)))
    is_image = _padded(is_image, fill=0).to(device)

    # Comparisons only: the mask of everything, made once per layout, is then never larger than one byte an entry.
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = window[key] >= latest[query]
        earlier = is_image[key] & (window[key] >= oldest[query])
        return (own | earlier) & (window[key] <= latest[query]) & (stands[key] <= token[query])

    return create_block_mask(sees, None, None, len(token), len(window), device=str(device), BLOCK_SIZE=BLOCK)
