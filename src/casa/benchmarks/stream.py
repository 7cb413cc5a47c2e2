"""Live video frame by frame, CASA beside insertion of the same size: what is held, and how long a frame takes.

bench_stream    sessions: each caption ends where the model ends it
bench_turns     frames times tokens, as the official release measures it: every turn is one frame and a fixed number
                of tokens; nobody stops early, since what is said has no meaning here, only its cost
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from casa.analysis.streaming_cost import Comparison, Cost, insertion_twin
from casa.benchmarks.harness import Benchmark, Figures, Panel, handwriting, in_own_process, table
from casa.errors import UserError
from casa.memory import max_memory_allocated, memory_allocated, reset_peak_memory
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.auto import load_pretrained
from casa.models.generation import stop_ids

METHODS = ("casa", "insertion")
TENTHS = 10


def bench_stream(
    model: str = "casa-tiny",
    frames: int = 120,
    size: int = 336,
    max_text_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    max_inserted: int = 120,
) -> Benchmark:
    """Sessions over frames of `size` x `size` px. Insertion is followed for `max_inserted` frames at most.

    Raises:
        UserError: fewer than four frames, whose quarters could not be compared.
    """
    if frames < 4:
        raise UserError(f"frames is {frames}; give at least 4, so that quarters can be compared.", field="frames")
    loaded, processor = load_pretrained(model, device)
    both = Comparison(
        loaded, processor, max_frames=max_inserted, max_image_tokens=None, max_text_tokens=max_text_tokens
    )
    rows = [both.step(frame) for frame in islice(handwriting(seed, size), frames)]
    found: Figures = {"frames": frames, "text_tokens_said": sum(row.tokens for row in rows)}
    for name in METHODS:
        costs: list[Cost] = [cost for row in rows if (cost := getattr(row, name)) is not None]
        if len(costs) >= 4:
            found[name] = _quarters(costs)
    shown = [{"method": name, **found[name]} for name in METHODS if name in found]
    columns = {"": "{method}", "frames": "{frames}", "first quarter": "{first_quarter_ms:.1f} ms"}
    columns |= {"last quarter": "{last_quarter_ms:.1f} ms", "ratio": "{latency_ratio:.2f}"}
    columns |= {"cache first": "{cache_bytes[0]!K:.1f} KiB", "cache last": "{cache_bytes[1]!K:.1f} KiB"}
    settings = {"size": size, "seed": seed, "max_text_tokens": max_text_tokens}
    return Benchmark("stream", settings, found, table(shown, columns), str(loaded.device), model)


def _quarters(costs: Sequence[Cost]) -> Figures:
    """Medians of the first and last quarter, in ms, and what was held after the first and the last frame."""
    quarter, usages = len(costs) // 4, [cost.usage for cost in costs]
    first, last = (1000 * median(c.seconds for c in part) for part in (costs[:quarter], costs[-quarter:]))
    return {
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


class FixedTurn(NamedTuple):
    """One frame: seconds from its pixels to the first token's logits, tokens a second after it, and what the cache
    holds then."""

    first_token: float
    tokens_per_second: float
    cache_tokens: int
    cache_bytes: int


class FixedTurns:
    """A model that takes turns, each behind the last one's cache."""

    def __init__(self, model: CasaForConditionalGeneration, processor: CasaProcessor, tokens: int) -> None:
        self._model, self._processor, self._tokens = model, processor, tokens
        self._cache = model.new_cache()
        self._filler = next(iter(stop_ids(model)), 0)

    @torch.no_grad()
    def take(self, frame: Image.Image) -> FixedTurn:
        before, after, pixels = self._processor.frame(frame)
        device = self._model.device
        self._wait()
        began = perf_counter()
        inputs = {name: value.to(device) for name, value in pixels.items()}
        place = torch.tensor([[0, len(before)]], device=device)
        token = self._next(before + (after or [self._filler]), image_positions=place, **inputs)
        self._wait()
        first = perf_counter() - began
        for _ in range(self._tokens - 1):
            token = self._next([token])
        self._wait()
        rest = perf_counter() - began - first
        held = self._cache.num_text + self._cache.image_tokens
        return FixedTurn(first, (self._tokens - 1) / rest if rest > 0 else 0.0, held, self._cache.num_bytes)

    def _next(self, tokens: list[int], **images: Tensor) -> int:
        ids = torch.tensor([tokens], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **images)
        return int(output.logits[0, -1].argmax())

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def fixed_turns(
    model: CasaForConditionalGeneration, processor: CasaProcessor, frames: Iterator[Any], turns: int, tokens: int
) -> dict[str, list[FixedTurn]]:
    """Each frame through CASA and, beside it in the same turn, through insertion of the same weights."""
    both = {
        "casa": FixedTurns(model, processor, tokens),
        "insertion": FixedTurns(insertion_twin(model), processor, tokens),
    }
    found: dict[str, list[FixedTurn]] = {name: [] for name in both}
    for frame in islice(frames, turns):
        for name, taker in both.items():
            found[name].append(taker.take(frame))
    return found


def bench_turns(
    model: str = "casa-tiny",
    turns: int = 256,
    tokens: int = 16,
    size: int = 336,
    seed: int = 0,
    device: str = "auto",
    peak: bool = True,
) -> Benchmark:
    """Time to first token, tokens a second and cache over `turns` frames, in the first and the last tenth of them.

    Args:
        tokens: Said in each turn.
        peak: Measure each method's peak of memory too, once more in a process of its own.

    Raises:
        UserError: fewer turns than tenths, or fewer than two tokens.
    """
    if turns < TENTHS or tokens < 2:
        raise UserError(f"{turns} turns of {tokens} tokens say little; give at least {TENTHS} turns of 2 tokens.")
    loaded, processor = load_pretrained(model, device)
    found = fixed_turns(loaded, processor, handwriting(seed, size), turns, tokens)
    summary: Figures = {}
    for name, taken in found.items():
        tenth = turns // TENTHS
        parts = taken[:tenth], taken[-tenth:]
        summary[name] = {
            "turns": turns,
            "first_token_ms": [round(1000 * median(t.first_token for t in part), 2) for part in parts],
            "tokens_per_second": [round(median(t.tokens_per_second for t in part), 1) for part in parts],
            "cache_tokens": taken[-1].cache_tokens,
            "cache_bytes": taken[-1].cache_bytes,
        }
        if peak:
            summary[name]["peak_bytes"] = in_own_process(peak_of_turns, model, device, name, turns, tokens, size, seed)
    columns = {"": "{method}", "turns": "{turns}"}
    columns |= {"first token, ms": "{first_token_ms[0]:.1f} -> {first_token_ms[1]:.1f}"}
    columns |= {"tokens/s": "{tokens_per_second[0]:.1f} -> {tokens_per_second[1]:.1f}"}
    columns |= {
        "cache tokens": "{cache_tokens:,}",
        "cache": "{cache_bytes!K:.0f} KiB",
        "peak": "{peak_bytes!M:.0f} MiB",
    }
    panels = (
        Panel("frame", "ms to the first token", {name: [1000 * t.first_token for t in found[name]] for name in found}),
        Panel("frame", "cache, MiB", {name: [t.cache_bytes / 2**20 for t in found[name]] for name in found}),
    )
    shown = table([{"method": name, **row} for name, row in summary.items()], columns)
    settings = {"size": size, "seed": seed, "tokens": tokens}
    return Benchmark("stream", settings, summary, shown, str(loaded.device), model, panels)


def peak_of_turns(model: str, device: str, method: str, turns: int, tokens: int, size: int, seed: int) -> int:
    """Bytes above what the loaded model and its first turn leave: loading may have held more than all turns do.

    On CUDA it is what torch allocated there at most, on a CPU the most that the process held.
    """
    loaded, processor = load_pretrained(model, device)
    taken = loaded if method == "casa" else insertion_twin(loaded)
    frames = handwriting(seed, size)
    # what is made at the first time only (kernels, glyphs) is no part of the turns
    FixedTurns(taken, processor, tokens).take(next(frames))
    taker = FixedTurns(taken, processor, tokens)
    reset_peak_memory(loaded.device)
    before = memory_allocated(loaded.device)
    for frame in islice(frames, turns):
        taker.take(frame)
    return max_memory_allocated(loaded.device) - before
