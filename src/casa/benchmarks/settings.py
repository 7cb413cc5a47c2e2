"""What can be chosen of each benchmark, with a sentence about every field: `casa bench` makes its options of them.

This file does without torch, so that a help text is there at once.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from casa.errors import UserError
from casa.settings import Bounds, NonNegative, Positive, Settings, require

PARTS = ("memory", "throughput", "packing")
WEIGHTS = ("bf16", "int8", "fp32")
METHODS = ("casa", "before", "replace", "update_images", "cross_attention", "insertion")

Model = Annotated[str, "A checkpoint's folder, or casa-tiny."]
Size = Annotated[Positive, "Sides of a frame in px."]
Frames = Annotated[Positive, "Frames to watch."]
MaxTextTokens = Annotated[NonNegative, "Bound on the text remembered, in tokens; 0: none."]
Seed = Annotated[int, "Another seed draws other films, samples and weights."]
Device = Annotated[str, "auto, cpu or cuda."]
CpuTime = Annotated[bool, "Processor time: with one thread, about what a quiet machine takes, also on a busy one."]
Above0 = Annotated[float, Bounds(gt=0, lt=math.inf)]


@dataclass(frozen=True)
class AttentionSettings(Settings):
    """Of `bench_attention`. impls: none for those of the device."""

    device: Device = "auto"
    impls: Annotated[tuple[str, ...], "Implementations to time, with commas; by the device if left out."] = ()
    repeats: Annotated[Positive, "Rounds; medians are printed."] = 9
    seed: Seed = 0


@dataclass(frozen=True)
class DecodeSettings(Settings):
    """Of `bench_decode`. backbone: none for random weights in the shape of SmolLM2-135M."""

    backbone: Annotated[str, "A language model: folder, hub id or package; random weights if left out."] | None = None
    image_tokens: Annotated[Positive, "Image tokens of a frame."] = 256
    prompt: Annotated[Positive, "Text tokens of the long prompt."] = 1024
    tokens: Annotated[Positive, "Tokens of a turn."] = 8
    rounds: Annotated[Positive, "Turns of each; medians are printed."] = 9
    rows: Annotated[tuple[int, ...], "Texts at once, with commas."] = (1, 8)
    every: Annotated[Positive, "Blocks to a fusion layer."] = 3
    history: Annotated[tuple[int, ...], "Earlier frames that stay visible, with commas; -1: all."] = (0, 1, -1)
    dtypes: Annotated[tuple[str, ...], f"Of the weights, with commas: {', '.join(WEIGHTS)}."] = ("bf16",)
    cpu_time: CpuTime = False
    seed: Seed = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.dtypes if name not in WEIGHTS]:
            raise UserError(f"dtypes has {unknown[0]!r}; choose among: {', '.join(WEIGHTS)}.", field="dtypes")
        if min(self.rows, default=0) < 1 or min(self.history, default=0) < -1:
            raise UserError("rows are 1 or more, and history is -1 or more.")


@dataclass(frozen=True)
class PeersSettings(Settings):
    """Of `bench_peers`. backbone, shape: neither for random weights in the shape of SmolVLM-256M."""

    backbone: Annotated[str, "A language model: folder, hub id or package; random weights if left out."] | None = None
    shape: Annotated[str, "tiny, or a published shape such as helium-2b: CASA and insertion alone."] | None = None
    image_tokens: Annotated[Positive, "Image tokens of a frame in such a shape."] = 1024
    turns: Annotated[tuple[int, ...], "Frames at which all are timed, with commas."] = (1, 64, 128, 256)
    samples: Annotated[Positive, "Frames in a row from each of these; medians are told."] = 3
    tokens: Annotated[int, Bounds(ge=2), "Tokens said of every frame."] = 16
    every: Annotated[Positive, "Blocks to a fusion layer, and to one of cross-attention."] = 3
    sinks: Annotated[Positive, "First text tokens that sinks and window keeps."] = 64
    window_text: Annotated[Positive, "Last text tokens that it keeps."] = 512
    window_frames: Annotated[Positive, "Last frames that it keeps."] = 16
    dtype: Annotated[str, "Of the weights: bf16 or fp32."] = "bf16"
    cpu_time: CpuTime = False
    seed: Seed = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.dtype in ("bf16", "fp32"), "dtype", self.dtype, "bf16 or fp32")
        rises = bool(self.turns) and all(b - a >= self.samples for a, b in pairwise((1 - self.samples, *self.turns)))
        require(rises, "turns", self.turns, "frames from 1 on, samples or more apart")
        if self.backbone is not None and self.shape is not None:
            raise UserError("a shape has random weights; leave out backbone or shape.", field=("backbone", "shape"))


@dataclass(frozen=True)
class StreamSettings(Settings):
    """Of `bench_stream`. tokens: every frame is a turn of so many. sessions: live streams by the clock instead."""

    model: Model = "casa-tiny"
    frames: Frames = 120
    size: Size = 336
    tokens: Annotated[int, Bounds(ge=2), "Say so many tokens of every frame, as the official table."] | None = None
    sessions: Annotated[Positive, "How many live streams this machine keeps, up to so many."] | None = None
    fps: Annotated[Above0, "Frames per second of each of the sessions."] = 2.0
    max_text_tokens: MaxTextTokens = 0
    seed: Seed = 0
    device: Device = "auto"
    peak: Annotated[bool, "With tokens: peak memory of each method, run once more in a process of its own."] = True
    cpu_time: CpuTime = False


@dataclass(frozen=True)
class LiveSettings(Settings):
    """Of `bench_live`."""

    model: Model = "casa-tiny"
    minutes: Annotated[Above0, "How long to watch; it takes that long."] = 10.0
    video: Annotated[str, "A film of your own, again and again; drawn handwriting if left out."] | None = None
    size: Size = 448
    fps: Annotated[Above0, "Frames per second that are looked at."] = 2.0
    max_text_tokens: MaxTextTokens = 256
    seed: Seed = 0
    device: Device = "auto"
    weights: Annotated[str, "own, as they were saved, or int8."] = "own"


@dataclass(frozen=True)
class MemorySettings(Settings):
    """Of `bench_memory`. With a bound on the text, what is left is not the text's."""

    model: Model = "casa-tiny"
    minutes: Annotated[Above0, "Length of the long film."] = 60.0
    short: Annotated[Above0, "Length of the short film, in minutes."] = 1.0
    size: Size = 112
    fps: Annotated[Above0, "Frames per second that are watched."] = 2.0
    film_fps: Annotated[Above0, "Frames per second of both films, all of them decoded."] = 25.0
    max_text_tokens: MaxTextTokens = 0
    seed: Seed = 0


@dataclass(frozen=True)
class NeighbourSettings(Settings):
    """Of `bench_neighbour`."""

    model: Model = "casa-tiny"
    size: Size = 336
    rounds: Annotated[Positive, "Turns of every way of choosing threads, quiet and busy."] = 5
    seconds: Annotated[Above0, "Of each turn."] = 3.0
    seed: Seed = 0


@dataclass(frozen=True)
class EvalSettings(Settings):
    """Of `bench_eval`."""

    model: Model = "casa-tiny"
    pictures: Annotated[Positive, "Pictures that are asked about."] = 32
    questions: Annotated[tuple[int, ...], "Questions about each picture, one run for each number."] = (1, 5)
    size: Size = 336
    tokens: Annotated[Positive, "Tokens of the longest answer."] = 16
    batch_size: Annotated[Positive, "Questions that are answered at once."] = 16
    rounds: Annotated[Positive, "Turns of each way; medians are printed."] = 5
    seed: Seed = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.questions) and min(self.questions) > 0, "questions", self.questions, "numbers above 0")


@dataclass(frozen=True)
class QuestionsSettings(Settings):
    """Of `bench_questions`."""

    model: Model = "casa-tiny"
    size: Size = 448
    rounds: Annotated[Positive, "Pictures of each way, two questions each; medians are printed."] = 9
    seed: Seed = 0
    device: Device = "auto"


@dataclass(frozen=True)
class SoakSettings(Settings):
    """Of `bench_soak`."""

    model: Model = "casa-tiny"
    frames: Frames = 100_000
    max_text_tokens: MaxTextTokens = 128
    size: Size = 112
    block: Annotated[Positive, "Frames in a row of the result."] = 1000
    seed: Seed = 0
    device: Device = "auto"


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Of `bench_train`. image_tokens, text_tokens: of the packed row whose memory is measured."""

    parts: Annotated[tuple[str, ...], f"What to measure, with commas: {', '.join(PARTS)}."] = PARTS
    shape: Annotated[str, "tiny, or a published shape such as helium-2b or qwen2_5-vl-3b."] = "tiny"
    image_tokens: Annotated[
        tuple[int, ...], "Image tokens of the packed row whose memory is measured, with commas."
    ] = (256, 1024, 4096)
    methods: Annotated[tuple[str, ...], f"Whose memory, with commas: {', '.join(METHODS)}."] = ("casa", "insertion")
    text_tokens: Annotated[Positive, "Text tokens of that row."] = 256
    samples: Annotated[Positive, "Samples of that row, one picture each."] = 4
    checkpoint_blocks: Annotated[bool, "Run blocks again in the backward pass."] = False
    frozen_tower: Annotated[bool, "Train all but the image encoder."] = False
    drawn: Annotated[int, Bounds(ge=2), "Samples to go through packed and padded."] = 64
    rounds: Annotated[Positive, "Passes over them; medians are printed."] = 3
    seed: Seed = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, known in (("parts", PARTS), ("methods", METHODS)):
            if unknown := [name for name in getattr(self, field) if name not in known]:
                raise UserError(f"{field} has {unknown[0]!r}; choose among: {', '.join(known)}.", field=field)
        if any(count % self.samples for count in (self.text_tokens, *self.image_tokens)):
            raise UserError(f"give image and text tokens in multiples of {self.samples}, the samples of a row.")
        if min(self.image_tokens) < self.samples or self.text_tokens < 2 * self.samples:
            raise UserError("give every sample a picture of one token or more, and two text tokens or more.")
