"""Live video frame by frame, CASA beside insertion of the same size: what is held, and how long a frame takes.

By sessions, in which each caption ends where the model ends it; or by turns of a fixed number of tokens, as the
official release measures it: nobody stops early, since what is said has no meaning there, only its cost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from casa.analysis.streaming_cost import Comparison, Cost, insertion_twin
from casa.benchmarks.harness import Benchmark, Figures, Panel, clock, handwriting, in_own_process, table
from casa.benchmarks.live import bench_sessions
from casa.benchmarks.settings import StreamSettings
from casa.errors import UserError
from casa.memory import max_memory_allocated, memory_allocated, reset_peak_memory
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.auto import load_pretrained
from casa.models.generation import stop_ids

METHODS = ("casa", "insertion")
MAX_INSERTED = 120  # frames for which insertion is followed
TENTHS = 10


def bench_stream(settings: StreamSettings) -> Benchmark:
    """Watches frames with a model and with insertion of the same size, by sessions or, with `tokens`, by turns.

    With `sessions` it is told how many live streams the machine keeps.

    Raises:
        UserError: Both are asked for, or too few frames to compare their parts.
    """
    if settings.tokens is not None and settings.sessions is not None:
        raise UserError("tokens and sessions are two measurements; give one of them.", field=("tokens", "sessions"))
    if settings.sessions is not None:
        return bench_sessions(settings, settings.sessions)
    return _by_session(settings) if settings.tokens is None else _by_turns(settings, settings.tokens)


def _by_session(settings: StreamSettings) -> Benchmark:
    if settings.frames < 4:
        raise UserError(f"frames is {settings.frames}; give at least 4, to compare quarters.", field="frames")
    model, processor = load_pretrained(settings.model, settings.device)
    bound = settings.max_text_tokens or None
    most = {"max_frames": MAX_INSERTED, "max_image_tokens": None, "max_text_tokens": bound}
    both = Comparison(model, processor, clock=clock(model.device, settings.cpu_time), **most)
    rows = [both.step(frame) for frame in islice(handwriting(settings.seed, settings.size), settings.frames)]
    figures: Figures = {"frames": settings.frames, "text_tokens_said": sum(row.tokens for row in rows)}
    for name in METHODS:
        costs: list[Cost] = [cost for row in rows if (cost := getattr(row, name)) is not None]
        if len(costs) >= 4:
            figures[name] = _quarters(costs)
    shown = [{"method": name, **figures[name]} for name in METHODS if name in figures]
    columns = {"": "{method}", "frames": "{frames}", "first quarter": "{first_quarter_ms:.1f} ms"}
    columns |= {"last quarter": "{last_quarter_ms:.1f} ms", "ratio": "{latency_ratio:.2f}"}
    columns |= {"cache first": "{cache_bytes[0]!K:.1f} KiB", "cache last": "{cache_bytes[1]!K:.1f} KiB"}
    told = {"size": settings.size, "seed": settings.seed, "max_text_tokens": bound}
    told |= {"cpu_time": True} if settings.cpu_time else {}
    return Benchmark("stream", told, figures, table(shown, columns), str(model.device), settings.model)


def _quarters(costs: Sequence[Cost]) -> Figures:
    """Medians of the first and last quarter, in ms, and what was held after the first and the last frame."""
    quarter, usages = len(costs) // 4, [cost.usage for cost in costs]
    first, last = (1000 * median(c.seconds for c in part) for part in (costs[:quarter], costs[-quarter:]))
    image_bytes = [usage.image_bytes for usage in usages]
    return {
        "frames": len(costs),
        "first_quarter_ms": round(first, 2),
        "last_quarter_ms": round(last, 2),
        "latency_ratio": round(last / first, 3),
        "cache_bytes": [usages[0].cache_bytes, usages[-1].cache_bytes],
        "image_tokens": [usages[0].image_tokens, usages[-1].image_tokens],
        "image_bytes": [min(image_bytes), max(image_bytes)],
        "text_tokens": [usages[0].text_tokens, usages[-1].text_tokens],
        "most_cache_bytes": max(usage.cache_bytes for usage in usages),
        "bytes_per_text_token": usages[-1].text_bytes // max(1, usages[-1].text_tokens),
    }


class FixedTurn(NamedTuple):
    """One frame: seconds from its pixels to the first token's logits, tokens a second after it, and what is held."""

    first_token: float
    tokens_per_second: float
    cache_tokens: int
    cache_bytes: int


class FixedTurns:
    """A model that takes turns of a fixed number of tokens, each behind the last one's cache."""

    def __init__(self, model: CasaForConditionalGeneration, processor: CasaProcessor, tokens: int, cpu: bool = False):
        self._model, self._processor, self._tokens = model, processor, tokens
        self._now = clock(model.device, cpu)
        self._cache = model.new_cache()
        self._filler = next(iter(stop_ids(model)), 0)

    @torch.no_grad()
    def take(self, frame: Image.Image) -> FixedTurn:
        before, after, pixels = self._processor.frame(frame)
        device = self._model.device
        began = self._now()
        inputs = {name: value.to(device) for name, value in pixels.items()}
        place = torch.tensor([[0, len(before)]], device=device)
        token = self._next(before + (after or [self._filler]), image_positions=place, **inputs)
        first = self._now() - began
        for _ in range(self._tokens - 1):
            token = self._next([token])
        rest = self._now() - began - first
        held = self._cache.num_text + self._cache.image_tokens
        return FixedTurn(first, (self._tokens - 1) / rest if rest > 0 else 0.0, held, self._cache.num_bytes)

    def _next(self, tokens: list[int], **images: Tensor) -> int:
        ids = torch.tensor([tokens], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **images)
        return int(output.logits[0, -1].argmax())


def fixed_turns(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    frames: Iterator[Any],
    turns: int,
    tokens: int,
    cpu_time: bool = False,
) -> dict[str, list[FixedTurn]]:
    """Each frame through CASA and, beside it in the same turn, through insertion of the same weights."""
    models = {"casa": model, "insertion": insertion_twin(model)}
    both = {name: FixedTurns(each, processor, tokens, cpu_time) for name, each in models.items()}
    found: dict[str, list[FixedTurn]] = {name: [] for name in both}
    for frame in islice(frames, turns):
        for name, taker in both.items():
            found[name].append(taker.take(frame))
    return found


def _by_turns(settings: StreamSettings, tokens: int) -> Benchmark:
    """Time to first token, tokens a second and cache, in the first and the last tenth of the turns."""
    turns = settings.frames
    if turns < TENTHS:
        raise UserError(f"frames is {turns}; give at least {TENTHS}, to compare tenths.", field="frames")
    model, processor = load_pretrained(settings.model, settings.device)
    frames = handwriting(settings.seed, settings.size)
    found = fixed_turns(model, processor, frames, turns, tokens, settings.cpu_time)
    figures: Figures = {}
    for name, taken in found.items():
        tenth = turns // TENTHS
        parts = taken[:tenth], taken[-tenth:]
        figures[name] = {
            "turns": turns,
            "first_token_ms": [round(1000 * median(t.first_token for t in part), 2) for part in parts],
            "tokens_per_second": [round(median(t.tokens_per_second for t in part), 1) for part in parts],
            "cache_tokens": taken[-1].cache_tokens,
            "cache_bytes": taken[-1].cache_bytes,
        }
        if settings.peak:
            figures[name]["peak_bytes"] = in_own_process(peak_of_turns, asdict(settings), name)
    columns = {"": "{method}", "turns": "{turns}"}
    columns |= {"first token, ms": "{first_token_ms[0]:.1f} -> {first_token_ms[1]:.1f}"}
    columns |= {"tokens/s": "{tokens_per_second[0]:.1f} -> {tokens_per_second[1]:.1f}"}
    columns |= {"cache tokens": "{cache_tokens:,}", "cache": "{cache_bytes!K:.0f} KiB"}
    shown = table(
        [{"method": name, **row} for name, row in figures.items()], columns | {"peak": "{peak_bytes!M:.0f} MiB"}
    )
    panels = (
        Panel("frame", "ms to the first token", {name: [1000 * t.first_token for t in found[name]] for name in found}),
        Panel("frame", "cache, MiB", {name: [t.cache_bytes / 2**20 for t in found[name]] for name in found}),
    )
    told = {"size": settings.size, "seed": settings.seed, "tokens": tokens}
    told |= {"cpu_time": True} if settings.cpu_time else {}
    return Benchmark("stream", told, figures, shown, str(model.device), settings.model, panels)


def peak_of_turns(settings: dict[str, Any], method: str) -> int:
    """Bytes above what the loaded model and its first turn leave: loading may have held more than all turns do.

    On CUDA it is what torch allocated there at most, on a CPU the most that the process held.
    """
    chosen = StreamSettings(**settings)
    tokens = chosen.tokens or 1
    model, processor = load_pretrained(chosen.model, chosen.device)
    device = model.device
    model = model if method == "casa" else insertion_twin(model)
    frames = handwriting(chosen.seed, chosen.size)
    # what is made at the first time only (kernels, glyphs) is no part of the turns
    FixedTurns(model, processor, tokens).take(next(frames))
    taker = FixedTurns(model, processor, tokens)
    reset_peak_memory(device)
    before = memory_allocated(device)
    for frame in islice(frames, chosen.frames):
        taker.take(frame)
    return max_memory_allocated(device) - before
