"""Generated examples as files that training reads: pictures with questions in a tar, clips with timed words beside it.

    OUT/pages.tar      0000000.jpg 0000000.json 0000001.jpg ...     chats about one picture each
    OUT/clips.jsonl    a line for each of OUT/clips/0000000.mp4     live captions

Example number n is the same for the same seed, whatever else is made.
"""

import io
import json
import math
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from casa.atomic import replacing
from casa.errors import UserError
from casa.media import VideoWriter

_QUALITY = 95  # of JPEG: handwriting keeps its edges
_CRF = 18
_MULTIPLE = 28  # px, of which sides are multiples
_AFTER = 0.1  # of the time between two frames, from a frame to its words: no rounding gives them to another one

# Draws one example: source(rng, size) with size = (height, width) in px, or None for any, gives an object with `image`
# (PIL, of that size) and `turns` (objects with `question` and `answer`). With worker processes, sources must be
# picklable: functions, or dataclasses, at module level.
PictureSource = Callable[[np.random.Generator, tuple[int, int] | None], Any]
# Gives an object with `height`, `width`, `frames()` (pictures) and `captions()` (one text per frame, "" being silence).
ClipSource = Callable[[np.random.Generator], Any]
Told = Callable[[int], None]


def write_pictures(
    path: Path,
    source: PictureSource,
    count: int,
    seed: Sequence[int],
    *,
    turns: int = 8,
    sides: tuple[int, int] | None = None,
    told: Told | None = None,
) -> None:
    """`count` pictures of a source with one to `turns` of their questions each, in random order.

    Args:
        sides: Least and greatest in px, small ones more often; the source's own if None.
        seed: A number and which source this is.
        told: Is told how many are written.

    Raises:
        UserError: The tar cannot be written; it appears whole or not at all.
    """
    with replacing(path) as unfinished, tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            rng = np.random.default_rng([*seed, number])
            example = source(rng, None if sides is None else _size(rng, sides))
            wanted = int(rng.integers(1, turns + 1))
            asked = [example.turns[int(i)] for i in rng.permutation(len(example.turns))[:wanted]]
            encoded = io.BytesIO()
            example.image.save(encoded, "JPEG", quality=_QUALITY, subsampling=0)
            _add(tar, f"{number:07}.jpg", encoded.getvalue())
            _add(tar, f"{number:07}.json", json.dumps({"messages": _chat(asked)}).encode())
            if told is not None:
                told(number + 1)


def write_clips(
    path: Path,
    source: ClipSource,
    count: int,
    seed: Sequence[int],
    *,
    prompt: str,
    fps: float,
    told: Told | None = None,
) -> None:
    """`count` clips as H.264 video, and their captions as words said when their frame is seen.

    A clip in which nothing is said is drawn anew. Raises UserError if a file cannot be written.
    """
    folder = path.with_suffix("")
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or write elsewhere.")
    folder.mkdir(parents=True)
    with replacing(path) as unfinished, open(unfinished, "w", encoding="utf-8") as lines:
        for number in range(count):
            rng = np.random.default_rng([*seed, number])
            clip, captions = _spoken(source, rng)
            video = folder / f"{number:07}.mp4"
            with VideoWriter(video, (clip.width, clip.height), fps, crf=_CRF, preset="veryfast") as writer:
                for frame in clip.frames():
                    writer.write(frame)
            words = [[(n + _AFTER) / fps, (n + 1) / fps, text] for n, text in enumerate(captions) if text]
            row = {"video": f"{folder.name}/{video.name}", "video_end": len(captions) / fps}
            lines.write(json.dumps({**row, "text": prompt, "words": words}) + "\n")
            if told is not None:
                told(number + 1)


def _spoken(source: ClipSource, rng: np.random.Generator) -> tuple[Any, list[str]]:
    for _ in range(100):
        clip = source(rng)
        captions: list[str] = list(clip.captions())
        if any(captions):
            return clip, captions
    raise UserError("the source's clips are silent: there is nothing to learn from them.")


def _chat(turns: Sequence[Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        shown = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def _size(rng: np.random.Generator, sides: tuple[int, int]) -> tuple[int, int]:
    """Height and width in px; each doubling of a side is as frequent as the next."""
    low, high = math.ceil(sides[0] / _MULTIPLE), sides[1] // _MULTIPLE + 1
    height, width = (int(side) * _MULTIPLE for side in low * (high / low) ** rng.random(2))
    return height, width


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Without times or owners, so that the same seed gives the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
