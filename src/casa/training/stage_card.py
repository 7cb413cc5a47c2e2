"""The model card of a run in stages: recipe, losses, times, where it was made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from casa.training.card_parts import curve, front, recipe_block, versions_line, write_parts


def write_stage_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes README.md, and the last stage's loss curve if matplotlib is there, beside a finished model.

    facts: of the run, as in its `training.json`: recipe, seed, versions, and stages with steps, seconds and curve.
    """
    recipe, stages = facts["recipe"], facts["stages"]
    name, last = recipe["name"], list(stages)[-1]
    history = [{"step": step, "loss": loss} for step, loss in stages[last]["curve"]]
    rows = [
        f"| {stage} | {found['steps']:,} | {found['seconds']:,.0f} s | {found['curve'][-1][1]:.4f} |"
        for stage, found in stages.items()
    ]
    versions = versions_line(facts["versions"])
    parts = [
        front(),
        f"# {name}",
        "Trained in stages, with [casa](https://arxiv.org/abs/2512.19535): a text model on the tasks' own text, "
        "an image tower on dense targets, then both together. Examples were drawn by seed while it learned.",
        "\n".join(["| stage | steps | time | last loss |", "|---|---|---|---|", *rows]),
        curve(folder, history, f"{name}: {last}", "The loss of the last stage over steps"),
        f"## Recipe\n\n{recipe_block(recipe)}",
        "## Made with",
        f"Seed {facts['seed']}, commit {facts['commit'] or 'unknown'}, {facts['threads']} threads; {versions}.",
    ]
    write_parts(folder, parts)
