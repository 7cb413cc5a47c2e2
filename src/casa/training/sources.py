"""Sources of drawn examples (`casa.data.drawn`), all that a recipe can name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from casa.data.drawn import ClipSource, PictureSource
from casa.errors import UserError
from casa.settings import near


@dataclass(frozen=True)
class Sources:
    """All that a recipe can draw on, by name.

    channels: classes of each dense target; empty: the class that means "nothing here" (0 if not named).
    sides: least and greatest side in px of a picture source, if it cannot do all. prompt: what clips are asked.
    """

    pictures: Mapping[str, PictureSource]
    clips: Mapping[str, ClipSource] = field(default_factory=dict)
    channels: Mapping[str, int] = field(default_factory=dict)
    empty: Mapping[str, int] = field(default_factory=dict)
    sides: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    prompt: str = "Describe what is new."

    def allows(self, name: str, size: tuple[int, int]) -> bool:
        """Whether a picture source can draw `size`."""
        least, greatest = self.sides.get(name, (0, 1 << 30))
        return least <= min(size) and max(size) <= greatest

    def check(self, names: Iterable[str], where: str, *, clips: bool) -> None:
        """UserError if a recipe names a source that is not here. clips: whether clips may be named."""
        known = [*self.pictures, *(self.clips if clips else ())]
        _check_known(names, known, where, "source")

    def check_channels(self, names: Iterable[str], where: str) -> None:
        """UserError if a recipe names a dense target that is not here."""
        _check_known(names, list(self.channels), where, "dense target")


def _check_known(names: Iterable[str], known: list[str], where: str, what: str) -> None:
    for name in names:
        if name not in known:
            hint = near(name, known, "choose from")
            raise UserError(f"{where} names the {what} {name!r}, which does not exist; {hint}")
