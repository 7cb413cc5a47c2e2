"""What the `packing` block of a recipe holds."""

from dataclasses import dataclass, field

from casa.settings import require
from casa.training.samples import Budget, OversizeSettings


@dataclass(frozen=True)
class PackingSettings:
    """budget: of one pack. oversize: what happens to records beyond it.

    buffer: samples to choose from; fewer where they hold more than 256 MB of pictures (frames of videos). More fill
    packs better, and are read again when a run is resumed.
    patience: packs after which a waiting sample goes first.
    """

    budget: Budget = field(default_factory=Budget)
    oversize: OversizeSettings = field(default_factory=OversizeSettings)
    buffer: int = 256
    patience: int = 16

    def __post_init__(self) -> None:
        require(1 <= self.buffer <= 100_000, "buffer", self.buffer, "from 1 to 100,000 samples")
        require(self.patience >= 0, "patience", self.patience, "0 packs or more")
