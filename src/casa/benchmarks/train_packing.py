"""How full packs are, at the paper's budgets and lengths spread as its data's are."""

from dataclasses import asdict
from typing import Any

from casa.training.packs import PackingSettings, measure_packing, spread_lengths
from casa.training.samples import BUDGETS


def bench_packing(samples: int = 4000, seed: int = 0) -> dict[str, Any]:
    """The waste of every stage's budget, with the usual buffer."""
    found = {}
    for stage, budget in BUDGETS.items():
        settings = PackingSettings(budget=budget)
        measured = measure_packing(spread_lengths(samples, budget, seed), settings)
        found[stage] = {"budget": [budget.text, budget.image], "buffer": settings.buffer, **asdict(measured)}
    return found


def packing_table(found: dict[str, Any]) -> str:
    """A line for each stage."""
    lines = [f"{'stage':12}{'text empty':>12}{'images empty':>14}{'padding without packs':>24}{'longest wait':>14}"]
    for stage, row in found.items():
        lines.append(
            f"{stage:12}{row['text_waste']:12.1%}{row['image_waste']:14.1%}{row['padded_waste']:24.1%}"
            f"{row['longest_wait']:14}"
        )
    return "\n".join(lines)
