"""Writes docs/results/claims.md and its plots from the records: `python -m projects.study.page`.

python -m projects.study.page --runs runs/study     takes over the records of finished runs first
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml

from casa.atomic import write_text
from casa.errors import UserError
from casa.figures import write_png
from projects.study.plots import PLOTS, curves
from projects.study.records import ALIKE, LEAST_SEEDS, RESAMPLES, Difference, Records, points, rights_of

ROOT = Path(__file__).resolve().parents[2]
PAGE, RECORDS = ROOT / "docs" / "results" / "claims.md", ROOT / "docs" / "results" / "study"
CLAIMS, BUDGET = Path(__file__).with_name("claims.yaml"), Path(__file__).with_name("budget.md")
# by the beginning of their names, and what they were asked on the way
PILOTS = {
    "pilot": ("pages", "scenes", "charts", "midway", "spoken"),
    "real-pilot": ("number", "easy_vqa"),
}

_HEAD = """# What is true of CASA

The paper's claims, measured on small models. **A command writes this page from records; what it calls open has not been
measured enough to say anything.** Every run is in `study/`, with its commit, versions, seconds, loss curve and the
answer to every question.

```
python -m projects.study runs/study --study projects/study/small.yaml --jobs 2   # goes on after any stop
python -m projects.study.page --runs runs/study                                  # this page
```

{facts}

How to read it: a score is the share of held-out questions that greedy decoding answers word for word, as the mean over
seeds (least to greatest). A difference is in points, on the same questions, with the 95 % interval of {resamples:,}
resamples of the questions. It is "better" or "worse" where the interval leaves out zero and all seeds agree, "no
difference" where the interval is within {alike:.0f} points of zero and no seed is far from it, and else "unsettled". Of
fewer than {seeds} seeds nothing is said. Handwriting and photographs of the questions were never trained on.

Memory and latency (C5, C6) are measured by `casa bench` and stand in the README; here operations and seconds of a run
stand beside its scores. The real scale, a language model of 135 million parameters on printed numbers and easy-VQA, is
written as a study and has not been run; nothing here speaks of it.
"""


def write_page(records_folder: Path = RECORDS, page: Path = PAGE, plots: bool = True) -> None:
    """Writes the page, and beside the records the plot of each section that has runs."""
    records, sections = Records(records_folder), read_claims()
    write_text(page, text_of(records, sections, records_folder.name))
    for section in sections if plots else ():
        if any(records.seeds(name) for name in section["rows"]):
            write_png(PLOTS[section["plot"]](records, section), records_folder / f"{section['id']}.png")
            write_png(curves(records, section), records_folder / f"{section['id']}-curves.png")


def read_claims() -> list[dict[str, Any]]:
    """The sections, as claims.yaml has them."""
    return yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))


def text_of(records: Records, sections: Sequence[Mapping[str, Any]], folder: str) -> str:
    """The whole page."""
    head = _HEAD.format(facts=_facts(records), resamples=RESAMPLES, alike=100 * ALIKE, seeds=LEAST_SEEDS)
    bodies = ["\n\n".join(_section(records, section, folder)) for section in sections]
    return "\n\n".join([head.strip(), _budget(records), _summary(records, sections), *bodies]) + "\n"


def _budget(records: Records) -> str:
    """How long the runs are, and the pilots that it was found by."""
    told = [BUDGET.read_text(encoding="utf-8").strip()]
    for pilot, tasks in PILOTS.items():
        rows = [
            row
            for name in sorted(records.runs)
            if name.startswith(f"{pilot}-")
            for record in records.of(name)
            for row in _on_the_way(record, tasks)
        ]
        if rows:
            told.append("\n".join([_row(["% right", "step", *tasks], head=True), *rows]))
    return "\n\n".join(told)


def _on_the_way(record: Mapping[str, Any], tasks: Sequence[str]) -> Iterator[str]:
    """Rows of a table: what a run answered on the way, and at its end."""
    name, steps = f"`{record['run']['name']}`", record["run"]["budget"]["steps"]
    for step, found in sorted(record["on_the_way"].items(), key=lambda entry: int(entry[0])):
        yield _row([name, f"{step} of {steps}", *(f"{100 * found['scores'][task]:.1f}" for task in tasks)])
    yield _row([name, f"{steps}", *(f"{100 * float(rights_of(record, (task,)).mean()):.1f}" for task in tasks)])


def _facts(records: Records) -> str:
    every = [record for name in records.runs for record in records.of(name)]
    if not every:
        return "No run is done yet."
    commits = sorted({record["commit"] for record in every if record["commit"]})
    torch = sorted({record["versions"]["torch"] for record in every})
    hours = sum(record["seconds"] for record in every) / 3600
    return (
        f"Done so far: {len(every)} runs of {len(records.runs)} models, {hours:.1f} hours of training on one thread "
        f"each; commit {', '.join(commits)}, torch {', '.join(torch)}."
    )


def _summary(records: Records, sections: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| | claim | found so far |", "|---|---|---|"]
    return "\n".join(lines + [f"| {s['id']} | {s['title']} | {' '.join(_found(records, s))} |" for s in sections])


def _found(records: Records, section: Mapping[str, Any]) -> list[str]:
    """One sentence for each comparison, on the last column, or that nothing can be said."""
    sentences = []
    for one, other, column, gap in _gaps(records, section, section["compared_on"][-1:]):
        if len(gap.seeds) >= LEAST_SEEDS:
            figures = f"{_signed(gap.mean)} [{_signed(gap.low)}, {_signed(gap.high)}]"
            sentences.append(f"{one} against {other} on {column}: {figures}, {gap.reading}.")
    return sentences or ["Open: fewer than three seeds."]


def _verdict(records: Records, section: Mapping[str, Any]) -> str | None:
    """The section's verdict, its figures those of the records; None while one of them is not of enough seeds.

    `{casa - insertion on charts}` is a difference in points with its interval, `{itself of casa}` by block the factor
    by which attention to itself is above that to one image token.
    """
    known: dict[str, str] = {}
    for one, other, column, gap in _gaps(records, section, section["compared_on"]):
        if len(gap.seeds) >= LEAST_SEEDS:
            figures = f"{_signed(gap.mean)}, {_signed(gap.low)} to {_signed(gap.high)}"
            known[f"{one.strip('`')} - {other.strip('`')} on {column}"] = figures
    for name in section["rows"]:
        seen = [found["attention"]["gate_log10"] for found in records.of(name) if "attention" in found]
        if len(seen) >= LEAST_SEEDS:
            factors = 10 ** np.array(seen, dtype=float).mean(axis=(0, 2))
            known[f"itself of {name}"] = ", ".join(f"{factor:.2g}" for factor in factors)
    text = section.get("verdict", "")
    named = re.findall(r"\{(.*?)\}", text)
    return re.sub(r"\{(.*?)\}", lambda found: known[found[1]], text) if {*named} <= {*known} and text else None


def _gaps(
    records: Records, section: Mapping[str, Any], columns: Sequence[str]
) -> Iterator[tuple[str, str, str, Difference]]:
    """Every comparison of a section that there are records for: of runs, and of one run without this or that part."""
    parts = section.get("parts", {})
    pairs: list[tuple[str, str, str, str, tuple[str | None, str | None]]] = [
        (f"`{one}`", f"`{other}`", one, other, (None, None)) for one, other in section["compare"]
    ]
    run = parts.get("run", "")
    pairs += [(one, other, run, run, (one, other)) for one, other in parts.get("compare", [])]
    for shown, beside, one, other, of in pairs:
        for column in columns:
            gap = records.difference(one, other, column, of)
            if gap is not None:
                yield shown, beside, column, gap


def _section(records: Records, section: Mapping[str, Any], folder: str) -> Iterator[str]:
    yield f"## {section['id']}: {section['title']}"
    yield f"The claim: {section['says']}\n\nThe paper's figure: {section['paper']}"
    if verdict := _verdict(records, section):
        yield f"**The verdict so far: {verdict}**"
    if note := section.get("note"):
        yield note
    rows = [name for name in section["rows"] if records.seeds(name)]
    missing = [name for name in section["rows"] if len(records.seeds(name)) < LEAST_SEEDS]
    if rows:
        yield _scores_table(records, rows, section["columns"])
    if parts := section.get("parts"):
        yield from _parts(records, parts, section["columns"])
    if gaps := _gaps_table(records, section):
        yield gaps
    if rows:
        yield f"![{section['title']}]({folder}/{section['id']}.png)"
        yield f"![While they were trained]({folder}/{section['id']}-curves.png)"
    if missing:
        yield f"Still open: {', '.join(f'`{name}` ({len(records.seeds(name))} of 3 seeds)' for name in missing)}."
    yield f"What would overturn it: {section['overturn']}"


def _scores_table(records: Records, rows: Sequence[str], columns: Sequence[str]) -> str:
    found = [_row(["% right", "seeds", "trained", "GFLOP a step", "s of CPU", *columns], head=True)]
    for name in rows:
        runs = records.of(name)
        seconds = sum(record["cpu_seconds"] for record in runs) / len(runs)
        cells = [f"`{name}`", f"{len(runs)}", f"{runs[0]['parameters']['trained'] / 1e6:.2f} M"]
        cells += [f"{runs[0]['step_gflop']:.1f}", f"{seconds:.0f}"]
        found.append(_row([*cells, *(points(records.scores(name, column)) for column in columns)]))
    return "\n".join(found)


def _row(cells: Sequence[str], head: bool = False) -> str:
    line = f"| {' | '.join(cells)} |"
    return f"{line}\n{'|---' * len(cells)}|" if head else line


def _parts(records: Records, parts: Mapping[str, Any], columns: Sequence[str]) -> Iterator[str]:
    """A trained model without some of its parts, on fewer questions."""
    run = parts["run"]
    if not any("ablations" in record for record in records.of(run)):
        return
    lines = [_row([f"`{run}`, % right", *columns], head=True)]
    lines += [
        _row([name, *(points(records.scores(run, column, name)) for column in columns)]) for name in parts["names"]
    ]
    yield "What is left when parts are taken out of the trained model, on the first 60 questions of a task:"
    yield "\n".join(lines)


def _gaps_table(records: Records, section: Mapping[str, Any]) -> str:
    lines = []
    for one, other, column, gap in _gaps(records, section, section["compared_on"]):
        between, by_seed = f"{_signed(gap.low)} to {_signed(gap.high)}", ", ".join(map(_signed, gap.seeds))
        lines.append(_row([f"{one} − {other}", column, _signed(gap.mean), between, by_seed, gap.reading]))
    head = _row(["difference, points", "on", "mean", "95 %", "by seed", "reading"], head=True)
    return "\n".join([head, *lines]) if lines else ""


def _signed(share: float) -> str:
    value = round(100 * share, 1) + 0.0
    return f"{value:+.1f}" if value else "0.0"


def take_over(runs: Path, records_folder: Path) -> int:
    """Copies the records of finished runs; returns how many there are."""
    found = sorted((runs / "records").glob("*.json"))
    if not found:
        raise UserError(f"{runs} holds no record of a finished run; give the folder of a study's runs.")
    records_folder.mkdir(parents=True, exist_ok=True)
    for path in found:
        json.loads(path.read_text(encoding="utf-8"))
        shutil.copyfile(path, records_folder / path.name)
    return len(found)


def main(
    runs: Annotated[Path | None, typer.Option(help="Folder of a study's runs, whose records are taken over.")] = None,
    records: Annotated[Path, typer.Option(help="Folder of records and plots.")] = RECORDS,
    page: Annotated[Path, typer.Option(help="The page.")] = PAGE,
) -> None:
    """Write the page of claims from records."""
    try:
        if runs is not None:
            print(f"{take_over(runs, records)} records")
        write_page(records, page)
    except UserError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
