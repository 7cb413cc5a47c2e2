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

from casa.attention.ask import Ask
from casa.errors import UserError
from casa.windows import WindowLayout

# keys (n, Hkv, D) of an earlier window and how many text tokens further back its start lies (negative)
Turn = Callable[[Tensor, int], Tensor]

ATTEND = ("both", "image")

# Modules are loaded on first use: flex pulls in the compiler. Each has an `attention` function of the same
# signature, and none imports another. Where there is something that one cannot do, it has `refusal(ask)` too.
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
    turn: Turn | None = None,
) -> Tensor:
    """Attention of packed text to the images and the text of its windows (paper, Eq. 3; see `WindowLayout`).

    query: (Q, Hq, D), one row per text token that has a query (all of them unless the layout has a `past`).
    text_key, text_value: (T, Hkv, D). image_key, image_value: (N, Hkv, D). One floating dtype, one device; under
        autocast all are taken to its dtype.
    scale: of the scores; D ** -0.5 if None.
    attend: "both" is CASA; "image" leaves out the text, which is plain cross-attention.
    impl: "reference" (any dtype, slow, the definition), "sdpa" (any dtype, any device), "flex" (compiled), "varlen"
        (CUDA, half precision), or "auto", see `choose`. All mean the same; one that cannot do a call refuses it.
    turn: with `history`, called as turn(key, delta) on the keys of an earlier window's images, where delta is
        that window's start minus the start of the window that looks (text tokens, negative), so that rotary
        keys counted from their own window's start keep their true distance. None leaves them as they are.

    Returns (Q, Hq, D), with zeros where a query sees nothing. Raises ValueError for arguments that do not fit
    together, for an unknown name, and where an implementation cannot do the layout.
    """
    if impl != "auto" and impl not in _MODULES:
        known = ("auto", *_MODULES)
        near = get_close_matches(str(impl), known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"there is no attention implementation {impl!r}; known are {', '.join(known)}.{hint}")
    if attend not in ATTEND:
        raise UserError(f"attend is {attend!r}, but must be 'both' (text and images) or 'image'.")
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        # as PyTorch's own attention does: projections come in half precision, what was rotated in single
        low = torch.get_autocast_dtype(kind)
        query, text_key, text_value, image_key, image_value = (
            tensor.to(low) for tensor in (query, text_key, text_value, image_key, image_value)
        )
    _check(query, text_key, text_value, image_key, image_value, layout)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    given = (query, text_key, text_value, image_key, image_value)
    ask = Ask(
        layout=layout,
        dtype=query.dtype,
        device=query.device,
        width=query.shape[-1],
        attend=attend,
        turning=turn is not None and layout.history != 0,
        backward=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given),
    )
    name = choose(ask) if impl == "auto" else impl
    if (reason := refusal(name, ask)) is not None:
        raise UserError(reason)
    return _module(name).attention(
        query, text_key, text_value, image_key, image_value, layout, scale=factor, attend=attend, turn=turn
    )


def choose(ask: Ask) -> str:
    """The implementation that "auto" stands for: the first of these that does not refuse.

    On CUDA "varlen"; then, where a gradient is wanted, "flex"; then "sdpa". Everywhere else "sdpa". Without a
    gradient flex is left out because it compiles, for seconds, each new size that a stream or a prompt brings.
    """
    if ask.device.type != "cuda":
        return "sdpa"
    names = ("varlen", "flex", "sdpa") if ask.backward else ("varlen", "sdpa")
    return next(name for name in names if refusal(name, ask) is None)


def refusal(name: str, ask: Ask) -> str | None:
    """Why the named implementation cannot do what is asked, and what to do instead; None if it can."""
    refuse: Callable[[Ask], str | None] | None = getattr(_module(name), "refusal", None)
    return None if refuse is None else refuse(ask)


def _module(name: str) -> ModuleType:
    # kept here, because a model that is compiled cannot trace an import
    if name not in _loaded:
        _loaded[name] = import_module(_MODULES[name])
    return _loaded[name]


def _check(q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, layout: WindowLayout) -> None:
    named = {
        "query": q,
        "text_key": text_k,
        "text_value": text_v,
        "image_key": image_k,
        "image_value": image_v,
    }
    for name, tensor in named.items():
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions (tokens, heads, width), not {tuple(tensor.shape)}.")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but query is {q.dtype}; give all in one dtype.")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {q.device}; give all on one device.")
    if not q.dtype.is_floating_point:
        raise ValueError(f"attention needs a floating dtype, not {q.dtype}.")
    _, Hq, D = q.shape
    Hkv = text_k.shape[1]
    if Hkv == 0 or Hq == 0 or Hq % Hkv:
        raise ValueError(f"{Hq} query heads cannot share {Hkv} key heads; the first must be a multiple.")
    tokens = {"query": layout.num_query, "text_key": layout.num_text, "text_value": layout.num_text}
    tokens |= {"image_key": layout.num_image, "image_value": layout.num_image}
    for name, tensor in named.items():
        want = torch.Size((tokens[name], Hq if name == "query" else Hkv, D))
        if tensor.shape != want:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the layout and heads ask for {tuple(want)}.")
