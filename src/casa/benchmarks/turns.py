"""Frames times tokens, as the official release measures it: every turn one frame and a fixed number of tokens (C6).

CASA and insertion of the same weights take turns in one run. Nobody stops early: what is said has no meaning here, only
its cost. Time to first token is from the frame's pixels to the first token's logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from casa.analysis.streaming_cost import insertion_twin
from casa.benchmarks.plots import finish, panels
from casa.errors import UserError
from casa.figures import BLUE, ORANGE
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.generation import stop_ids

TENTHS = 10


@dataclass(frozen=True)
class Turn:
    """One frame: seconds to its first token, tokens a second after it, and what the cache holds then."""

    first_token: float
    tokens_per_second: float
    cache_tokens: int
    cache_bytes: int


class Turns:
    """A model that takes turns, each behind the last one's cache."""

    def __init__(self, model: CasaForConditionalGeneration, processor: CasaProcessor, tokens: int) -> None:
        self._model, self._processor, self._tokens = model, processor, tokens
        self._cache = model.new_cache()
        self._filler = next(iter(stop_ids(model)), 0)

    @torch.no_grad()
    def take(self, frame: Any) -> Turn:
        before, after, pixels = self._processor.frame(frame)
        after = after or [self._filler]
        device = self._model.device
        self._wait()
        began = perf_counter()
        inputs = {name: value.to(device) for name, value in pixels.items()}
        logits = self._run(before + after, image_positions=torch.tensor([[0, len(before)]], device=device), **inputs)
        token = int(logits.argmax())
        self._wait()
        first = perf_counter() - began
        for _ in range(self._tokens - 1):
            token = int(self._run([token]).argmax())
        self._wait()
        rest = perf_counter() - began - first
        held = self._cache.num_text + self._cache.image_tokens
        return Turn(first, (self._tokens - 1) / rest if rest > 0 else 0.0, held, self._cache.num_bytes)

    def _run(self, tokens: list[int], **images: Any) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **images)
        return output.logits[0, -1]

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def bench_turns(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    frames: Iterator[Any],
    turns: int = 256,
    tokens: int = 16,
) -> dict[str, list[Turn]]:
    """`turns` frames through CASA and, frame by frame beside it, through insertion. tokens: said in each turn.

    Raises UserError for fewer turns than tenths, or fewer than two tokens.
    """
    if turns < TENTHS or tokens < 2:
        raise UserError(f"turns is {turns} and tokens {tokens}; give at least {TENTHS} turns of 2 tokens.")
    takers = {"casa": Turns(model, processor, tokens), "insertion": Turns(insertion_twin(model), processor, tokens)}
    found: dict[str, list[Turn]] = {name: [] for name in takers}
    for _ in range(turns):
        frame = next(frames)
        for name, taker in takers.items():
            found[name].append(taker.take(frame))
    return found


def turns_summary(found: dict[str, list[Turn]]) -> dict[str, Any]:
    """Per method: medians of the first and the last tenth of its turns, and what it held at the end."""
    summary: dict[str, Any] = {}
    for name, turns in found.items():
        tenth = max(1, len(turns) // TENTHS)
        first, last = turns[:tenth], turns[-tenth:]
        summary[name] = {
            "turns": len(turns),
            "first_token_ms": [round(1000 * median(t.first_token for t in part), 2) for part in (first, last)],
            "tokens_per_second": [round(median(t.tokens_per_second for t in part), 1) for part in (first, last)],
            "cache_tokens": turns[-1].cache_tokens,
            "cache_bytes": turns[-1].cache_bytes,
        }
    return summary


def turns_table(summary: dict[str, Any]) -> str:
    """The summary as a few aligned lines."""
    lines = [f"{'':10}{'turns':>6}{'first token, ms':>22}{'tokens/s':>20}{'cache tokens':>14}{'cache':>12}{'peak':>12}"]
    for name, row in summary.items():
        first, rate = (
            " -> ".join(f"{value:.1f}" for value in row[key]) for key in ("first_token_ms", "tokens_per_second")
        )
        held = f"{row['cache_bytes'] / 1024:.0f} KiB"
        peak = f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else ""
        lines.append(f"{name:10}{row['turns']:6}{first:>22}{rate:>20}{row['cache_tokens']:14,}{held:>12}{peak:>12}")
    return "\n".join(lines)


def plot_turns(found: dict[str, list[Turn]], path: Path) -> None:
    """Time to first token and cache bytes over turns, as a PNG. Needs matplotlib."""
    figure, (latency, memory) = panels(2)
    for name, turns in found.items():
        colour = BLUE if name == "casa" else ORANGE
        latency.plot([1000 * turn.first_token for turn in turns], label=name, color=colour, linewidth=1)
        memory.plot([turn.cache_bytes / 2**20 for turn in turns], label=name, color=colour, linewidth=1.8)
    latency.set(xlabel="frame", ylabel="ms to the first token")
    memory.set(xlabel="frame", ylabel="cache, MiB")
    finish(figure, [latency, memory], path)
