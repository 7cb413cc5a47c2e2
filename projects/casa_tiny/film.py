"""Films the demo's clip: handwriting that was never trained on, under a hand-held camera, as H.264.

    python -m projects.casa_tiny.film src/casa/assets/demo/clip.mp4

The scene is a function of time (casa.evaluation.stream), so the frames of a film sampled at 2 fps show just what
the truth beside it says: no number appears or vanishes within 0.1 s of a sampled frame.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from casa.atomic import write_text
from casa.evaluation.stream import FPS, StreamExample, stream
from casa.media import VideoWriter

SEED = 6
SECONDS = 60.0
FILM_FPS = 30
SIZE = (336, 336)  # width, height; px
CRF = 28  # well below a megabyte a minute, every digit still clear


def scene(seed: int = SEED, seconds: float = SECONDS, size: tuple[int, int] = SIZE) -> StreamExample:
    """What is filmed: numbers in held-out handwriting (scans from 1400 on), `size` (width, height) in px."""
    return stream(seed, "held_out", seconds=seconds, sizes=[(size[1], size[0])])


def truth(drawn: StreamExample, seed: int) -> dict:
    """What a film of this scene shows at 2 fps, as JSON beside it: times in s, size as [width, height] in px."""
    told = zip(drawn.times(FPS), drawn.captions(FPS), strict=True)
    return {
        "fps": FPS,
        "seed": seed,
        "seconds": drawn.seconds,
        "size": [drawn.width, drawn.height],
        "captions": [{"time": time, "text": text} for time, text in told if text],
    }


def film(
    path: str | os.PathLike[str],
    seed: int = SEED,
    *,
    seconds: float = SECONDS,
    size: tuple[int, int] = SIZE,
    crf: int = CRF,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes the film (30 fps, H.264) and its truth; the same seed gives the same bytes.

    Args:
        path: Of the video; its truth lies beside it, as JSON.
        seed: What is drawn.
        seconds: 2 or more.
        size: Width and height, multiples of 28 px from 224 to 448.
        crf: Quality, lower is better.
        progress: Called with the frames done and all frames.

    Raises:
        UserError: A file cannot be written.
        ValueError: The size or length cannot be drawn.
    """
    drawn = scene(seed, seconds, size)
    times = drawn.times(FILM_FPS)
    with VideoWriter(path, (drawn.width, drawn.height), FILM_FPS, crf=crf, preset="slow") as video:
        for number, time in enumerate(times, start=1):
            video.write(drawn.frame(time))
            if progress is not None:
                progress(number, len(times))
    write_text(Path(path).with_suffix(".json"), json.dumps(truth(drawn, seed), indent=1) + "\n")


if __name__ == "__main__":
    film(sys.argv[1])
