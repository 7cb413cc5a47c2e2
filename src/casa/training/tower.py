"""Stage `tower`: the image tower learns what lies under each of its tokens, before any language is involved.

Legend: B pictures, M merged tokens per picture, C the tower's output width
    features (B, M, C); logits[channel] (B, M, classes); targets[channel] int64 (B, M)

Why line, column and the like are taught as well as the digit: all image tokens of a window share one rotary
position for one-dimensional rotary text models, so text finds "line 2, digit 3" by what a token says, not by
where it stands. The tower's attention marks every token, and answering becomes looking up.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from casa.errors import UserError
from casa.training.checkpoints import mark_done
from casa.training.dense import DenseBatch, DenseBatches
from casa.training.loop import Loop, Monitor, Report
from casa.training.patches import MERGE, PATCH, to_pixels
from casa.training.prefetch import prefetch
from casa.training.recipe import Recipe
from casa.training.sources import Sources
from casa.training.tower_batch import encode_batch

HEADS = "heads.safetensors"
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


class TowerWithHeads(nn.Module):
    """What the stage trains: the tower, and the heads that are left behind afterwards."""

    def __init__(self, tower: Qwen2_5_VisionTransformerPretrainedModel, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.tower = tower
        self.heads = DenseHeads(tower.config.out_hidden_size, channels)

    def forward(self, batch: DenseBatch) -> dict[str, Tensor]:
        return self.heads(encode_batch(self.tower, to_pixels(batch.patches), batch.grid))


def new_tower(settings: Mapping[str, Any]) -> Qwen2_5_VisionTransformerPretrainedModel:
    """A tower with fresh weights. settings: keys of transformers' Qwen2_5_VLVisionConfig.

    UserError if they do not fit together. Pictures are single frames, and are cut as the processor cuts them.
    """
    fixed = {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 1, "in_channels": 3}
    for name, value in fixed.items():
        if settings.get(name, value) != value:
            raise UserError(f"tower.model.{name} is {settings[name]!r}; only {value} is trained here.")
    try:
        config = Qwen2_5_VLVisionConfig(**{**settings, **fixed})
        config._attn_implementation = "sdpa"
        return Qwen2_5_VisionTransformerPretrainedModel(config)
    except (TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"tower.model does not make an image tower: {reason}") from error


def train_tower(
    recipe: Recipe,
    sources: Sources,
    folder: Path,
    report: Report | None = None,
    monitor: Monitor | None = None,
) -> Qwen2_5_VisionTransformerPretrainedModel:
    """Trains the tower; writes it, and the heads beside it, to `folder` when done."""
    stage = recipe.tower
    torch.manual_seed(recipe.seed + 2)
    classes = {name: sources.channels[name] for name in stage.channels}
    model = TowerWithHeads(new_tower(stage.model), classes)
    model.train()
    loop = Loop("tower", folder, dict(model.named_parameters()), stage.optimisation, report)
    if monitor is not None:
        loop.watch = lambda step: monitor("tower", step, model)
    start = loop.resume()
    empty = {name: sources.empty.get(name, 0) for name in stage.channels}

    def batches() -> Iterator[DenseBatch]:
        make = DenseBatches(sources, stage, recipe.seed)
        return prefetch(make, start, stage.optimisation.steps, recipe.workers)

    def loss_of(batch: DenseBatch, step: int) -> Tensor:
        targets = {name: torch.from_numpy(target) for name, target in batch.targets.items()}
        return dense_loss(model(batch), targets, stage.channels, empty, stage.smoothing, stage.exact)

    facts = loop.run(start, batches(), loss_of)
    model.eval()
    model.tower.save_pretrained(folder)
    save_file(model.heads.state_dict(), folder / HEADS)
    mark_done(folder, facts)
    return model.tower


def dense_loss(
    logits: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    weights: Mapping[str, float],
    empty: Mapping[str, int],
    smoothing: float,
    exact: Collection[str] = (),
) -> Tensor:
    """Weighted sum of the channels' cross-entropies.

    weights: per channel. empty: the class of each channel that means "nothing here". Within a channel, the cells
    where it says something share three quarters of the weight, however few they are. Cells below 0 are passed over.
    exact: channels in which all cells weigh the same and labels are not smoothed, for targets of a single cell: if that
    were made heavier, the cells around it would claim it too.
    """
    total = torch.zeros(())
    for name, weight in weights.items():
        target = targets[name].flatten()
        smooth = 0.0 if name in exact else smoothing
        loss = F.cross_entropy(logits[name].flatten(0, -2), target, reduction="none", label_smoothing=smooth)
        known = target >= 0
        shown = known & (target != empty[name])
        bare = known & ~shown
        if name in exact and shown.any():
            total = total + weight * loss[known].sum() / (4 * shown.sum())
        elif shown.any() and bare.any():
            total = total + weight * (_SHOWN * loss[shown].mean() + (1 - _SHOWN) * loss[bare].mean())
        elif known.any():
            total = total + weight * loss[known].mean()
    return total


@torch.no_grad()
def dense_accuracy(
    logits: Mapping[str, Tensor], targets: Mapping[str, Tensor], empty: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Per channel, over cells where it says something: (right, all)."""
    found = {}
    for name, target in targets.items():
        shown = (target != empty[name]) & (target >= 0)
        right = (logits[name].argmax(-1) == target)[shown]
        found[name] = (int(right.sum()), int(right.numel()))
    return found
