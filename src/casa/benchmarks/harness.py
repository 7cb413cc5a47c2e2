"""What all benchmarks share: contestants take turns in one run, and what they took is a record, a table and a plot.

A benchmark is a function of its settings (`casa.benchmarks.settings`) that returns a `Benchmark`.
"""

import json
import math
import os
import string
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import count, islice
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from casa.atomic import write_text
from casa.errors import UserError
from casa.evaluation.example import generator
from casa.evaluation.stream import stream
from casa.figures import new_figure, quieten, write_png
from casa.media import VideoWriter
from casa.provenance import provenance

T = TypeVar("T")
Figures = dict[str, Any]  # names and values, ready for JSON
CLIP_SECONDS = 60.0
DRAWN = 120  # different frames of a film
FEW_POINTS = 12  # of a line, which are marked
UNITS = {"K": 2**10, "M": 2**20}


@dataclass(frozen=True)
class Panel:
    """One pair of axes of a plot. lines: label -> y, or (x, y)."""

    x: str
    y: str
    lines: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Benchmark:
    """What was measured: its name, settings, figures, and the same as a table. model: whose weights were used."""

    name: str
    settings: Figures
    figures: Figures
    table: str
    device: str = "cpu"
    model: str | None = None
    panels: tuple[Panel, ...] = ()

    def record(self) -> Figures:
        """All of it with what is needed to trace it, ready for JSON."""
        model = {} if self.model is None else {"model": self.model}
        return {"bench": self.name, **model, **self.settings, **provenance(self.device, self.model), **self.figures}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the record, whole or not at all."""
        write_text(path, json.dumps(self.record(), indent=2) + "\n")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the panels side by side, each from 0 on with a tenth of room above. Needs matplotlib.

        Many lines, the same in all panels, are named once, below.
        """
        figure = new_figure(4.6 * len(self.panels), 3.6)
        many = len(self.panels[0].lines) > 3
        for axes, panel in zip(figure.subplots(1, len(self.panels), squeeze=False)[0], self.panels, strict=True):
            quieten(axes)
            for label, line in panel.lines.items():
                points = line if isinstance(line, tuple) else (line,)
                # a few points show where something was measured
                marker = "o" if len(points[0]) <= FEW_POINTS else None
                axes.plot(*points, label=label, linewidth=1.4, marker=marker, markersize=4)
            axes.set(xlabel=panel.x, ylabel=panel.y)
            # a line that hardly changes would otherwise lie on the upper edge
            axes.margins(y=0)
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
            if not many:
                axes.legend(frameon=False, fontsize=8)
        if many:
            named = figure.axes[0].get_legend_handles_labels()
            figure.legend(*named, loc="outside lower center", ncols=len(self.panels[0].lines), frameon=False)
        write_png(figure, path)

    def compare(self, path: str | os.PathLike[str]) -> str:
        """A table of every figure beside that of an earlier record.

        Raises:
            UserError: The file is no record of this benchmark with these settings.
        """
        try:
            earlier = json.loads(Path(path).read_text(encoding="utf-8"))
            same = earlier["bench"] == self.name
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no record of a benchmark: name a file that one wrote.") from error
        other = [name for name, value in self.settings.items() if earlier.get(name) != value]
        if not same or other:
            raise UserError(f"{path} is of another benchmark, or with another {', '.join(other) or 'name'}.")
        then = dict(_numbers(earlier))
        both = [(name, now, then[name]) for name, now in _numbers(self.figures) if name in then]
        rows = [{"name": name, "now": a, "then": b, "ratio": a / b if b else None} for name, a, b in both]
        return table(rows, {"figure": "{name}", "now": "{now:.6g}", "then": "{then:.6g}", "ratio": "{ratio:.2f}"})


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping | list | tuple):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def take_turns(contestants: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each returned in every round. They take turns, so that a busy machine slows all alike."""
    found: dict[str, list[T]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name].append(run())
    return found


def clock(device: torch.device | str, cpu_time: bool = False) -> Callable[[], float]:
    """Seconds, or those of this process's processors; on CUDA when all that was asked for is done."""
    read = process_time if cpu_time else perf_counter

    def now() -> float:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    return now


def percentiles(values: Sequence[float], *shares: float, digits: int = 1) -> list[float]:
    """Percentiles (50: the median), rounded."""
    return [round(float(value), digits) for value in np.percentile(values, shares)]


class _CellFormatter(string.Formatter):
    """`{bytes!K:.0f}` divides by a unit."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return value / UNITS[conversion] if conversion in UNITS else value


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as aligned text.

    Args:
        rows: Figures by their names.
        columns: Title -> how a row's cell is written, such as "{cache_bytes!K:.1f} KiB"; "-" where a figure is missing.
    """

    def cell(form: str, row: Mapping[str, Any]) -> str:
        try:
            return _CellFormatter().vformat(form, (), row)
        except (KeyError, TypeError):  # not there, or None
            return "-"

    cells = [[*columns], *([cell(form, row) for form in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells)


def in_own_process(function: Callable[..., T], *arguments: object, environment: dict[str, str] | None = None) -> T:
    """What a function at the top of a module returns in a new process, which has a peak of memory of its own.

    Arguments and result are what JSON holds.

    Raises:
        UserError: The process fails, of memory perhaps.
    """
    given = json.dumps([function.__module__, function.__name__, arguments])
    command = [sys.executable, "-c", f"from {__name__} import answer; answer()", given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise UserError(f"{function.__name__} in a process of its own failed: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer() -> None:
    """In the new process: calls the function, and prints what it returns as the last line."""
    module, name, arguments = json.loads(sys.argv[1])
    print(json.dumps(getattr(import_module(module), name)(*arguments)))


def handwriting(seed: int, size: int) -> Iterator[Image.Image]:
    """Frames without end, at 2 fps, of numbers in held-out handwriting that come and go, `size` x `size` px."""
    # handwriting is drawn no smaller and no larger than this, and scaled
    drawn = min(max(size, 224), 448)
    for number in count(1):
        rng = generator("stream", "held_out", seed, number)
        for frame in stream(rng, "held_out", seconds=CLIP_SECONDS, sizes=[(drawn, drawn)]).frames():
            yield frame if drawn == size else frame.resize((size, size), Image.Resampling.BICUBIC)


def write_film(path: Path, seconds: float, size: int, film_fps: float, fps: float, seed: int) -> int:
    """Writes a film of `film_fps` frames a second, and returns how many those are.

    It shows a few drawn frames in turn, `fps` of them a second: whoever looks so often sees each.
    """
    frames, part = round(seconds * film_fps), fps / film_fps
    drawn = islice(handwriting(seed, size), min(DRAWN, math.ceil(frames * part) + 1))
    pictures = [np.asarray(picture) for picture in drawn]
    with VideoWriter(path, (size, size), film_fps, preset="ultrafast", crf=30) as video:
        for number in range(frames):
            # changed half-way between two looks, since right after it the encoder still shows much of the one before;
            # at the latest at the frame that is looked at
            shown = max(math.floor(number * part + 0.5), math.ceil((number + 1) * part) - 1)
            video.write(pictures[shown % len(pictures)])
    return frames
