"""What every method costs for a given model, side by side, from configs alone, and tables of it for people.

Costs are parameters, training and cache bytes, and floating-point operations. Parameters are counted on the model
itself, built on the meta device. Shapes: Hkv key heads, D channels of a head, N image tokens of a frame.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from casa.analysis.flops import BlockShape, blocks_of, frame_flops, frame_of, token_flops
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, FusionConfig
from casa.models.adapt import ADDED, skeleton

METHODS: dict[str, dict[str, Any]] = {
    "insertion": {"method": "insertion"},
    "CASA ⊕": {},
    "CASA →": {"placement": "before"},
    "CASA ∨, every 4th": {"placement": "replace", "every": 4},
    "cross-attention": {"method": "cross_attention"},
    "cross-attention, tanh": {"method": "cross_attention", "gate": "tanh"},
    "CASA ⊕, shared (D1)": {"share_weights": True},
    "CASA ⊕, images updated (D4)": {"update_images": True},
    "CASA ⊕, all images seen (D5)": {"history": -1},
}
MOMENT_BYTES = 8  # AdamW: two moments in float32
MASTER_BYTES = 4  # a copy of each trained weight in float32


@dataclass(frozen=True)
class Scene:
    """What is watched.

    Attributes:
        height, width: Of a frame, in pixels.
        frames: After how many frames to look.
        text_per_frame: Text tokens of a turn; 18 are the paper's 16 and two delimiters.
        dtype: Of weights, gradients and caches.
    """

    height: int = 896
    width: int = 896
    frames: tuple[int, ...] = (1, 256)
    text_per_frame: int = 18
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if not self.frames or min(self.height, self.width, self.text_per_frame, *self.frames) < 1:
            raise UserError("a scene needs a height, a width, frames and text per frame of 1 or more.")


@dataclass(frozen=True)
class Moment:
    """After some frames, at the last text token of the turn. Bytes and operations (see `flops`)."""

    frames: int
    cache_bytes: int
    frame_flops: int
    token_flops: int


@dataclass(frozen=True)
class Budget:
    """One method's costs. Counts are of parameters or tokens; sizes are bytes.

    Attributes:
        frozen, existing, new: Parameters that are not trained, trained and the backbone's or tower's own, trained and
            added by `adapt` (paper, section 4: route a trains all; route b the new ones and four blocks of the tower).
        text_token_bytes, window_token_bytes: Text cache, per token, and more for each text token of the open window.
        frame_bytes: Keys and values of one frame in all layers; kept for ever if `frame_stays`, else while visible.
    """

    name: str
    fusion: dict[str, Any]
    frozen: int
    existing: int
    new: int
    parts: dict[str, int]
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    master_bytes: int
    frame_tokens: int
    text_token_bytes: int
    window_token_bytes: int
    frame_bytes: int
    frame_stays: bool
    moments: list[Moment] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return self.frozen + self.existing + self.new

    @property
    def training_bytes(self) -> int:
        """Weights, gradients, moments and master copies. Activations come on top."""
        return self.weight_bytes + self.gradient_bytes + self.moment_bytes + self.master_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"parameters": self.parameters, "training_bytes": self.training_bytes}


def text_token_bytes(blocks: Sequence[BlockShape], size: int) -> int:
    """2 Hkv D * size, of all blocks that have a text cache: what a text token adds to it. size: bytes of a number."""
    return sum(2 * block.key * size for block in blocks if block.caches)


def fused_token_bytes(blocks: Sequence[BlockShape], size: int) -> int:
    """2 Hkv D * size, of all fusion layers: an image token, or a text token of the open window."""
    return sum(2 * block.key * size for block in blocks if block.fused)


def text_cache_bytes(blocks: Sequence[BlockShape], tokens: int, size: int) -> int:
    """The text cache with so many tokens in it; a block with a sliding window keeps one less than its span."""
    kept = (tokens if block.span is None else min(tokens, block.span - 1) for block in blocks)
    return sum(2 * b.key * size * count for b, count in zip(blocks, kept, strict=True) if b.caches)


def visible_frames(fusion: FusionConfig, frames: int) -> int:
    """Frames whose keys and values are held after so many."""
    if fusion.split == "sample" or fusion.history < 0:
        return frames
    return min(frames, 1 + fusion.history)


def budget_of(model: CasaForConditionalGeneration, name: str, scene: Scene | None = None) -> Budget:
    """The costs of one fused model; its weights may be on the meta device. Trained is what requires a gradient."""
    scene = scene if scene is not None else Scene()
    size, fusion = scene.dtype.itemsize, model.fusion
    groups = {"frozen": 0, "existing": 0, "new": 0}
    parts: dict[str, int] = {}
    tower = {id(parameter) for parameter in model.encoder.parameters()}
    for path, parameter in model.named_parameters():
        top = path.split(".")[0]
        count = parameter.numel()
        group = "frozen" if not parameter.requires_grad else "new" if top in ADDED else "existing"
        groups[group] += count
        part = top if top in ADDED else "image encoder" if id(parameter) in tower else "text model"
        parts[part] = parts.get(part, 0) + count
    trained = groups["existing"] + groups["new"]
    blocks, frame = blocks_of(model), frame_of(model, scene.height, scene.width)
    inserted = fusion.method == "insertion"
    text, fused = text_token_bytes(blocks, size), fused_token_bytes(blocks, size)
    window = fused if fusion.attend == "both" and not inserted else 0
    moments = []
    for frames in scene.frames:
        # under split="sample" the window never closes
        open_text = scene.text_per_frame * (frames if fusion.split == "sample" else 1)
        cached = frames * (scene.text_per_frame + (frame.tokens if inserted else 0))
        images = 0 if inserted else visible_frames(fusion, frames) * frame.tokens
        before = (frames - 1) * (scene.text_per_frame + frame.tokens)
        held = text_cache_bytes(blocks, cached, size) + images * fused + open_text * window
        moments.append(
            Moment(
                frames,
                held,
                frame_flops(model, frame, before if inserted else 0),
                token_flops(model, cached, open_text, images),
            )
        )
    return Budget(
        name=name,
        fusion=fusion.to_dict(),
        **groups,
        parts=parts,
        weight_bytes=size * sum(groups.values()),
        gradient_bytes=size * trained,
        moment_bytes=MOMENT_BYTES * trained,
        master_bytes=MASTER_BYTES * trained if size < MASTER_BYTES else 0,
        frame_tokens=frame.tokens,
        text_token_bytes=text,
        window_token_bytes=window,
        frame_bytes=frame.tokens * (text if inserted else fused),
        frame_stays=inserted,
        moments=moments,
    )


def variants(compressors: Iterable[str] = (), yours: FusionConfig | None = None) -> dict[str, FusionConfig]:
    """The methods to compare: `METHODS`, insertion and CASA⊕ behind each compressor, and one of the caller's own."""
    found = {name: FusionConfig(**values) for name, values in METHODS.items()}
    for compressor in compressors:
        found[f"insertion, {compressor}"] = FusionConfig(method="insertion", compressor=compressor)
        found[f"CASA ⊕, {compressor}"] = FusionConfig(compressor=compressor)
    if yours is not None and yours not in found.values():
        found["yours"] = yours
    return found


def budgets(
    config: Any, tower_config: Any = None, methods: dict[str, FusionConfig] | None = None, scene: Scene | None = None
) -> list[Budget]:
    """The costs of every method over one backbone; a method that this backbone is too shallow for is left out.

    Args:
        config: Of a text-only model, with a `tower_config`, or of an insertion VLM (see `shapes_of`).
        tower_config: Of the image encoder that a text-only model is to get.
        methods: By their names; all of `METHODS` if left out.
        scene: What is watched.

    Raises:
        UserError: As `adapt` does.
    """
    found = []
    for name, fusion in (methods if methods is not None else variants()).items():
        if fusion.every > config.get_text_config().num_hidden_layers and name in METHODS:
            continue
        found.append(budget_of(skeleton(config, fusion, tower_config), name, scene))
    return found


def readable(count: float, unit: str, step: int = 1000) -> str:
    """Three digits and a unit: 3.75 B parameters are "3.75 G", 2048 bytes in steps of 1024 "2 KiB"."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"] if step == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
    level = 0
    # 999.6 would be printed as 1e+03
    while count >= 999.5 and level < len(prefixes) - 1:
        count /= step
        level += 1
    places = 0 if count >= 99.95 or count == int(count) else 1 if count >= 9.995 else 2
    return f"{count:.{places}f} {prefixes[level]}{unit}".rstrip()


def tables(budgets: Sequence[Budget]) -> Group:
    """Three tables, one row per method: what training holds, what a stream holds, what is computed."""
    frames = [moment.frames for moment in budgets[0].moments] if budgets else []
    training = _table(
        "Parameters, and bytes that training holds",
        ["frozen", "trained, existing", "trained, new", "weights", "gradients", "AdamW", "fp32 copies", "together"],
        "AdamW: two float32 moments; fp32 copies of trained weights; activations come on top",
    )
    after = [f"after {count} frame{'s' if count > 1 else ''}" for count in frames]
    holding = _table(
        "What a stream holds",
        ["tokens a frame", "a frame", "kept", "a text token", "+ in its window", *after],
        "keys and values of all layers",
    )
    computing = _table(
        "Floating-point operations",
        [*(f"frame {count}" for count in frames), *(f"a token after {count}" for count in frames)],
        "products of matrices, two operations per multiplication; a frame's include the image encoder's",
    )
    for b in budgets:
        counts = [readable(count, "") if count else "0" for count in (b.frozen, b.existing, b.new)]
        sizes = (b.weight_bytes, b.gradient_bytes, b.moment_bytes, b.master_bytes, b.training_bytes)
        training.add_row(b.name, *counts, *map(_bytes, sizes))
        kept = "for ever" if b.frame_stays else "while visible"
        tokens = (b.text_token_bytes, b.window_token_bytes, *(moment.cache_bytes for moment in b.moments))
        holding.add_row(b.name, str(b.frame_tokens), _bytes(b.frame_bytes), kept, *map(_bytes, tokens))
        amounts = [*(m.frame_flops for m in b.moments), *(m.token_flops for m in b.moments)]
        computing.add_row(b.name, *(readable(amount, "FLOP") for amount in amounts))
    return Group(training, holding, computing)


def _bytes(count: int) -> str:
    return readable(count, "B", 1024) if count else "0"


def _table(title: str, columns: Sequence[str], caption: str) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", show_edge=False)
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
