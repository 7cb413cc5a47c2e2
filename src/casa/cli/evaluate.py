"""`casa eval`: scores on the offline tasks, and on questions and answers of one's own."""

import json as json_module
from functools import partial
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
    Model,
    Out,
    Outside,
    Root,
    Shape,
    Subset,
    Temperature,
    TopK,
    TopP,
    Weights,
    console,
    name_bad,
    pairs,
    progress_line,
    table,
)
from casa.errors import UserError

if TYPE_CHECKING:
    from casa.evaluation import Summary

OFFLINE = ("pages", "scenes", "stream")


def evaluate(
    model: Model = "casa-tiny",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="pages, scenes, stream (all three if left out), or benchmarks: chartqa, docvqa, infovqa, ocrbench, "
            "textvqa, realworldqa, ai2d, gqa, mme, videomme, mvbench, nextqa, perceptiontest, mlvu; with commas."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Questions and answers of your own: a file, folder, glob or hub:owner/name. Of benchmarks, a copy of "
            "the set, or a folder with one for each; the hub if left out."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Of your own data: anls, relaxed, exact, vqa, cer, wer, contains, mcq, live, with commas."),
    ] = None,
    records: Annotated[Path | None, typer.Option(help="Write every answer and its scores here, as JSON lines.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the file of --records.")] = False,
    suffix: Annotated[
        str,
        typer.Option(help="Stands on a line of its own behind every question, in place of a benchmark's own words."),
    ] = "",
    template_arg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable of the chat template; repeatable.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered at once.")] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest answer; 64, or the benchmark's.")
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures, words and resamples.")] = 0,
    limit: Annotated[
        int | None,
        typer.Option(help="Pages, scenes, and numbers shown in streams (200 if left out); rows of other data."),
    ] = None,
    largest: Annotated[
        int | None, typer.Option(min=112, help="Longest side of a task's picture, in px; of a stream at least 224.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="Answers are judged too, by an OpenAI-compatible API: .../v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(help="Take out a part of the model: no-images, without-layers=3,4 ...; repeatable."),
    ] = None,
    shape: Shape = SHAPES[0],
    root: Root = None,
    outside: Outside = False,
    column: Column = None,
    fps: Annotated[float | None, typer.Option(help="Frames of a video looked at per second; 2, benchmarks' 1.")] = None,
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="Of a video; a longer one is looked at less often. 480, benchmarks' 64.")
    ] = None,
    split: DataSplit = "train",
    subset: Subset = None,
    image_cache: ImageCache = "off",
    cluster: Annotated[
        str | None,
        typer.Option(help="Workers of Ray answer --data or benchmarks: a cluster's address, auto, or local."),
    ] = None,
    device: Device = "auto",
    weights: Weights = "own",
    json: Json = False,
    out: Out = None,
) -> None:
    """Score a model on your own questions and answers, on benchmarks by name, or on the offline tasks, drawn from
    handwriting and photographs that were never trained on.

    Example: casa eval casa-tiny --tasks pages,scenes --seed 7 --limit 100 --json

    Example: casa eval casa-tiny --data qa.jsonl --metric anls,exact --records answers.jsonl

    Example: casa eval ./my-casa --tasks chartqa,docvqa --data ./benchmarks --records answers.jsonl
    """
    given = {"fps": fps, "max_frames": max_frames, "root": root}
    source = {name: value for name, value in given.items() if value is not None} | {"outside": outside}
    own = {"path": data, "shape": shape, "split": split, "subset": subset}
    own |= {"columns": pairs(column, "--column", "image=photo")}
    template = {name: _value(text) for name, text in pairs(template_arg, "--template-arg", "thinking=false").items()}
    asked: dict[str, Any] = {"suffix": suffix, "template": template, "batch_size": batch_size, "seed": seed}
    asked |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "records": records, "resume": resume}
    asked |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    if (judge is None) != (judge_model is None):
        raise UserError("--judge and --judge-model go together; give both, or leave both out.")
    names, benchmarks = _check(tasks, data, metric, records, resume, ablate or [])
    if cluster is not None and {*names} & {*OFFLINE}:
        raise UserError("--cluster is for --data or benchmarks; name them, or leave --cluster out.")
    import casa
    from casa.atomic import write_text
    from casa.provenance import provenance

    if judge is not None and judge_model is not None:
        from casa.evaluation.judge import Judge

        asked["judge"] = Judge(judge, judge_model)
        if not {*names} - {*OFFLINE}:
            raise UserError("--judge is for --data or benchmarks; name them, or leave --judge out.")
    told: dict[str, Any] = {"eval": model, "seed": seed, **({} if data is None else {"data": data})}
    told |= ({"ablate": ablate} if ablate else {}) | ({} if weights == "own" else {"weights": weights})
    scores: dict[str, Any] = {}
    summaries: dict[str, Summary] = {}
    load = partial(casa.load, model, device=device, weights=weights, image_cache=image_cache)
    if cluster is not None:
        asked |= {"cluster": cluster, "load": load}
        load = partial(load, device="cpu")  # here nothing is answered
    eyes = load()
    for name in names:
        if name in OFFLINE:
            how = {"seed": seed, "limit": 200 if limit is None else limit, "largest": largest, "ablate": ablate or ()}
            with progress_line("{}: {} of {}") as show:
                scores |= casa.evaluate(eyes, [name], **how, progress=show)
            continue
        with progress_line("{:,} answered", f"{name if data is None else data}: ") as show:
            ask = eyes.evaluator(limit=limit, progress=show, ablate=ablate or (), **asked)
            if name == "data":
                summary = ask.on_data(own | source, (metric or "").split(","))
            else:
                summary = ask.on_task(name, data, source, alone=len(benchmarks) == 1)
        summaries[name], scores[name] = summary, summary.scores()
    told |= {"limit": 200 if limit is None and not summaries else limit} | ({"largest": largest} if largest else {})
    told |= {"bad": {name: dict(one.bad) for name, one in summaries.items()}} if summaries else {}
    if out is not None:
        record = {**told, **provenance(str(eyes.model.device), model), "scores": scores}
        write_text(out, json_module.dumps(record, indent=2) + "\n")
    for summary in summaries.values():
        name_bad(summary.named, ", which are in --records FILE")
    if json:
        print(json_module.dumps(scores))
    else:
        for name, values in scores.items():
            if name in summaries:
                _show(summaries[name], data if name == "data" and data is not None else name)
            else:
                print(f"{name:8} " + "  ".join(f"{k} {v:.3f}" if k != "n" else f"n {v:g}" for k, v in values.items()))
    if empty := [name for name, summary in summaries.items() if not summary.questions]:
        raise UserError(f"No question was asked of {', '.join(empty)}: the data has none, or see what is said above.")


def _check(
    tasks: str | None, data: str | None, metric: str | None, records: Path | None, resume: bool, ablate: list[str]
) -> tuple[list[str], list[str]]:
    """What is asked, in order ("data" for one's own), and which of it are benchmarks.

    What is wrong with the options is said before a model is read.
    """
    from casa.evaluation.metrics import check_metrics
    from casa.evaluation.offline_tasks import check_tasks
    from casa.evaluation.standard import STANDARD

    if ablate:
        from casa.analysis import parse_ablation

        for name in ablate:
            parse_ablation(name)
    if resume and records is None:
        raise UserError("--resume goes on with the file of --records; name it.")
    if tasks is None and data is not None:
        check_metrics([] if metric is None else metric.split(","))
        return ["data"], []
    names = check_tasks(OFFLINE if tasks is None else tasks.split(","), STANDARD)
    benchmarks = [name for name in names if name in STANDARD]
    if metric is not None:
        raise UserError("--metric is for --data of your own; name a file of questions, or leave --metric out.")
    if not benchmarks and records is not None:
        raise UserError("--records is for --data or benchmarks; name them, or leave --records out.")
    if data is not None and len(benchmarks) < len(names):
        raise UserError("pages, scenes and stream have data of their own; leave them or --data out.")
    return names, benchmarks


def _value(text: str) -> Any:
    """A template's variable: what JSON reads, else the text itself."""
    try:
        return json_module.loads(text)
    except ValueError:
        return text


def _show(summary: "Summary", data: str) -> None:
    from rich.text import Text

    bad = sum(summary.bad.values())
    rate = f", {summary.questions / summary.seconds:.2f} a second" if summary.seconds else ""
    shown = console(width=120)
    shown.print(Text(f"{data}: {summary.questions:,} questions{rate}; {bad:,} bad records"), soft_wrap=True)
    found = table("metric", "score", "95 % interval", "questions")
    for name, one in summary.metrics.items():
        found.add_row(name, f"{one.score:.4f}", f"{one.low:.4f} to {one.high:.4f}", f"{one.n:,}")
    for name, score in summary.more.items():
        found.add_row(name, f"{score:.4f}")
    shown.print(found)
