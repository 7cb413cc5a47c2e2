"""The text of examples, drawn without keeping their pictures."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from casa.training.patches import CELL
from casa.training.sources import Sources

_SIDE = 8 * CELL  # small pictures are quick to draw, and long lines still fit


@dataclass(frozen=True)
class Texts:
    """What is said about one example: turns about a picture, or a prompt and the captions of a clip."""

    turns: tuple[tuple[str, str], ...] = ()
    prompt: str = ""
    captions: tuple[str, ...] = ()

    def all_texts(self) -> Iterator[str]:
        yield from (text for turn in self.turns for text in turn)
        if self.captions:
            yield from (self.prompt, *filter(None, self.captions))


@dataclass(frozen=True)
class Documents:
    """Makes document number n, from each source that has text in turn."""

    sources: Sources
    seed: int

    def __call__(self, number: int) -> Texts:
        rng = np.random.default_rng([self.seed, 1, number])
        names = [*self.sources.pictures, *self.sources.clips]
        for offset in range(len(names)):
            name = names[(number + offset) % len(names)]
            if name in self.sources.clips:
                clip = self.sources.clips[name](rng)
                return Texts(prompt=self.sources.prompt, captions=tuple(clip.captions()))
            least, greatest = self.sources.sides.get(name, (0, _SIDE))
            side = min(max(least, _SIDE), greatest)
            turns = self.sources.pictures[name](rng, (side, side)).turns
            if turns:
                return Texts(turns=tuple((turn.question, turn.answer) for turn in turns))
        raise ValueError("no source has text; the text model has nothing to learn from.")
