"""What the `packing` block of a recipe holds."""

from dataclasses import dataclass, field

from casa.settings import require
from casa.training.samples import Budget, OversizeSettings


@dataclass(frozen=True)
class PackingSettings:
    """budget: of one pack. oversize: what happens to records beyond it.

    buffer: samples to choose from; fewer where they hold more than `buffer_megabytes` of pictures (frames of videos),
    in the memory of every process that reads. More fill packs better, and are read again when a run is resumed.
    patience: packs after which a waiting sample goes first.
    """

    budget: Budget = field(default_factory=Budget)
    oversize: OversizeSettings = field(default_factory=OversizeSettings)
    buffer: int = 256
    buffer_megabytes: float = 256.0
    patience: int = 16

    def __post_init__(self) -> None:
        require(1 <= self.buffer <= 100_000, "buffer", self.buffer, "from 1 to 100,000 samples")
        require(self.buffer_megabytes > 0, "buffer_megabytes", self.buffer_megabytes, "above 0")
        require(self.patience >= 0, "patience", self.patience, "0 packs or more")

    @property
    def buffer_bytes(self) -> float:
        return self.buffer_megabytes * 2**20
