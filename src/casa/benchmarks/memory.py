"""Host memory of captioning a long film over that of a short one, each in a process of its own."""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from casa.benchmarks.apart import measured_apart, told
from casa.benchmarks.soak import film
from casa.captioning import Request, caption
from casa.errors import UserError
from casa.media import VideoWriter
from casa.memory import peak_resident_bytes
from casa.models.auto import load_pretrained

DRAWN = 60  # different frames of a film


def draw_film(path: Path, seconds: float, size: int, film_fps: float, fps: float, seed: int = 0) -> int:
    """A film of so many seconds, `size` x `size` px, with `film_fps` frames a second; how many those are.

    It is out of a few drawn frames, `fps` of them a second: whoever looks so often sees each.
    """
    frames, part = round(seconds * film_fps), fps / film_fps
    pictures = [np.asarray(picture) for picture in film(size, seed, min(DRAWN, math.ceil(frames * part) + 1))]
    with VideoWriter(path, (size, size), film_fps, preset="ultrafast", crf=30) as video:
        for number in range(frames):
            # changed half-way between two looks, since right after it the encoder still shows much of the one before;
            # at the latest at the frame that is looked at
            drawn = max(math.floor(number * part + 0.5), math.ceil((number + 1) * part) - 1)
            video.write(pictures[drawn % DRAWN])
    return frames


def bench_memory(
    model: str,
    minutes: float = 60.0,
    short_minutes: float = 1.0,
    size: int = 112,
    fps: float = 2.0,
    film_fps: float = 25.0,
    max_text_tokens: int | None = None,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Peak bytes of two processes that caption films of both lengths, into a file, and what the long one has more.

    model: a checkpoint's folder, or casa-tiny. fps: frames watched per second; film_fps: frames that are there, all of
    them decoded. max_text_tokens: with a bound, what is left is not the text's. max_new_tokens: of a caption. seed: of
    the films. Raises UserError for numbers that cannot be, or where the system does not tell what a process holds.
    """
    if not 0 < short_minutes < minutes:
        raise UserError("give a short and a long film: 0 < short minutes < minutes.")
    if not 0 < fps <= film_fps:
        raise UserError(f"{fps} of {film_fps} frames per second cannot be watched; give 0 < fps <= film fps.")
    if not peak_resident_bytes():
        raise UserError("this system does not tell how much memory a process has held; measure on Linux.")
    found = []
    with TemporaryDirectory() as folder:
        for length in (short_minutes, minutes):
            path = Path(folder) / "film.mp4"
            decoded = draw_film(path, 60 * length, size, film_fps, fps, seed)
            given = [str(model), str(path), fps, max_text_tokens, max_new_tokens]
            measured = measured_apart(__name__, given, f"captioning {path.name}")
            found.append({"minutes": length, "decoded": decoded} | measured)
    return {"films": found, "more_bytes": found[1]["peak_bytes"] - found[0]["peak_bytes"]}


def child() -> None:
    """What the process of its own does: prints frames watched, captions said and peak bytes."""
    model, path, fps, max_text_tokens, max_new_tokens = told()
    out = Path(path).with_suffix(".srt")
    request = Request(path, (out,), fps=fps, max_text_tokens=max_text_tokens, max_new_tokens=max_new_tokens)
    report = caption(request, model, load_pretrained)
    print(json.dumps({"frames": report.count.frames, "captions": report.said, "peak_bytes": peak_resident_bytes()}))


def memory_table(found: dict[str, Any]) -> str:
    """The two films and their difference as aligned lines."""
    lines = [f"{'film':>10}{'decoded':>9}{'watched':>9}{'captions':>10}{'peak of the process':>22}"]
    for row in found["films"]:
        counts = f"{row['decoded']:9}{row['frames']:9}{row['captions']:10}"
        lines.append(f"{row['minutes']:6g} min{counts}{row['peak_bytes'] / 2**20:18.0f} MiB")
    return "\n".join([*lines, f"more: {found['more_bytes'] / 1e6:.1f} MB"])
