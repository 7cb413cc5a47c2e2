"""`casa eval`: scores on the offline tasks, and on questions and answers of one's own."""

import json as json_module
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casa.cli.options import (
    SHAPES,
    Column,
    DataSplit,
    Device,
    ImageCache,
    Json,
    MaxNewTokens,
    Model,
    Out,
    Outside,
    Root,
    Shape,
    Subset,
    Temperature,
    TopK,
    TopP,
    VideoFps,
    console,
    pairs,
)
from casa.errors import UserError

if TYPE_CHECKING:
    from casa.evaluation import Summary

_LISTED = 5  # bad records that are named on the terminal


def evaluate(
    model: Model = "casa-tiny",
    tasks: Annotated[
        str | None, typer.Option(help="pages, scenes, stream: any of them, with commas; all if left out.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Questions and answers of your own: a file, folder, glob or hub:owner/name.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Of --data: anls, relaxed, exact, vqa, cer, wer, contains, mcq, with commas.")
    ] = None,
    records: Annotated[Path | None, typer.Option(help="Write every answer and its scores here, as JSON lines.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the file of --records.")] = False,
    suffix: Annotated[str, typer.Option(help="Stands on a line of its own behind every question.")] = "",
    template_arg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable of the chat template; repeatable.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered at once.")] = 16,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures, words and resamples.")] = 0,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Pages, scenes, and numbers shown in streams (200 if left out); rows of --data."),
    ] = None,
    largest: Annotated[
        int | None,
        typer.Option(min=112, help="Longest side of a task's picture, in px; of a stream at least 224."),
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(help="Take out a part of the model: no-images, without-layers=3,4 ...; repeatable."),
    ] = None,
    shape: Shape = SHAPES[0],
    root: Root = None,
    outside: Outside = False,
    column: Column = None,
    fps: VideoFps = 2.0,
    split: DataSplit = "train",
    subset: Subset = None,
    image_cache: ImageCache = "off",
    device: Device = "auto",
    json: Json = False,
    out: Out = None,
) -> None:
    """Score a model on the offline tasks, drawn from handwriting and photographs that were never trained on; or on your
    own questions and answers.

    Example: casa eval casa-tiny --tasks pages,scenes --seed 7 --limit 100 --json

    Example: casa eval casa-tiny --data qa.jsonl --metric anls,exact --records answers.jsonl
    """
    source = {"path": data, "shape": shape, "root": root, "outside": outside, "fps": fps, "split": split}
    source |= {"subset": subset, "columns": pairs(column, "--column", "image=photo")}
    template = {name: _value(text) for name, text in pairs(template_arg, "--template-arg", "thinking=false").items()}
    asked = {"suffix": suffix, "template": template, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    asked |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    _check(tasks, data, metric, records, resume, ablate or [])
    import casa
    from casa.atomic import write_text
    from casa.pipeline import score_data
    from casa.provenance import provenance

    told: dict[str, Any] = {"eval": model, "seed": seed, **({"ablate": ablate} if ablate else {})}
    with ExitStack() as around:
        eyes = casa.load(model, device=device, image_cache=image_cache)
        if data is not None:
            shown = around.enter_context(_Shown(data))
            summary = score_data(
                eyes,
                source,
                (metric or "").split(","),
                **{
                    "records": records,
                    "resume": resume,
                    "limit": limit,
                    "progress": shown.answered,
                    "ablate": ablate or (),
                },
                **asked,
                seed=seed,
            )
            scores = {"data": summary.scores()}
            told |= {"data": data, "limit": limit, "bad": summary.bad}
        else:
            names = None if tasks is None else tasks.split(",")
            limit = 200 if limit is None else limit
            scores = casa.evaluate(
                eyes, names, seed=seed, limit=limit, largest=largest, ablate=ablate or (), progress=_progress
            )
            told |= {"limit": limit, **({"largest": largest} if largest is not None else {})}
    if out is not None:
        record = {**told, **provenance(str(eyes.model.device), model), "scores": scores}
        write_text(out, json_module.dumps(record, indent=2) + "\n")
    if data is not None:
        _name_bad(summary)
    if json:
        print(json_module.dumps(scores))
    elif data is not None:
        _show(summary, data)
    else:
        for task, values in scores.items():
            print(f"{task:8} " + "  ".join(f"{k} {v:.3f}" if k != "n" else f"n {v:g}" for k, v in values.items()))


def _check(
    tasks: str | None, data: str | None, metric: str | None, records: Path | None, resume: bool, ablate: list[str]
) -> None:
    """What is wrong with the options is said before a model is read."""
    from casa.evaluation.metrics import check_metrics
    from casa.evaluation.runner import TASKS, check_tasks

    if ablate:
        from casa.analysis import parse_ablation

        for name in ablate:
            parse_ablation(name)
    if data is None:
        for option, given in (("--metric", metric), ("--records", records), ("--resume", resume or None)):
            if given is not None:
                raise UserError(f"{option} is for --data; name a file of questions, or leave {option} out.")
        check_tasks(TASKS if tasks is None else tasks.split(","))
        return
    if tasks is not None:
        raise UserError("--tasks have data of their own; leave out --tasks or --data.")
    if resume and records is None:
        raise UserError("--resume goes on with the file of --records; name it.")
    check_metrics([] if metric is None else metric.split(","))


def _value(text: str) -> Any:
    """A template's variable: what JSON reads, else the text itself."""
    try:
        return json_module.loads(text)
    except ValueError:
        return text


def _progress(task: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{task}: {done} of {total} ", end="\n" if done >= total else "", file=sys.stderr, flush=True)


class _Shown:
    """How many questions are answered, in a line that stays in place on a terminal."""

    def __init__(self, name: str) -> None:
        self._name, self._on = name, sys.stderr.isatty()

    def __enter__(self) -> "_Shown":
        return self

    def answered(self, done: int) -> None:
        if self._on:
            print(f"\r{self._name}: {done:,} answered ", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._on:
            print(file=sys.stderr)


def _name_bad(summary: "Summary") -> None:
    for sentence in summary.named[:_LISTED]:
        print(f"casa: {sentence}", file=sys.stderr)
    if len(summary.named) > _LISTED:
        print(f"casa: and {len(summary.named) - _LISTED:,} more, which are in --records FILE.", file=sys.stderr)


def _show(summary: "Summary", data: str) -> None:
    from rich.table import Table
    from rich.text import Text

    bad = sum(summary.bad.values())
    rate = f", {summary.questions / summary.seconds:.2f} a second" if summary.seconds else ""
    shown = console(width=120)
    shown.print(Text(f"{data}: {summary.questions:,} questions{rate}; {bad:,} bad records"), soft_wrap=True)
    table = Table("metric", box=None, pad_edge=False, header_style="dim")
    for name in ("score", "95 % interval", "questions"):
        table.add_column(name, justify="right")
    for name, one in summary.metrics.items():
        table.add_row(name, f"{one.score:.4f}", f"{one.low:.4f} to {one.high:.4f}", f"{one.n:,}")
    shown.print(table)
