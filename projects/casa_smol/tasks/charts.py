"""Charts by matplotlib: bars, lines, pies, points; questions about what they show."""

from io import BytesIO
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from projects.casa_smol.canvas import COLOURS, colour_of
from projects.casa_smol.damage import worn
from projects.casa_smol.fonts import kins
from projects.casa_smol.tasks.asked import Turn, some, turn
from projects.casa_smol.tasks.things import Things
from projects.casa_smol.words import DAYS, MONTHS, pick

STYLES = {
    "train": ("default", "classic", "bmh", "fivethirtyeight", "grayscale", "Solarize_Light2", "dark_background"),
    "held_out": ("ggplot", "tableau-colorblind10"),
}
RULES = ("axes.grid", "axes.facecolor", "figure.facecolor", "axes.edgecolor", "axes.labelcolor", "text.color",
         "xtick.color", "ytick.color", "grid.color", "grid.linestyle", "axes.prop_cycle")  # fmt: skip
KINDS = ("bars", "bars", "sideways", "line", "lines", "pie", "groups")


def _categories(rng: Generator, things: Things, count: int) -> list[str]:
    kind = rng.random()
    if kind < 0.2:
        start = int(rng.integers(12 - min(count, 11)))
        long = rng.random() < 0.3
        return [month if long else month[:3] for month in MONTHS[start : start + count]]
    if kind < 0.3:
        return [day[:3] for day in DAYS[:count]]
    if kind < 0.45:
        year = int(rng.integers(1980, 2020))
        return [str(year + step) for step in range(count)]
    if kind < 0.6:
        return things.distinct(count, lambda: things.pick("cities"))
    if kind < 0.75:
        return things.distinct(count, lambda: things.pick("goods"))
    if kind < 0.85:
        return things.distinct(count, lambda: things.pick("first"))
    return things.distinct(count, lambda: things.word().capitalize())


def _values(rng: Generator, count: int, exact: bool = False) -> list[float]:
    """Numbers of which the highest and lowest stand out; of two digits where they must be read off an axis."""
    top = 10 ** float(rng.uniform(1, 4))
    while True:
        found = rng.uniform(0.08, 1, count) * top
        digits = (0 if top > 20 or rng.random() < 0.3 else 1) if exact else 1 - int(np.floor(np.log10(top)))
        found = np.round(found, digits)
        order = np.sort(found)
        if (order[-1] - order[-2] > 0.04 * top and order[1] - order[0] > 0.04 * top) or count < 2:
            return [float(value) for value in found]


def _plain(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _named_colours(rng: Generator, count: int) -> list[tuple[float, ...]]:
    """Colours whose plain names differ, as far as there are names."""
    found, names = [], set()
    for _ in range(400):
        rgb = tuple(int(v) for v in rng.integers(0, 256, 3))
        name = colour_of(rgb)  # type: ignore[arg-type]
        if name not in names and COLOURS[name] not in ("white", "black", "grey"):
            names.add(name)
            found.append(tuple(v / 255 for v in rgb))
        if len(found) == count:
            break
    return (found * count)[:count]


def _name(colour: Any) -> str:
    return COLOURS[colour_of(tuple(round(v * 255) for v in colour[:3]))]  # type: ignore[arg-type]


def chart(rng: Generator, split: str) -> tuple[Image.Image, tuple[Turn, ...]]:
    """One chart, its axes, title, legend and labels of values as chance has it."""
    import matplotlib
    from matplotlib import font_manager, style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    things = Things(rng, split)
    count = int(rng.integers(3, 9))
    names, topic = _categories(rng, things, count), things.topic()
    count = len(names)
    kind = pick(rng, KINDS)
    faces = pick(rng, kins(split))
    font = font_manager.FontProperties(
        fname=pick(rng, [f for f in faces if not f.path.endswith("woff")] or [_fallback(split, rng)]).path
    )
    chosen: dict[Any, Any] = {
        key: value for key, value in style.library.get(pick(rng, STYLES[split]), {}).items() if key in RULES
    }
    chosen |= {"font.size": float(rng.uniform(8, 13)), "axes.unicode_minus": False}
    with matplotlib.rc_context(chosen):
        width, height = rng.uniform(3.6, 6.4), rng.uniform(3.0, 4.8)
        figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        title = f"{topic} {pick(rng, ('by', 'per', 'in'))} {things.pick('cities')}" if rng.random() < 0.75 else ""
        ask = _drawn(rng, axes, kind, names, things, topic, font)
        if title:
            axes.set_title(title, fontproperties=font, fontsize=float(rng.uniform(11, 16)))
            ask.append(
                turn(rng, ("What is the title?", "What is the title of the chart?", "What is the chart about?"), title)
            )
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_fontproperties(font)
        file = BytesIO()
        figure.savefig(file, format="png")
    image = Image.open(file).convert("RGB")
    return worn(image, rng, 0.6), some(rng, ask, 6)


def _fallback(split: str, rng: Generator) -> Any:
    every = [face for faces in kins(split) for face in faces if not face.path.endswith("woff")]
    return pick(rng, every)


def _drawn(rng: Generator, axes: Any, kind: str, names: list[str], things: Things, topic: str, font: Any) -> list[Turn]:
    """Draws into axes; the questions."""
    if kind in ("lines", "groups"):
        return _several(rng, axes, kind, names, things, font)
    told = rng.random() < 0.5
    values = _values(rng, len(names), exact=told)
    one = rng.random() < 0.5
    colours = _named_colours(rng, len(names))
    colours = [colours[0]] * len(names) if one else colours
    what = {"bars": "bar", "sideways": "bar", "pie": "slice", "line": "point"}[kind]
    if kind == "pie":
        total = sum(values)
        values = [round(100 * value / total, 1) for value in values]
        axes.pie(values, labels=names, colors=colours if not one else None, startangle=float(rng.uniform(0, 360)),
                 autopct="%1.1f%%" if told else None, textprops={"fontproperties": font})  # fmt: skip
    elif kind == "line":
        axes.plot(
            names, values, color=colours[0], marker=pick(rng, ("o", "s", "", "^")), linewidth=float(rng.uniform(1, 4))
        )
    elif kind == "bars":
        axes.bar(names, values, color=colours, width=float(rng.uniform(0.4, 0.9)))
    else:
        axes.barh(names, values, color=colours, height=float(rng.uniform(0.4, 0.9)))
    if kind != "pie":
        axes.set_ylim(0, max(values) * 1.15) if kind != "sideways" else axes.set_xlim(0, max(values) * 1.15)
        if told:
            for place, value in enumerate(values):
                spot = (value, place) if kind == "sideways" else (place, value)
                axes.annotate(_plain(value), spot, (3, 0) if kind == "sideways" else (0, 3), textcoords="offset points",
                              ha="left" if kind == "sideways" else "center", va="center" if kind == "sideways" else "bottom",
                              fontproperties=font)  # fmt: skip
        (axes.set_xlabel if kind == "sideways" else axes.set_ylabel)(topic, fontproperties=font)
        if kind != "sideways" and max(map(len, names)) * len(names) > 36:
            axes.tick_params(axis="x", rotation=int(pick(rng, (30, 45, 90))))
        if kind == "sideways" and rng.random() < 0.5:
            axes.invert_yaxis()
    best, worst = names[int(np.argmax(values))], names[int(np.argmin(values))]
    ask = [
        turn(rng, ("Which {what} is the highest?", "Which one is the largest?", "What has the highest value?",
                   "Which one is the biggest?"), best, what=what),
        turn(rng, ("Which {what} is the lowest?", "Which one is the smallest?", "What has the lowest value?"), worst, what=what),
        turn(rng, ("How many {what}s are there?", "How many {what}s does the chart have?"), len(names), what=what),
        turn(rng, ("What kind of chart is this?", "Which type of chart is it?"),
             {"pie": "pie chart", "line": "line chart"}.get(kind, "bar chart"), {"pie": "pie", "line": "line"}.get(kind, "bar")),
    ]  # fmt: skip
    for place in rng.permutation(len(names))[:2].tolist():
        ways = (_plain(values[place]), f"{values[place]}%") if kind == "pie" else (_plain(values[place]),)
        if told or kind != "pie":
            ask.append(turn(rng, ("What is the value of {name}?", "How much is {name}?", "What value does {name} have?",
                                  "Read the value of {name}."), *ways, name=names[place]))  # fmt: skip
        if kind in ("bars", "sideways") and not one:
            ask.append(turn(rng, ("What colour is the bar of {name}?", "Which colour does {name} have?"),
                            _name(colours[place]), name=names[place]))  # fmt: skip
    first, second = (int(place) for place in rng.permutation(len(names))[:2])
    if abs(values[first] - values[second]) > 0.05 * max(values):
        ask.append(
            turn(
                rng,
                ("Is {a} higher than {b}?", "Is {a} larger than {b}?", "Does {a} have more than {b}?"),
                "Yes" if values[first] > values[second] else "No",
                a=names[first],
                b=names[second],
            )
        )
        larger = names[first if values[first] > values[second] else second]
        ask.append(turn(rng, ("Which is larger, {a} or {b}?", "Which has more: {a} or {b}?"), larger,
                        a=names[first], b=names[second]))  # fmt: skip
    if kind in ("line", "bars", "sideways"):
        ask.append(turn(rng, ("What does the axis with the numbers show?", "What is measured?"), topic))
    return ask


def _several(rng: Generator, axes: Any, kind: str, names: list[str], things: Things, font: Any) -> list[Turn]:
    """Two or three series with a legend."""
    count = int(rng.integers(2, 4))
    series = things.distinct(count, lambda: pick(rng, (things.pick("first"), things.pick("countries"))))
    values = [_values(rng, len(names)) for _ in series]
    peak = max(max(own) for own in values)
    values = [
        [float(round(value * peak / max(own))) if max(own) < peak / 4 else value for value in own] for own in values
    ]
    colours = _named_colours(rng, count)
    for number, (label, own, colour) in enumerate(zip(series, values, colours, strict=True)):
        if kind == "lines":
            axes.plot(
                names,
                own,
                color=colour,
                label=label,
                marker=pick(rng, ("o", "", "s")),
                linewidth=float(rng.uniform(1, 4)),
            )
        else:
            wide = 0.8 / count
            axes.bar(np.arange(len(names)) + (number - (count - 1) / 2) * wide, own, wide, color=colour, label=label)
    if kind == "groups":
        axes.set_xticks(np.arange(len(names)), names)
    if max(map(len, names)) * len(names) > 36:
        axes.tick_params(axis="x", rotation=int(pick(rng, (30, 45, 90))))
    axes.legend(prop=font, loc="best")
    what = "line" if kind == "lines" else "bar"
    ask = [turn(rng, ("How many {what}s are in the legend?", "How many series does the chart show?"), count, what=what)]
    for label, own, colour in zip(series, values, colours, strict=True):
        ask.append(
            turn(rng, ("What colour is {label}?", "Which colour stands for {label}?"), _name(colour), label=label)
        )
        ask.append(
            turn(
                rng,
                ("Which series is {colour}?", "What does the {colour} colour stand for?"),
                label,
                colour=_name(colour),
            )
        )
        ask.append(turn(rng, ("Where is {label} highest?", "At which place does {label} have its highest value?"),
                        names[int(np.argmax(own))], label=label))  # fmt: skip
        place = int(rng.integers(len(names)))
        ask.append(turn(rng, ("What is the value of {label} at {name}?", "How much is {label} for {name}?"), _plain(own[place]),
                        label=label, name=names[place]))  # fmt: skip
    place = int(rng.integers(len(names)))
    here = [own[place] for own in values]
    if sorted(here)[-1] - sorted(here)[-2] > 0.06 * max(here):
        ask.append(
            turn(
                rng,
                ("Which is higher at {name}?", "What leads at {name}?"),
                series[int(np.argmax(here))],
                name=names[place],
            )
        )
    return ask
