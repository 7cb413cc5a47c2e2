"""A clip with its truth: the video file, and a JSON file beside it that says what is new in it, and when."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from casa.errors import UserError

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "demo"


@dataclass(frozen=True)
class Clip:
    """A video and the true captions of its frames, as sampled `fps` times a second from time 0.

    captions: (time in seconds, text) of the frames that show something new; all others are silent.
    seed: what the clip was drawn from (see `casa.demo.film`).
    """

    path: Path
    fps: float
    seed: int
    captions: tuple[tuple[float, str], ...]

    def truth(self, times: Sequence[float]) -> list[str]:
        """The true caption of each of the frames sampled at `times` (s): "" where nothing is new."""
        at = {round(time * self.fps): text for time, text in self.captions}
        return [at.get(round(time * self.fps), "") for time in times]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Clip":
        """The clip whose truth lies beside it, under the same name, as JSON. Raises UserError if it does not."""
        beside = Path(path).with_suffix(".json")
        try:
            given: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
            captions = tuple((float(row["time"]), str(row["text"])) for row in given["captions"])
            clip = cls(Path(path), float(given["fps"]), int(given["seed"]), captions)
        except OSError as error:
            raise UserError(f"{beside} cannot be read ({error.strerror}): the clip's truth must lie there.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{beside} does not hold the truth of a clip: write it again with casa.demo.film."
            ) from error
        if not clip.fps > 0 or any(b <= a for (a, _), (b, _) in pairwise(captions)):
            raise UserError(f"{beside} has an fps of 0 or less, or captions out of order: write it again.")
        return clip


def shipped_clip() -> Clip:
    """The clip in the package: a minute of handwriting that casa-tiny was never trained on."""
    return Clip.read(SHIPPED / "clip.mp4")
