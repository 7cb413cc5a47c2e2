"""Where examples come from: callables that the caller passes in, so that this package knows no task.

A picture source draws one example: source(rng, size) with size = (height, width) in px, or None for any, gives an
object with `image` (PIL, of that size), `turns` (objects with `question` and `answer`) and `dense` (channel ->
int64 (rows, columns), one class per cell of 28 x 28 px). A clip source gives an object with `height`, `width`,
`frames()` (pictures) and `captions()` (one text per frame, "" being silence).

With worker processes, sources must be picklable: functions, or dataclasses, at module level.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np

from casa.errors import UserError

PictureSource = Callable[[np.random.Generator, tuple[int, int] | None], Any]
ClipSource = Callable[[np.random.Generator], Any]


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
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}."
            raise UserError(f"{where} names the {what} {name!r}, which does not exist; {hint}")
