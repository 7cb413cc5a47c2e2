"""Stage `tower`: the image tower learns what lies under each of its tokens, before any language is involved.

Legend: B pictures of one size, P patches of a picture, M = P / 4 merged tokens (cells of 28 x 28 px), C the tower's
output width, H heads, D head width
    patches uint8 (B, P, 588), four of a merged token in a row; grid (rows, columns) of patches
    features (B, M, C); logits[channel] (B, M, classes); targets int64 (channels, B, M)

Why line, column and the like are taught as well as the digit: all image tokens of a window share one rotary position
for one-dimensional rotary text models, so text finds "line 2, digit 3" by what a token says, not by where it stands.
The tower's attention marks every token, and answering becomes looking up.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_position_ids

from casa.errors import UserError
from projects.casa_tiny.recipe import CELL, Recipe, Sizes, TowerStage
from projects.casa_tiny.stage import train_stage
from projects.casa_tiny.targets import CHANNELS, EMPTY, dense_targets
from projects.casa_tiny.tasks import PICTURES, SIDES

PATCH, MERGE = 14, 2
MEAN = STD = 0.5
_SHOWN = 0.75  # share of a channel's loss that cells get where it says something; most cells say "nothing here"


def train_tower(recipe: Recipe, out: Path, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Trains the tower; writes it, and the heads beside it, to `out/tower`."""
    stage = recipe.tower
    torch.manual_seed(recipe.seed + 2)
    model = TowerWithHeads(new_tower(stage.model), stage)

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        return (draw_batch(stage, recipe.seed, step) for step in range(start, stage.optimisation.steps))

    def save(folder: Path) -> None:
        model.tower.save_pretrained(folder)
        save_file(model.heads.state_dict(), folder / "heads.safetensors")

    train_stage(recipe, "tower", model, batches, out, save, callbacks)


def new_tower(settings: Mapping[str, Any]) -> Qwen2_5_VisionTransformerPretrainedModel:
    """A tower with fresh weights, for single frames, cut as the processor cuts them.

    Args:
        settings: Keys of transformers' Qwen2_5_VLVisionConfig.

    Raises:
        UserError: They do not fit together.
    """
    fixed = {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 1, "in_channels": 3}
    try:
        config = Qwen2_5_VLVisionConfig(**{**settings, **fixed})
        config._attn_implementation = "sdpa"
        tower = Qwen2_5_VisionTransformerPretrainedModel(config)
    except (TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"tower.model does not make an image tower: {reason}") from error
    if {*range(len(tower.blocks))} - {*config.fullatt_block_indexes}:
        raise UserError("tower.model.fullatt_block_indexes must name every block: windows are not trained here.")
    return tower


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

    def __init__(self, tower: Qwen2_5_VisionTransformerPretrainedModel, stage: TowerStage) -> None:
        super().__init__()
        self.tower, self.stage, self.config = tower, stage, tower.config
        self.heads = DenseHeads(tower.config.out_hidden_size, {name: CHANNELS[name] for name in stage.channels})

    def forward(self, patches: Tensor, grid: Tensor, targets: Tensor) -> dict[str, Tensor]:
        rows, columns = grid.tolist()
        logits = self.heads(encode_batch(self.tower, to_pixels(patches), (rows, columns)))
        wanted = dict(zip(self.stage.channels, targets, strict=True))
        return {"loss": dense_loss(logits, wanted, self.stage.channels, self.stage.smoothing, self.stage.exact)}


def draw_batch(stage: TowerStage, seed: int, step: int) -> dict[str, Tensor]:
    """The batch of a step: pictures of one size, with their targets."""
    rng = np.random.default_rng([seed, 2, step])
    share = step / stage.optimisation.steps
    sizes = next((s for s in stage.sizes if share < s.until), stage.sizes[-1])
    height, width = _size(sizes, rng)
    count = max(1, round((sizes.patches or stage.patches) * PATCH**2 / (height * width)))
    names = [n for n in stage.mix if SIDES[n][0] <= min(height, width) and max(height, width) <= SIDES[n][1]]
    if not names:
        raise UserError(f"no source of the tower's mix draws pictures of {height} x {width} px; change its sizes.")
    shares = np.array([stage.mix[name] for name in names])
    chosen = rng.choice(len(names), count, p=shares / shares.sum())
    examples = [PICTURES[names[i]](rng, (height, width)) for i in chosen]
    found = [dense_targets(example) for example in examples]
    return {
        "patches": torch.from_numpy(np.stack([patchify(np.asarray(example.image)) for example in examples])),
        "grid": torch.tensor((height // PATCH, width // PATCH)),
        "targets": torch.from_numpy(np.stack([[each[name].ravel() for each in found] for name in stage.channels])),
    }


def _size(sizes: Sizes, rng: np.random.Generator) -> tuple[int, int]:
    # small sides are drawn more often: their pictures are cheap, and batches of them are varied
    low, high = sizes.smallest / CELL, sizes.largest / CELL + 1
    height, width = (int(v) * CELL for v in low * (high / low) ** rng.random(2))
    return height, width


def dense_loss(
    logits: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    weights: Mapping[str, float],
    smoothing: float,
    exact: Collection[str] = (),
) -> Tensor:
    """Weighted sum of the channels' cross-entropies.

    Within a channel, the cells where it says something share three quarters of the weight, however few they are. Cells
    below 0 are passed over.

    Args:
        logits: Per channel, (B, M, classes).
        targets: Per channel, int64 (B, M).
        weights: Per channel.
        smoothing: Of labels.
        exact: Channels in which all cells weigh the same and labels are not smoothed, for targets of a single cell: if
            that were made heavier, the cells around it would claim it too.
    """
    total = torch.zeros(())
    for name, weight in weights.items():
        target = targets[name].flatten()
        smooth = 0.0 if name in exact else smoothing
        loss = F.cross_entropy(logits[name].flatten(0, -2), target, reduction="none", label_smoothing=smooth)
        known = target >= 0
        shown = known & (target != EMPTY[name])
        bare = known & ~shown
        if name in exact and shown.any():
            total = total + weight * loss[known].sum() / (4 * shown.sum())
        elif shown.any() and bare.any():
            total = total + weight * (_SHOWN * loss[shown].mean() + (1 - _SHOWN) * loss[bare].mean())
        elif known.any():
            total = total + weight * loss[known].mean()
    return total


def patchify(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Patches (H/14 * W/14, 588) of an RGB picture (H, W, 3), ordered as transformers' image processor orders them.

    They stay bytes until the batch is formed: a quarter of the memory, and of the traffic between processes.
    """
    height, width, channels = picture.shape
    if height % CELL or width % CELL or channels != 3:
        raise ValueError(f"a picture of shape {picture.shape} cannot be cut; sides must be multiples of {CELL} px.")
    cut = picture.reshape(height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH, 3)
    return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH * PATCH)


def to_pixels(patches: Tensor) -> Tensor:
    """Bytes (..., 588) to normalised float32 of the same shape, within -1..1."""
    return (patches.float() / 255 - MEAN) / STD


def encode_batch(tower: Any, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Merged tokens (B, M, C) in raster order, as `tower(...).pooler_output` gives them picture by picture.

    transformers' forward runs attention one picture at a time; here all go through one call, several times faster.

    Args:
        tower: A Qwen2_5_VisionTransformerPretrainedModel without windows.
        pixels: (B, P, 588).
        grid: Rows and columns of patches.
    """
    batch, patches, _ = pixels.shape
    positions = get_vision_position_ids(torch.tensor([[1, *grid]]), tower.spatial_merge_size)
    proj = tower.patch_embed.proj
    x = F.linear(pixels.to(proj.weight.dtype), proj.weight.flatten(1))
    cos, sin = (angle.to(x.dtype) for angle in tower.rotary_pos_emb(x, positions))
    for block in tower.blocks:
        x = x + _attend(block.attn, _rms(block.norm1, x), cos, sin)
        x = x + block.mlp(_rms(block.norm2, x))
    merger = tower.merger
    return merger.mlp(_rms(merger.ln_q, x).view(batch, patches // tower.spatial_merge_unit, -1))


def _rms(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _attend(attn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, patches, width = x.shape
    qkv = attn.qkv(x).view(batch, patches, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    turned = qkv[:2]
    first, second = turned.chunk(2, dim=-1)
    query, key = (turned * cos + torch.cat((-second, first), dim=-1) * sin).unbind(0)  # (B, H, P, D)
    out = F.scaled_dot_product_attention(query, key, qkv[2])
    return attn.proj(out.transpose(1, 2).reshape(batch, patches, width))
