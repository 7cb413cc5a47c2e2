"""`casa train` runs a recipe, `casa export` makes a model of a checkpoint."""

import atexit
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from casa.cli.options import DTYPES, console
from casa.errors import UserError


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/lora-own-data.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<recipe> if left out.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: optimisation.steps=2000; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad record, by its line.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Open all that the run would, print the plan, show the first batch; train nothing."
        ),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="With --dry-run: the HTML page of the first batch.")] = None,
) -> None:
    """Train a model on your own data, from a recipe.

    Example: casa train recipes/lora-own-data.yaml --set data.sources.0.path=pages.jsonl --dry-run
    """
    if report is not None and not dry_run:
        raise UserError("--report is for --dry-run; add it, or leave --report out.")
    changes = [*(set_ or ()), *(["data.strict=true"] if strict else [])]
    folder = out if out is not None else Path("runs") / recipe.stem
    import casa
    from casa.models.loading import quietly

    # transformers' own bars and reports are left out: casa shows its own
    with quietly(reports=False):
        if dry_run:
            page = report if report is not None else Path(f"{recipe.stem}-first-batch.html")
            _plan(recipe, changes, folder, resume, page)
            return
        final = casa.train(recipe, folder, resume, changes=changes, report=_tell)
    if final is not None and int(os.environ.get("RANK", "0")) == 0:
        print(final)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # a thread of gloo that lets go of its last tensor while the interpreter ends makes the process abort
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)


_tell = partial(typer.echo, err=True)


def _plan(file: Path, changes: list[str], folder: Path, resume: bool, report: Path) -> None:
    from casa.atomic import check_writable
    from casa.figures import check_page_path
    from casa.pipeline import recipe_scores
    from casa.training.config import open_recipe
    from casa.training.plan import check_run, make_plan, plan_tables, show_first_pack
    from casa.training.run import check_folder

    recipe = open_recipe(file, changes)
    check_writable(report)
    check_page_path(report)
    shown, processes = console(width=140), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        check_folder(recipe, folder, resume)
    except UserError as error:
        # plans are looked at while the run goes on in its folder, too
        _tell(f"the run itself would not begin: {error}")
        resume = False
    recipe_scores(recipe.evaluation)
    check_run(recipe, folder, resume=resume, processes=processes, on_message=_tell)
    plan = make_plan(recipe, processes)
    shown.print(plan_tables(plan))
    batch = show_first_pack(recipe, report, on_message=_tell)
    facts = batch.facts
    shown.print(
        f"\nThe first pack has {facts['samples']:,} samples, {facts['images']:,} pictures, {facts['image_tokens']:,} "
        f"image and {facts['text_tokens']:,} text tokens, {facts['learned']:,} of them learned: shown in {report}"
    )


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint-<step> of a run; with --merged a model.")],
    out: Annotated[Path, typer.Argument(help="The new model folder.")],
    ema: Annotated[bool, typer.Option("--ema", help="The running average instead of the last weights.")] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Of a model that names its backbone: the weights of both, whole.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; the checkpoint's if left out.")] = None,
) -> None:
    """Write a checkpoint's weights as one model: safetensors, config and processor, for from_pretrained.

    Example: casa export runs/mine/checkpoint-4000 ./my-casa

    Example: casa export --merged ./my-small-casa ./my-casa
    """
    import torch

    from casa.models.convert import merge
    from casa.models.loading import quietly
    from casa.training.models import export_checkpoint

    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; give one of: {', '.join(DTYPES)}.")
    narrow = getattr(torch, dtype) if dtype else None
    if merged:
        if ema:
            raise UserError("--ema is of a run's checkpoint; leave out --ema or --merged.")
        with quietly(reports=False):
            merge(str(checkpoint), out, narrow)
        print(f"{out}: {checkpoint} with its backbone's weights")
        return
    with quietly(reports=False):
        made = export_checkpoint(checkpoint, out, average=ema, dtype=narrow)
    print(f"{made}: the {'running average' if ema else 'weights'} of {checkpoint.name}")
