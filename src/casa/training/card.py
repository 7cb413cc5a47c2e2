"""The model card beside a finished model: recipe, what was learned from, scores, losses, where it was made."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from casa.atomic import write_text
from casa.data.record import REASONS, read_report
from casa.errors import UserError
from casa.figures import BLUE, ORANGE, new_figure, quieten, write_png
from casa.provenance import provenance
from casa.training.config import Recipe
from casa.training.packed_dataset import DataPosition

COUNTED = ("packs", "samples", "text_tokens", "image_tokens", "images", "learned", "dropped")
_OVERSIZE = ("downscaled", "split", "refused", "pieces refused")
_CURVE = "loss.png"
_SMOOTH = 20  # entries that a point of the smoothed line looks back over
_FRONT = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["casa"]}
_USE = """```python
from casa import CasaForConditionalGeneration, CasaProcessor

model = CasaForConditionalGeneration.from_pretrained("this folder")
processor = CasaProcessor.from_pretrained("this folder")
```"""


@dataclass(frozen=True)
class RunFacts:
    """What a run knows of itself.

    Attributes:
        positions: where each of its processes stands in the data.
        scores: by name.
        history: the log, entry by entry.
        parameters: (group, learning rate, count) of what was trained; the rate is None for what was not.
    """

    steps: int
    positions: Sequence[DataPosition]
    scores: Mapping[str, float]
    history: list[dict[str, Any]]
    parameters: list[tuple[str, float | None, int]]
    device: str = "cpu"


def trained_on(positions: Iterable[DataPosition]) -> dict[str, int]:
    """Totals since the run began, by the keys of `COUNTED`. positions: one of each process."""
    found: Counter[str] = Counter()
    for position in positions:
        found.update(position.taken)
    return {name: found[name] for name in COUNTED}


def made_of_records(positions: Iterable[DataPosition]) -> Counter[str]:
    """Records, samples, and how many records were downscaled, split or refused (`SampleMaker.counts`)."""
    found: Counter[str] = Counter()
    for position in positions:
        for reader in position.positions.values():
            found.update(json.loads(reader)["counts"])
    return found


def count_bad(folder: Path) -> Counter[str]:
    """Bad records by reason, from the reports of all readers of a run.

    A record is one, however many readers met it: files go to another of them each epoch.
    """
    reasons: dict[str, str] = {}
    for path in sorted(folder.glob("bad-records*.jsonl")):
        reasons.update(read_report(path.read_bytes()))
    return Counter(reasons.values())


def write_card(folder: Path, recipe: Recipe, facts: RunFacts, run: Path) -> None:
    """Writes README.md, and the loss curve if matplotlib is there, into a model's folder. run: with its reports."""
    source = recipe.model.source
    base = {"base_model": source} if source.count("/") == 1 and not Path(source).exists() else {}
    try:
        drawn = draw_curve(facts.history, folder / _CURVE, recipe.name)
    except UserError:
        drawn = False  # without matplotlib: a card without its picture is a card
    values = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=110)
    made = provenance(facts.device)
    versions = ", ".join(f"{package} {version}" for package, version in made["versions"].items())
    parts = [
        f"---\n{yaml.safe_dump({**_FRONT, **base}, sort_keys=False)}---",
        f"# {recipe.name}",
        _summary(recipe),
        _USE,
        "## Losses and scores",
        f"![The loss over steps]({_CURVE})" if drawn else "",
        _scores(recipe, facts),
        "## Data",
        _data(recipe, facts, count_bad(run)),
        "## What was trained",
        _table(
            ("parameters", "learning rate", "count"),
            [(f"`{group}`", "frozen" if lr is None else f"{lr:g}", f"{n:,}") for group, lr, n in facts.parameters],
        ),
        "## Recipe",
        f"```yaml\n{values}```",
        "## Made with",
        f"{versions}; Python {made['python']}; {made['device']}; commit {made['commit'] or 'unknown'}.",
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _summary(recipe: Recipe) -> str:
    model = recipe.model
    if model.checkpoint is not None:
        began = f"Trained further from the CASA checkpoint `{_public_name(model.checkpoint)}`"
    else:
        fusion = model.fusion
        method = "casa" if fusion is None else fusion.method
        placement = "parallel" if fusion is None else fusion.placement
        how = "insertion" if method == "insertion" else f"{method} ({placement})"
        seen = f" with the image encoder of `{_public_name(model.vision)}`" if model.vision is not None else ""
        began = f"`{_public_name(model.backbone)}`{seen}, given eyes by {how}"
    lora = f" LoRA adapters of rank {model.lora.rank} were merged into its weights." if model.lora is not None else ""
    return f"{began}, with [casa](https://arxiv.org/abs/2512.19535)'s trainer.{lora}"


def _public_name(name: str | None) -> str:
    """A hub's name as it is; of a folder only its last part: where it lay is nobody's business."""
    text = str(name)
    return text if text.count("/") == 1 and not text.startswith((".", "/", "~")) else Path(text).name


def _scores(recipe: Recipe, facts: RunFacts) -> str:
    losses = [entry["loss"] for entry in facts.history if "loss" in entry]
    rows = [("steps", f"{facts.steps:,}")]
    if losses:
        rows.append(("loss per answer token, first and last in the log", f"{losses[0]:.4g}, {losses[-1]:.4g}"))
    names = {"loss": "held-out loss per answer token"}
    rows += [(names.get(name, name), f"{value:.4g}") for name, value in facts.scores.items()]
    max_side = recipe.evaluation.max_side
    if recipe.evaluation.tasks and max_side is not None:
        rows.append(("pictures of these tasks", f"at most {max_side} px"))
    rates = [entry["text_tokens_per_second"] for entry in facts.history if "text_tokens_per_second" in entry]
    if rates:
        rows.append(("text tokens per second, median", f"{sorted(rates)[len(rates) // 2]:,.0f}"))
    memory = [entry["memory_gib"] for entry in facts.history if "memory_gib" in entry]
    if memory:
        rows.append(("most memory held", f"{max(memory):.1f} GiB"))
    return _table(("", ""), rows)


def _data(recipe: Recipe, facts: RunFacts, bad: Counter[str]) -> str:
    sources = [
        (f"`{_public_name(source.path)}`", source.subset or "", f"{source.weight:g}") for source in recipe.data.sources
    ]
    totals = [(name.replace("_", " "), f"{count:,}") for name, count in trained_on(facts.positions).items()]
    made = made_of_records(facts.positions)
    totals += [(f"records {name}", f"{made[name]:,}") for name in _OVERSIZE if made[name]]
    text = _table(("source", "subset", "weight"), sources) + "\n\n" + _table(("trained on", ""), totals)
    if not bad:
        return text + "\n\nNo record had to be passed over."
    rows = [(f"{count:,}", reason, REASONS.get(reason, "")) for reason, count in sorted(bad.items())]
    return text + "\n\nPassed over:\n\n" + _table(("records", "reason", ""), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


def draw_curve(history: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str = "") -> bool:
    """Draws the log's `loss`, and `eval_loss` if there is any, over steps; False if there is no loss to draw.

    Raises:
        UserError: matplotlib is not installed.
    """
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    held = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if not points:
        return False
    figure = new_figure(7, 3.4)
    axes = figure.subplots()
    steps, losses = zip(*points, strict=True)
    few = len(points) < 2 * _SMOOTH
    axes.plot(
        steps, losses, color=BLUE, alpha=1.0 if few else 0.25, linewidth=1.2 if few else 0.8,
        marker="o" if len(points) < 12 else None, markersize=3, label="training" if few else None,
    )  # fmt: skip
    if not few:
        recent = [losses[max(0, end - _SMOOTH) : end] for end in range(1, len(losses) + 1)]
        smoothed = [sum(window) / len(window) for window in recent]
        axes.plot(steps, smoothed, color=BLUE, linewidth=1.6, label="training")
    if held:
        axes.plot(*zip(*held, strict=True), color=ORANGE, marker="o", markersize=3.5, linewidth=1.4, label="held out")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    quieten(axes)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    write_png(figure, path)
    return True
