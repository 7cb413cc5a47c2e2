"""Stage `tower`: the image tower learns what lies under each of its tokens, before any language is involved.

Legend: B pictures, M merged tokens per picture, C the tower's output width
    features (B, M, C); logits[channel] (B, M, classes); targets[channel] int64 (B, M)

Why line, column and the like are taught as well as the digit: all image tokens of a window share one rotary
position for one-dimensional rotary text models, so text finds "line 2, digit 3" by what a token says, not by
where it stands. The tower's attention marks every token, and answering becomes looking up.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from casa.training.dense import DenseBatch
from casa.training.patches import to_pixels
from casa.training.tower_batch import encode_batch

_SHOWN = 0.75  # share of a channel's loss that cells get where it says something; most cells say "nothing here"


class DenseHeads(nn.Module):
    """One linear map per channel over the tower's normalised output."""

    def __init__(self, width: int, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.width = width
        self.maps = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in channels.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        # the projector of the fused model normalises as well, so what is readable here stays readable there
        normal = F.layer_norm(features, (self.width,))
        return {name: linear(normal) for name, linear in self.maps.items()}


def new_tower(config: Mapping[str, object]) -> Qwen2_5_VisionTransformerPretrainedModel:
    """A tower with fresh weights. config: keys of transformers' Qwen2_5_VLVisionConfig."""
    made = Qwen2_5_VLVisionConfig(**dict(config))  # type: ignore[arg-type]
    made._attn_implementation = "sdpa"
    return Qwen2_5_VisionTransformerPretrainedModel(made)


def dense_loss(
    logits: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    weights: Mapping[str, float],
    empty: Mapping[str, int],
    smoothing: float,
) -> tuple[Tensor, dict[str, float]]:
    """Weighted cross-entropy over all channels, and its part per channel.

    weights: per channel. empty: the class of each channel that means "nothing here". Within a channel, the cells
    where it says something share three quarters of the weight, however few they are.
    """
    parts, total = {}, torch.zeros(())
    for name, weight in weights.items():
        loss = F.cross_entropy(
            logits[name].flatten(0, -2), targets[name].flatten(), reduction="none", label_smoothing=smoothing
        )
        shown = (targets[name] != empty[name]).flatten()
        part = loss[~shown].mean() if not shown.all() else loss.mean()
        if shown.any():
            part = _SHOWN * loss[shown].mean() + (1 - _SHOWN) * part
        parts[name] = float(part.detach())
        total = total + weight * part
    return total, parts


def run_batch(
    tower: Qwen2_5_VisionTransformerPretrainedModel, heads: DenseHeads, batch: DenseBatch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits and targets of a batch."""
    features = encode_batch(tower, to_pixels(batch.patches), batch.grid)
    return heads(features), {name: torch.from_numpy(np.asarray(t)) for name, t in batch.targets.items()}


@torch.no_grad()
def dense_accuracy(
    logits: Mapping[str, Tensor], targets: Mapping[str, Tensor], empty: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Per channel, over cells where it says something: (right, all)."""
    found = {}
    for name, target in targets.items():
        shown = target != empty[name]
        right = (logits[name].argmax(-1) == target)[shown]
        found[name] = (int(right.sum()), int(right.numel()))
    return found
