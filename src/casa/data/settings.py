"""What the `data` block of a recipe holds: where records come from, and in what proportions and order.

sources:
  - {path: pages/*.jsonl, weight: 2}
  - {path: hub:HuggingFaceM4/FineVision, subset: chartqa, shape: finevision}
shuffle: 1000
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from casa.settings import build, require

ShapeName = Literal[
    "auto", "chat", "llava", "finevision", "llava-video", "live-whisperx", "vqa", "prompt-completion", "caption"
]
Exhausted = Literal["repeat", "leave", "stop"]


@dataclass(frozen=True)
class SourceSettings:
    """One set of records.

    Attributes:
        path: A .jsonl, .json, .parquet, .csv or WebDataset .tar file, compressed or not, a folder of them, a glob, a
            folder that `save_to_disk` wrote, or hub:owner/name.
        shape: Of its rows; "auto" looks at the keys of each.
        weight: How often it is drawn from, relative to the other sources.
        root: The folder that relative picture paths start from; the data file's own if None.
        outside: Whether paths in the data may lead out of the root (an absolute path, "..", a link).
        fps: How often a video is looked at.
        frame_side: Longest side of its frames in px; larger ones are made smaller.
        max_frames: Per record. A longer video is looked at less often; longer live captions are refused, since words
            belong to their frames.
        columns: Names in the data for the names that a shape knows, such as {image: photo, caption: title}.
        prompt: What the user asks where the data do not say (captions); None leaves it to the shape.
        split: Of a hub data set, or of a saved DatasetDict.
        subset: Of a hub data set.
    """

    path: str
    shape: ShapeName = "auto"
    weight: float = 1.0
    root: str | None = None
    outside: bool = False
    fps: float = 2.0
    frame_side: int = 448
    max_frames: int = 480
    columns: dict[str, str] = field(default_factory=dict)
    prompt: str | None = None
    split: str = "train"
    subset: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.path.strip()), "path", self.path, "a file, a folder, a glob or hub:owner/name")
        require(self.weight > 0, "weight", self.weight, "above 0")
        require(0 < self.fps <= 60, "fps", self.fps, "above 0, at most 60")
        require(28 <= self.frame_side <= 8192, "frame_side", self.frame_side, "from 28 to 8192 px")
        require(self.max_frames >= 1, "max_frames", self.max_frames, "1 or more")


@dataclass(frozen=True)
class DataSettings:
    """All sources of a run, and how they are mixed.

    Attributes:
        shuffle: Rows that are mixed with one another, per source and reader; 0 or 1 keeps the order of the files.
        exhausted: What happens at the end of a source: "repeat" begins it again (there is no end), "leave" goes on with
            the others until all have ended, "stop" ends everything.
        strict: The first bad record stops the run, by name; otherwise it is skipped and counted.
    """

    sources: tuple[SourceSettings, ...]
    shuffle: int = 1000
    exhausted: Exhausted = "repeat"
    strict: bool = False

    def __post_init__(self) -> None:
        require(bool(self.sources), "sources", list(self.sources), "one entry or more")
        require(0 <= self.shuffle <= 10_000_000, "shuffle", self.shuffle, "from 0 to 10,000,000 rows")


def parse_data_settings(values: Mapping[str, object], at: str = "data") -> DataSettings:
    """Settings from plain values; `at` is their place in sentences.

    Raises:
        UserError: An unknown key (with a suggestion), a wrong type or an impossible value.
    """
    return build(DataSettings, values, at)


@dataclass(frozen=True)
class Shard:
    """Which of all readers this is: worker `worker` of `workers` in process `rank` of `world`."""

    rank: int = 0
    world: int = 1
    worker: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        require(self.world >= 1, "world", self.world, "1 or more")
        require(self.workers >= 1, "workers", self.workers, "1 or more")
        require(0 <= self.rank < self.world, "rank", self.rank, f"from 0 to {self.world - 1}")
        require(0 <= self.worker < self.workers, "worker", self.worker, f"from 0 to {self.workers - 1}")

    @property
    def index(self) -> int:
        """This reader's number among all."""
        return self.rank * self.workers + self.worker

    @property
    def count(self) -> int:
        """How many readers there are."""
        return self.world * self.workers

    def share(self, parts: int, order: Sequence[int] | None) -> list[tuple[int, Callable[[int], bool]]]:
        """This reader's parts of a source, by number, each with the question which of its rows (from 0) are wanted.

        With at least as many parts (files, or row groups of parquet) as readers, each part goes to one reader;
        otherwise every reader passes over the others' rows, so that all rows are read, and none twice:

            3 readers, 5 parts    a -> 0   b -> 1   c -> 2   d -> 0   e -> 1
            3 readers, 1 part     rows 0 1 2 3 4 5 6 ... -> 0 1 2 0 1 2 0 ...

        Args:
            parts: How many there are.
            order: Seeds of the order in which they come, the same for all readers; None keeps it.
        """
        numbers = np.arange(parts)
        if order is not None:
            np.random.default_rng(order).shuffle(numbers)
        count, index = self.count, self.index
        if parts >= count:
            return [(int(part), lambda row: True) for part in numbers[index::count]]
        return [(int(part), lambda row, part=int(part): (part + row) % count == index) for part in numbers]
