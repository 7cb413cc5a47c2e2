"""Sight into a model: where it looks, what it holds, and what it does without some of its parts; and what it costs.

    shares = attention_shares(model, inputs)        # per token, layer and head: itself, other text, image, sinks
    lens = logit_lens(model, inputs, tokens)        # what each block would say
    norms = image_norms(model, inputs)              # how large image tokens are
    with ablated(model, "no-self-attention"): ...   # the model without a part of it

`inputs` are one text as the processor makes it. All numbers are tensors on the CPU. docs/inspect.md has more.
"""

from casa.analysis.ablations import ABLATIONS, NamedAblation, ablated, parse_ablation
from casa.analysis.attention_maps import KINDS, AttentionShares, attention_shares
from casa.analysis.hidden_states import ImageNorms, LogitLens, image_norms, logit_lens

__all__ = [
    "ABLATIONS",
    "KINDS",
    "AttentionShares",
    "ImageNorms",
    "LogitLens",
    "NamedAblation",
    "ablated",
    "attention_shares",
    "image_norms",
    "logit_lens",
    "parse_ablation",
]
