"""`casa eval`: scores on the offline tasks, on handwriting and photographs that were never trained on."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or casa-tiny.")] = "casa-tiny",
    tasks: Annotated[
        str, typer.Option(help="pages, scenes, stream: any of them, with commas.")
    ] = "pages,scenes,stream",
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures.")] = 0,
    limit: Annotated[int, typer.Option(help="Pages, scenes, and numbers shown in streams.")] = 200,
    largest: Annotated[
        int | None,
        typer.Option(min=112, help="Longest side of a picture, in px; of a stream at least 224."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the scores here, with commit, versions and seed.")] = None,
) -> None:
    """Score a model on the offline tasks.

    Example: casa eval casa-tiny --tasks pages,scenes --seed 7 --limit 100 --json
    """
    from casa.atomic import check_writable, write_text
    from casa.evaluation.answering import answerer
    from casa.evaluation.runner import check_tasks
    from casa.evaluation.runner import evaluate as score
    from casa.provenance import provenance
    from casa.streaming import StreamingSession

    names = check_tasks(tasks.split(","))
    check_writable(out)
    from casa.models.auto import load_pretrained

    loaded, processor = load_pretrained(model, device)
    shown = sys.stderr.isatty()

    def progress(task: str, done: int, total: int) -> None:
        if shown:
            print(f"\r{task}: {done} of {total} ", end="\n" if done >= total else "", file=sys.stderr, flush=True)

    scores = score(
        names,
        answerer(loaded, processor),
        lambda: StreamingSession(loaded, processor),
        seed=seed,
        limit=limit,
        largest=largest,
        progress=progress,
    )
    if out is not None:
        given = {"eval": model, "seed": seed, "limit": limit, **({"largest": largest} if largest is not None else {})}
        record = {**given, **provenance(str(loaded.device), model), "scores": scores}
        write_text(out, json_module.dumps(record, indent=2) + "\n")
    if json:
        print(json_module.dumps(scores))
        return
    for task, values in scores.items():
        print(f"{task:8} " + "  ".join(f"{k} {v:.3f}" if k != "n" else f"n {v:g}" for k, v in values.items()))
