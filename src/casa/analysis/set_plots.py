"""Statistics over a set as files: tables for a spreadsheet, plots, and all of it as JSON."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from casa.analysis.attention_maps import KINDS
from casa.analysis.statistics import LOOKS, ONLY, QUANTILES, WITHOUT, SetStatistics
from casa.atomic import write_text
from casa.figures import BLUE, GREEN, GREY, ORANGE, new_figure, quieten, write_png

DPI = 150
COLOURS = (BLUE, GREEN, ORANGE)


def write_statistics(
    folder: str | os.PathLike[str], found: SetStatistics, facts: dict[str, Any] | None = None
) -> list[Path]:
    """Writes statistics.json, gate.csv, layers.csv, entropy.csv and a plot of each.

    Args:
        folder: Where; it is there.
        found: What `set_statistics` gave.
        facts: Stand at the beginning of the JSON: model, data, commit.

    Returns:
        The files.

    Raises:
        UserError: matplotlib is missing, or a file cannot be written.
    """
    place = Path(folder)
    write_text(place / "statistics.json", json.dumps({**(facts or {}), **found.to_dict()}, indent=1) + "\n")
    for name, rows in tables(found).items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(place / f"{name}.csv", text.getvalue())
    plots = {"gate": plot_gate, "entropy": plot_entropy} | (
        {"layers": plot_layers} if any(n.startswith(ONLY) for n in found.scores) else {}
    )
    for name, plot in plots.items():
        plot(found, place / f"{name}.png")
    return [
        place / "statistics.json",
        *(place / f"{n}.csv" for n in tables(found)),
        *(place / f"{n}.png" for n in plots),
    ]


def tables(found: SetStatistics) -> dict[str, list[list[Any]]]:
    """Rows of each table, its head first."""
    gate = found.gate()
    heads = [
        [block, head, float(gate[layer, head]), *(float(share[layer, head]) for share in found.shares)]
        for layer, block in enumerate(found.blocks)
        for head in range(gate.shape[1])
    ]
    scores = [[name or "whole", score.exact, score.log_likelihood] for name, score in found.scores.items()]
    spread = [
        [block, group, *quartiles[layer]]
        for group, quartiles in found.entropy_by_need().items()
        for layer, block in enumerate(found.blocks)
        if quartiles
    ]
    return {
        "gate": [["block", "head", "log10_itself_over_image_token", *(f"share_{kind}" for kind in KINDS)], *heads],
        "layers": [["ablation", "exact", "log_likelihood"], *scores],
        "entropy": [["block", "picture", "quartile_1", "median", "quartile_3"], *spread],
    }


def plot_gate(found: SetStatistics, path: str | os.PathLike[str]) -> None:
    """The paper's implicit gate: attention to itself beside that to one image token, by layer and by head."""
    figure = new_figure(9.0, 3.7, DPI)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1.0]})
    at = np.arange(len(found.blocks))
    for number, (look, colour) in enumerate(zip(LOOKS, COLOURS, strict=True)):
        low, quarter, middle, three, high = np.maximum(found.quantiles()[number].numpy().T, 1e-12)
        x = at + 0.22 * (number - 1)
        left.vlines(x, low, high, color=colour, linewidth=1)
        left.vlines(x, quarter, three, color=colour, linewidth=5, alpha=0.6)
        left.plot(x, middle, "o", color=colour, markersize=4, label=look)
    left.set_yscale("log")
    left.set_xticks(at, [str(block) for block in found.blocks])
    left.set_xlabel("layer in block")
    left.set_ylabel("attention of an answer's token to")
    left.set_title(f"{found.questions} questions: {QUANTILES[0]:.0%}, quartiles, {QUANTILES[-1]:.0%}", fontsize=11)
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    quieten(left)
    gate = found.gate().numpy()
    most = max(float(np.nanmax(np.abs(gate))) if np.isfinite(gate).any() else 1.0, 1e-6)
    drawn = right.imshow(gate, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    right.set_xticks(range(gate.shape[1]))
    right.set_yticks(at, [str(block) for block in found.blocks])
    right.set_xlabel("head")
    right.set_ylabel("layer in block")
    right.set_title("itself over one image token", fontsize=11)
    figure.colorbar(drawn, ax=right, label="log10 of the ratio, median", fraction=0.06)
    write_png(figure, path)


def plot_layers(found: SetStatistics, path: str | os.PathLike[str]) -> None:
    """The score without each layer, and with the first k of them alone."""
    figure = new_figure(9.0, 3.5, DPI)
    whole, blind = found.scores[""], found.scores["no-images"]
    count = len(found.blocks)
    without, only = ([name for name in found.scores if name.startswith(kind)] for kind in (WITHOUT, ONLY))
    views = (
        ("without one layer", without, [str(block) for block in found.blocks], "layer in block"),
        ("with the first layers alone", [*only, ""], [str(k) for k in range(count + 1)], "layers"),
    )
    for axes, (title, chosen, ticks, below) in zip(figure.subplots(1, 2, sharey=True), views, strict=True):
        values = [found.scores[name].log_likelihood for name in chosen]
        axes.plot(range(len(values)), values, "o-", color=BLUE, linewidth=1.8, markersize=5)
        for x, name in enumerate(chosen):
            axes.annotate(
                f"{found.scores[name].exact:.0%}", (x, values[x]), xytext=(0, 7), textcoords="offset points",
                ha="center", fontsize=8, color=BLUE,
            )  # fmt: skip
        for score, name, colour in ((whole, "whole model", GREEN), (blind, "images hidden", GREY)):
            told = f"{name}, {score.exact:.0%}"
            axes.axhline(score.log_likelihood, color=colour, linewidth=1.2, linestyle="--", label=told)
        axes.set_xticks(range(len(values)), ticks)
        axes.margins(x=0.08, y=0.15)
        axes.set_xlabel(below)
        axes.set_title(f"{title} (% said word for word)", fontsize=11)
        quieten(axes)
    figure.axes[0].set_ylabel("log-likelihood of the answer,\nnats per token")
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    write_png(figure, path)


def plot_entropy(found: SetStatistics, path: str | os.PathLike[str]) -> None:
    """How widely each layer looks over the image, for questions that need the picture and that do not."""
    figure = new_figure(5.2, 3.7, DPI)
    axes = figure.subplots()
    at = np.arange(len(found.blocks))
    needed = int(found.needs_picture.sum())
    counts = {"needed": needed, "not needed": found.questions - needed}
    for number, (name, quartiles) in enumerate(found.entropy_by_need().items()):
        if not quartiles:
            continue
        low, middle, high = np.array(quartiles).T
        colour, x = (ORANGE, GREY)[number], at + 0.12 * (2 * number - 1)
        axes.vlines(x, low, high, color=colour, linewidth=5, alpha=0.5)
        axes.plot(x, middle, "o", color=colour, markersize=5, label=f"picture {name} ({counts[name]})")
    axes.set_xticks(at, [str(block) for block in found.blocks])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("layer in block")
    axes.set_ylabel("entropy of image attention (1: all alike)")
    axes.set_title("how widely it looks: quartiles over questions", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    quieten(axes)
    write_png(figure, path)
