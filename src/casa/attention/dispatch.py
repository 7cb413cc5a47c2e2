"""`casa_attention`: checks its arguments once, then hands them to the implementation asked for.

Shapes: Q = layout.num_query, T = layout.num_text, N = layout.num_image, Hq query heads,
Hkv key and value heads (Hq % Hkv == 0; query head h uses key head h // (Hq / Hkv)), D head width.
"""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from casa.attention.common import AttentionInputs, AttentionRequest, TurnKeys
from casa.errors import UserError
from casa.windows import WindowLayout

ATTEND = ("both", "image")

# Modules are loaded on first use: flex pulls in the compiler. Each has `attention(inputs)`, and none imports another.
# One that cannot do everything also has `refusal(request)`, which gives the reason and the remedy, or None.
_MODULES = {
    "reference": "casa.attention.reference",
    "sdpa": "casa.attention.sdpa",
    "flex": "casa.attention.flex",
    "varlen": "casa.attention.varlen",
}
_loaded: dict[str, ModuleType] = {}


def implementations() -> tuple[str, ...]:
    """The names that `impl` takes, besides "auto"."""
    return tuple(_MODULES)


def casa_attention(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    layout: WindowLayout,
    scale: float | None = None,
    attend: str = "both",
    impl: str = "auto",
    turn: TurnKeys | None = None,
) -> Tensor:
    """Computes attention of packed text to the images and the text of its windows (paper, Eq. 3; see `WindowLayout`).

    Args:
        query: (Q, Hq, D), one row per text token that has a query (all of them unless the layout has a `past`).
        text_key: (T, Hkv, D). All tensors have one floating dtype and one device; under autocast, its dtype.
        text_value: (T, Hkv, D).
        image_key: (N, Hkv, D).
        image_value: (N, Hkv, D).
        layout: Which text sees what.
        scale: Of the scores; D ** -0.5 if None.
        attend: "both" is CASA; "image" leaves out the text, which is plain cross-attention.
        impl: "reference" (any dtype, slow, the definition), "sdpa" (any dtype, any device), "flex" (compiled), "varlen"
            (CUDA, half precision), or "auto", see `choose`. All mean the same; one that cannot do a call refuses it.
        turn: With `history`, called as turn(key, delta) on the keys of an earlier window's images, where delta is
            that window's start minus the start of the window that looks (text tokens, negative), so that rotary
            keys counted from their own window's start keep their true distance. None leaves them as they are.

    Returns:
        (Q, Hq, D), with zeros where a query sees nothing.

    Raises:
        ValueError: The arguments do not fit together, the name is unknown, or the implementation cannot do the layout.
    """
    if impl != "auto" and impl not in _MODULES:
        known = ("auto", *_MODULES)
        near = get_close_matches(str(impl), known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"there is no attention implementation {impl!r}; known are {', '.join(known)}.{hint}")
    if attend not in ATTEND:
        raise UserError(f"attend is {attend!r}, but must be 'both' (text and images) or 'image'.")
    tensors = (query, text_key, text_value, image_key, image_value)
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        # as PyTorch's own attention does: projections come in half precision, what was rotated in single
        tensors = tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    inputs = AttentionInputs(*tensors, layout=layout, scale=factor, attend=attend, turn=turn)
    _check(inputs)
    request = inputs.request()
    name = choose(request) if impl == "auto" else impl
    if (reason := refusal(name, request)) is not None:
        raise UserError(reason)
    return _module(name).attention(inputs)


def choose(request: AttentionRequest) -> str:
    """The implementation that "auto" stands for: the first of these that does not refuse.

    On CUDA "varlen"; then, where a gradient is wanted, "flex"; then "sdpa". Everywhere else "sdpa". Without a
    gradient flex is left out because it compiles, for seconds, each new size that a stream or a prompt brings.
    """
    if request.device.type != "cuda":
        return "sdpa"
    names = ("varlen", "flex", "sdpa") if request.backward else ("varlen", "sdpa")
    return next(name for name in names if refusal(name, request) is None)


def refusal(name: str, request: AttentionRequest) -> str | None:
    """Why the named implementation cannot do what is asked, and what to do instead; None if it can."""
    refuse: Callable[[AttentionRequest], str | None] | None = getattr(_module(name), "refusal", None)
    return None if refuse is None else refuse(request)


def _module(name: str) -> ModuleType:
    # kept here, because a model that is compiled cannot trace an import
    if name not in _loaded:
        _loaded[name] = import_module(_MODULES[name])
    return _loaded[name]


def _check(inputs: AttentionInputs) -> None:
    query, layout = inputs.query, inputs.layout
    _, Hq, D = query.shape if query.dim() == 3 else (0, 0, 0)
    Hkv = inputs.text_key.shape[1] if inputs.text_key.dim() > 1 else 0
    tokens = {
        "query": layout.num_query,
        "text_key": layout.num_text,
        "text_value": layout.num_text,
        "image_key": layout.num_image,
        "image_value": layout.num_image,
    }
    for name in tokens:
        tensor: Tensor = getattr(inputs, name)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions (tokens, heads, width), not {tuple(tensor.shape)}.")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but query is {query.dtype}; give all in one dtype.")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}; give all on one device.")
    if not query.dtype.is_floating_point:
        raise ValueError(f"attention needs a floating dtype, not {query.dtype}.")
    if Hkv == 0 or Hq == 0 or Hq % Hkv:
        raise ValueError(f"{Hq} query heads cannot share {Hkv} key heads; the first must be a multiple.")
    for name, count in tokens.items():
        shape, want = tuple(getattr(inputs, name).shape), (count, Hq if name == "query" else Hkv, D)
        if shape != want:
            raise ValueError(f"{name} has shape {shape}, but the layout and heads ask for {want}.")
