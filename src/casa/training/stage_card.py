"""The model card of a run in three stages: recipe, losses, times, where it was made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from casa.atomic import write_text
from casa.errors import UserError
from casa.training.curve import draw_curve

CURVE = "loss.png"
FRONT = "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [casa]\n---"


def write_stage_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes README.md, and the last stage's loss curve if matplotlib is there, beside a finished model.

    facts: of the run, as in its `training.json`: recipe, seed, versions, and stages with steps, seconds and curve.
    """
    recipe, stages = facts["recipe"], facts["stages"]
    name, last = recipe["name"], list(stages)[-1]
    history = [{"step": step, "loss": loss} for step, loss in stages[last]["curve"]]
    try:
        drawn = draw_curve(history, folder / CURVE, f"{name}: {last}")
    except UserError:
        drawn = False  # a card without its picture is a card
    rows = [
        f"| {stage} | {found['steps']:,} | {found['seconds']:,.0f} s | {found['curve'][-1][1]:.4f} |"
        for stage, found in stages.items()
    ]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    parts = [
        FRONT,
        f"# {name}",
        "Trained in three stages, with [casa](https://arxiv.org/abs/2512.19535): a text model on the tasks' own text, "
        "an image tower on dense targets, then both together. Examples were drawn by seed while it learned.",
        "\n".join(["| stage | steps | time | last loss |", "|---|---|---|---|", *rows]),
        f"![The loss of the last stage over steps]({CURVE})" if drawn else "",
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110)}```",
        "## Made with",
        f"Seed {facts['seed']}, commit {facts['commit'] or 'unknown'}, {facts['threads']} threads; {versions}.",
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")
