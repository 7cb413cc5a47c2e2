"""Plots of a study, each of a claim's section, from records alone."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from casa.figures import BLUE, GREEN, GREY, ORANGE, new_figure, quieten
from projects.study.records import Records

_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", GREY)
_DASHES = ("-", "--")  # of the first runs of a section, and of those beyond the colours


def curves(records: Records, section: Mapping[str, Any]) -> Any:
    """Loss and scores by step; every seed is a line, so that a run that failed to learn is seen."""
    figure = new_figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    for index, name in enumerate(_present(records, section)):
        how = {"color": _COLOURS[index % len(_COLOURS)], "linestyle": _DASHES[index // len(_COLOURS) % 2]}
        for number, record in enumerate(records.of(name)):
            steps, losses = zip(*record["curve"], strict=True)
            left.plot(steps, _smooth(losses), linewidth=1.1, label=name if number == 0 else None, **how)
            way = [(int(step), _mean(found["scores"])) for step, found in record["on_the_way"].items()]
            bits = "".join(value["exact"] for kind, value in record["scores"].items() if not kind.startswith("spoken"))
            way.append((record["run"]["budget"]["steps"], 100 * bits.count("1") / len(bits)))
            right.plot(*zip(*way, strict=True), linewidth=1.1, marker="o", markersize=3, **how)
    _named(left, "Loss of training", "step", "loss per answer token")
    _named(right, "Questions that need pictures, right", "step", "%")
    left.set_ylim(bottom=0)
    right.set_ylim(0, 100)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def scores(records: Records, section: Mapping[str, Any]) -> Any:
    """Right answers by column: every seed a dot, the mean a bar across."""
    names, columns = _present(records, section), section["columns"]
    figure = new_figure(9, 1.4 + 0.28 * len(names))
    grid = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(grid, columns, strict=True):
        for row, name in enumerate(names):
            found = [100 * value for value in records.scores(name, column)]
            if found:
                colour = ORANGE if "insertion" in name else GREEN if "cross" in name else BLUE
                axes.plot(found, [row] * len(found), "o", color=colour, markersize=4, alpha=0.7)
                axes.plot([float(np.mean(found))] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2)
        _named(axes, column, "% right", "")
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.margins(x=0.15)
        axes.locator_params(axis="x", nbins=3)
    grid[0].set_yticks(range(len(names)), names, fontsize=8)
    grid[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def gate(records: Records, section: Mapping[str, Any]) -> Any:
    """How far attention to itself is above that to one image token: by layer and head at the end, by step before."""
    figure = new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    name = section["parts"]["run"]
    for number, record in enumerate(records.of(name)):
        if "attention" not in record:
            continue
        gates = np.array(record["attention"]["gate_log10"], dtype=float)
        for head in range(gates.shape[1]):
            left.plot(np.arange(len(gates)) + 0.08 * (head - 1.5), gates[:, head], "o", color=_COLOURS[number], ms=4)
        left.plot(gates.mean(1), color=_COLOURS[number], linewidth=1.2, label=f"seed {record['run']['seed']}")
        way = {int(step): found["attention"] for step, found in record["on_the_way"].items() if "attention" in found}
        way[record["run"]["budget"]["steps"]] = record["attention"]
        for layer in range(len(gates)):
            values = [float(np.mean(found["gate_log10"][layer])) for found in way.values()]
            label = f"block {record['attention']['blocks'][layer]}" if number == 0 else None
            right.plot([*way], values, color=_COLOURS[layer], linewidth=1.1, marker="o", markersize=3, label=label)
    for axes, title, x in ((left, "At the end; a dot is a head", "block"), (right, "While it is trained", "step")):
        _named(axes, title, x, "log10 (itself / one image token)")
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=8)
    return figure


def looks(records: Records, section: Mapping[str, Any]) -> Any:
    """Share of attention on images and on itself by block; how widely images are looked at, needed or not."""
    figure = new_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    found = [r["attention"] for r in records.of(section["parts"]["run"]) if "attention" in r]
    if found:
        for colour, kind in zip(_COLOURS, found[0]["shares"], strict=False):
            values = np.array([[np.mean(heads) for heads in each["shares"][kind]] for each in found])
            left.plot(100 * values.mean(0), color=colour, marker="o", markersize=3, label=kind)
            left.plot(100 * values.T, color=colour, linewidth=0.4, alpha=0.6)
        for colour, need in ((BLUE, "needed"), (ORANGE, "not needed")):
            rows = [[layer[1] for layer in each["entropy"][need]] for each in found if each["entropy"][need]]
            if rows:
                values = np.array(rows, dtype=float)
                right.plot(values.mean(0), color=colour, marker="o", markersize=3, label=f"picture {need}")
                right.plot(values.T, color=colour, linewidth=0.4, alpha=0.6)
    _named(left, "Where answers look", "block", "% of attention")
    _named(right, "How widely: 1 is all image tokens alike", "block", "median entropy")
    right.set_ylim(0, 1.05)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=8)
    return figure


def ago(records: Records, section: Mapping[str, Any]) -> Any:
    """Right answers by how many pictures ago: the mean over seeds, the seeds as a band."""
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    for colour, name in zip(_COLOURS, _present(records, section), strict=False):
        rows = []
        for record in records.of(name):
            by_kind = [record["scores"].get(f"ago.{back}", {}).get("exact", "") for back in range(8)]
            rows.append([100 * bits.count("1") / len(bits) if bits else np.nan for bits in by_kind])
        values = np.array(rows)
        axes.plot(values.mean(0), color=colour, marker="o", markersize=3, label=name)
        axes.fill_between(range(values.shape[1]), values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
    _named(axes, "What was shown so many pictures ago", "pictures ago", "% right")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


PLOTS: dict[str, Callable[[Records, Mapping[str, Any]], Any]] = {
    "scores": scores,
    "gate": gate,
    "looks": looks,
    "ago": ago,
}


def _present(records: Records, section: Mapping[str, Any]) -> list[str]:
    return [name for name in section["rows"] if records.seeds(name)]


def _smooth(values: Any, width: int = 5) -> list[float]:
    return [float(np.mean(values[max(0, end - width) : end])) for end in range(1, len(values) + 1)]


def _mean(by_task: Mapping[str, float]) -> float:
    found = [value for task, value in by_task.items() if task != "spoken"]
    return 100 * float(np.mean(found))


def _named(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    quieten(axes)
