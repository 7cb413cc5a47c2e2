"""Live video, frame by frame: what a session holds and how long a frame takes, CASA beside insertion (claim C6)."""

from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import median
from typing import Any

from PIL import Image

from casa.analysis.streaming_cost import Comparison, CostRow
from casa.errors import UserError
from casa.evaluation.seeds import generator
from casa.evaluation.stream import stream
from casa.models import CasaForConditionalGeneration, CasaProcessor

CLIP_SECONDS = 60.0


def handwriting(seed: int, size: int) -> Iterator[Image.Image]:
    """Frames without end, at 2 fps, of numbers in held-out handwriting that come and go."""
    number = 0
    while True:
        number += 1
        rng = generator("stream", "held_out", seed, number)
        yield from stream(rng, "held_out", seconds=CLIP_SECONDS, sizes=[(size, size)]).frames()


def bench_stream(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    frames: int = 120,
    size: int = 336,
    seed: int = 0,
    max_text_tokens: int | None = None,
    most_inserted: int = 120,
) -> list[CostRow]:
    """One row per frame of `size` x `size` px. Insertion is followed for `most_inserted` frames at most.

    Raises UserError for fewer than four frames, whose quarters could not be compared.
    """
    if frames < 4:
        raise UserError(f"frames is {frames}; give at least 4, so that quarters can be compared.")
    both = Comparison(
        model, processor, most_frames=most_inserted, most_image_tokens=None, max_text_tokens=max_text_tokens
    )
    return [both.step(frame) for frame in islice(handwriting(seed, size), frames)]


def summary(rows: Sequence[CostRow]) -> dict[str, Any]:
    """Medians of the first and last quarter, in ms, and bytes held after the first and the last frame."""
    found: dict[str, Any] = {"frames": len(rows), "text_tokens_said": sum(row.tokens for row in rows)}
    for name in ("casa", "insertion"):
        costs = [cost for row in rows if (cost := getattr(row, name)) is not None]
        if len(costs) < 4:
            continue
        quarter = len(costs) // 4
        first, last = (1000 * median(c.seconds for c in part) for part in (costs[:quarter], costs[-quarter:]))
        usages = [cost.usage for cost in costs]
        found[name] = {
            "frames": len(costs),
            "first_quarter_ms": round(first, 2),
            "last_quarter_ms": round(last, 2),
            "latency_ratio": round(last / first, 3),
            "cache_bytes": [usages[0].cache_bytes, usages[-1].cache_bytes],
            "image_tokens": [usages[0].image_tokens, usages[-1].image_tokens],
            "image_bytes": [min(u.image_bytes for u in usages), max(u.image_bytes for u in usages)],
            "text_tokens": [usages[0].text_tokens, usages[-1].text_tokens],
            "most_cache_bytes": max(usage.cache_bytes for usage in usages),
            "bytes_per_text_token": usages[-1].text_bytes // max(1, usages[-1].text_tokens),
        }
    return found


def stream_table(found: dict[str, Any]) -> str:
    """The summary as a few aligned lines."""
    lines = [f"{'':10}{'frames':>8}{'first 1/4':>12}{'last 1/4':>12}{'ratio':>8}{'cache first':>14}{'cache last':>14}"]
    for name in ("casa", "insertion"):
        if name in found:
            row = found[name]
            first, last = (f"{size / 1024:.1f} KiB" for size in row["cache_bytes"])
            lines.append(
                f"{name:10}{row['frames']:8}{row['first_quarter_ms']:9.1f} ms{row['last_quarter_ms']:9.1f} ms"
                f"{row['latency_ratio']:8.2f}{first:>14}{last:>14}"
            )
    return "\n".join(lines)
