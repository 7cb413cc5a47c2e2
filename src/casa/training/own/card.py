"""The model card beside a finished model: recipe, what was learned from, scores, losses, where it was made."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casa.data.bad import REASONS, reported
from casa.provenance import provenance
from casa.training.card_parts import curve, front, recipe_block, versions_line, write_parts
from casa.training.own.recipe import RunRecipe, run_recipe_values


@dataclass(frozen=True)
class Facts:
    """What a run knows of itself, of all its processes. totals: what it was trained on (`trained_on`). made: records,
    samples, and what was downscaled, split or refused (`made_of_records`). bad: records that were passed over, by
    reason. scores: by name. history: the log, entry by entry. parameters: (group, rate, count) of what was trained;
    rate None for what was not.
    """

    steps: int
    totals: Mapping[str, int]
    made: Mapping[str, int]
    bad: Mapping[str, int]
    scores: Mapping[str, float]
    history: list[dict[str, Any]]
    parameters: list[tuple[str, float | None, int]] = field(default_factory=list)
    device: str = "cpu"


def count_bad(folder: Path) -> Counter[str]:
    """Bad records by reason, from the reports of all readers of a run.

    A record is one, however many readers met it: files go to another of them each epoch.
    """
    reasons: dict[str, str] = {}
    for path in sorted(folder.glob("bad-records*.jsonl")):
        reasons.update(reported(path.read_bytes()))
    return Counter(reasons.values())


def write_card(folder: Path, recipe: RunRecipe, facts: Facts) -> None:
    """Writes README.md, and the loss curve if matplotlib is there, into a checkpoint's folder."""
    source = recipe.model.source
    base = {"base_model": source} if source.count("/") == 1 and not Path(source).exists() else {}
    drawn = curve(folder, facts.history, recipe.name, "The loss over steps")
    parts = [front(**base), f"# {recipe.name}", _summary(recipe), _use(recipe)]
    parts += ["## Losses and scores", drawn, _scores(recipe, facts)]
    parts += ["## Data", _data(recipe, facts), "## What was trained", _trained(facts)]
    parts += ["## Recipe", recipe_block(run_recipe_values(recipe)), "## Made with", _made_with(facts)]
    write_parts(folder, parts)


def _summary(recipe: RunRecipe) -> str:
    model = recipe.model
    if model.checkpoint is not None:
        began = f"Trained further from the CASA checkpoint `{_shown(model.checkpoint)}`"
    else:
        fusion = model.fusion
        method = "casa" if fusion is None else fusion.method
        placement = "parallel" if fusion is None else fusion.placement
        how = "insertion" if method == "insertion" else f"{method} ({placement})"
        seen = f" with the image encoder of `{_shown(model.vision)}`" if model.vision is not None else ""
        began = f"`{_shown(model.backbone)}`{seen}, given eyes by {how}"
    lora = f" LoRA adapters of rank {model.lora.rank} were merged into its weights." if model.lora is not None else ""
    return f"{began}, with [casa](https://arxiv.org/abs/2512.19535)'s trainer.{lora}"


def _shown(name: str | None) -> str:
    """A hub's name as it is; of a folder only its last part: where it lay is nobody's business."""
    text = str(name)
    return text if text.count("/") == 1 and not text.startswith((".", "/", "~")) else Path(text).name


def _use(recipe: RunRecipe) -> str:
    return (
        "```python\nfrom casa import CasaForConditionalGeneration, CasaProcessor\n\n"
        'model = CasaForConditionalGeneration.from_pretrained("this folder")\n'
        'processor = CasaProcessor.from_pretrained("this folder")\n```'
    )


def _scores(recipe: RunRecipe, facts: Facts) -> str:
    losses = [entry["loss"] for entry in facts.history if "loss" in entry]
    rows = [("steps", f"{facts.steps:,}")]
    if losses:
        rows.append(("loss per answer token, first and last in the log", f"{losses[0]:.4g}, {losses[-1]:.4g}"))
    names = {"loss": "held-out loss per answer token"}
    rows += [(names.get(name, name), f"{value:.4g}") for name, value in facts.scores.items()]
    largest = recipe.evaluation.largest
    if recipe.evaluation.tasks and largest is not None:
        rows.append(("pictures of these tasks", f"at most {largest} px"))
    rates = [entry["text_tokens_per_second"] for entry in facts.history if "text_tokens_per_second" in entry]
    if rates:
        rows.append(("text tokens per second, median", f"{sorted(rates)[len(rates) // 2]:,.0f}"))
    memory = [entry["memory_gib"] for entry in facts.history if "memory_gib" in entry]
    if memory:
        rows.append(("most memory held", f"{max(memory):.1f} GiB"))
    return _table(("", ""), rows)


def _data(recipe: RunRecipe, facts: Facts) -> str:
    sources = [
        (f"`{_shown(source.path)}`", source.subset or "", f"{source.weight:g}") for source in recipe.data.sources
    ]
    totals = [(name.replace("_", " "), f"{count:,}") for name, count in facts.totals.items()]
    made = [(f"records {name}", f"{facts.made[name]:,}") for name in _OVER if facts.made.get(name)]
    text = _table(("source", "subset", "weight"), sources) + "\n\n" + _table(("trained on", ""), totals + made)
    if facts.bad:
        bad = [(f"{count:,}", reason, REASONS.get(reason, "")) for reason, count in sorted(facts.bad.items())]
        return text + "\n\nPassed over:\n\n" + _table(("records", "reason", ""), bad)
    return text + "\n\nNo record had to be passed over."


_OVER = ("downscaled", "split", "refused", "pieces refused")


def _trained(facts: Facts) -> str:
    rows = [(f"`{group}`", "frozen" if rate is None else f"{rate:g}", f"{n:,}") for group, rate, n in facts.parameters]
    return _table(("parameters", "rate", "count"), rows)


def _made_with(facts: Facts) -> str:
    found = provenance(facts.device)
    versions = versions_line(found["versions"])
    return f"{versions}; Python {found['python']}; {found['device']}; commit {found['commit'] or 'unknown'}."


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)
