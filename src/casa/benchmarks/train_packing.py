"""How full packs are, at the paper's budgets, for samples as each stage has them, with the reader's own buffer."""

from dataclasses import asdict
from typing import Any

from casa.training.packs import PackingSettings, measure_packing, spread_lengths, stage_lengths
from casa.training.samples import BUDGETS

PROPORTIONED = "in proportion"  # samples of one picture, in the proportion of the image stage's budget


def bench_packing(samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """What stays empty of the budgets, by kind of samples; of what is empty, what no packer could have filled."""
    drawn = {PROPORTIONED: ("image", spread_lengths(samples, BUDGETS["image"], seed))}
    drawn |= {stage: (stage, stage_lengths(stage, samples, seed)) for stage in BUDGETS}
    found = {}
    for kind, (stage, lengths) in drawn.items():
        budget = BUDGETS[stage]
        settings = PackingSettings(budget=budget)
        measured = measure_packing(lengths, settings)
        buffer = [settings.buffer, settings.buffer_megabytes]
        found[kind] = {"budget": [budget.text, budget.image], "buffer": buffer, **asdict(measured)}
    return found


def packing_table(found: dict[str, Any]) -> str:
    """A line for each kind of samples; in brackets, what no packer could have filled."""
    titles = f"{'samples':16}{'text empty':>20}{'images empty':>20}{'to choose from':>16}"
    lines = [f"{titles}{'longest wait':>14}{'padding without packs':>23}"]
    for kind, row in found.items():
        text, image = (f"{row[f'{name}_waste']:.1%} ({row[f'least_{name}']:.1%})" for name in ("text", "image"))
        lines.append(
            f"{kind:16}{text:>20}{image:>20}{row['choice']:16.0f}{row['longest_wait']:14}{row['padded_waste']:23.1%}"
        )
    return "\n".join([*lines, "in brackets: what packs without a gap would leave empty, given these samples"])
