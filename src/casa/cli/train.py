"""`casa train`: runs a recipe: one for data of one's own, or casa-tiny's stages."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from casa.errors import UserError

if TYPE_CHECKING:
    from casa.training.own import RunRecipe
    from casa.training.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/lora-own-data.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<recipe> if left out.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: optimisation.steps=2000; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    until: Annotated[
        str | None,
        typer.Option(help="Last stage of casa-tiny's recipe to run: text, tower or fusion."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad record, by its line.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Open all that the run would, print the plan, draw the first batch; train nothing."
        ),
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="With --dry-run: where the batch is drawn.")] = None,
) -> None:
    """Train a model from a recipe: on your own data, or casa-tiny from its beginning.

    Example: casa train recipes/lora-own-data.yaml --set data.sources.0.path=pages.jsonl --dry-run

    casa-tiny's recipe goes on by itself where it stopped; others need --resume.
    """
    from casa.training.own import RunRecipe, open_recipe

    if picture is not None and not dry_run:
        raise UserError("--picture is for --dry-run; add it, or leave --picture out.")
    changes = [*(set_ or ()), *(["data.strict=true"] if strict else [])]
    chosen = open_recipe(recipe, changes)
    folder = out if out is not None else Path("runs") / recipe.stem
    if not isinstance(chosen, RunRecipe):
        _stages(chosen, folder, until, dry_run)
    elif until is not None:
        raise UserError("--until is for casa-tiny's recipe, which has stages; leave it out.")
    elif dry_run:
        _plan(chosen, folder, resume, picture if picture is not None else Path(f"{recipe.stem}-first-batch.png"))
    else:
        _run(chosen, folder, resume)


def _stages(recipe: "Recipe", folder: Path, until: str | None, dry_run: bool) -> None:
    from casa.cli.training_sources import training_sources
    from casa.training import STAGES, check_recipe
    from casa.training import train as run

    last = STAGES[-1] if until is None else until
    sources = training_sources()
    check_recipe(recipe, sources, last)
    if dry_run:
        for name in STAGES[: STAGES.index(last) + 1]:
            optimisation = getattr(recipe, name).optimisation
            print(f"{name}: {optimisation.steps:,} steps, rate {optimisation.rate:g}, muon {optimisation.muon:g}")
        return
    print(run(recipe, sources, folder, until=last, progress=print))


def _plan(recipe: "RunRecipe", folder: Path, resume: bool, picture: Path) -> None:
    from rich.console import Console

    from casa.atomic import check_writable
    from casa.cli.training_scores import scores_of
    from casa.training.own.first_pack import draw_first_pack
    from casa.training.own.model import outline
    from casa.training.own.plan import make_plan
    from casa.training.own.plan_table import tables
    from casa.training.own.preflight import check_run
    from casa.training.own.run import check_claim

    _quiet()
    check_writable(picture)
    console = Console(highlight=False)
    if not console.is_terminal:
        # in a file there is no edge to break lines at
        console = Console(width=140, highlight=False)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        check_claim(recipe, folder, resume)
    except UserError as error:
        # plans are looked at while the run goes on in its folder, too
        typer.echo(f"the run itself would not begin: {error}", err=True)
        resume = False
    if recipe.evaluation.tasks:
        scores_of(recipe.evaluation)
    check_run(recipe, folder, resume=resume, processes=processes, told=lambda text: typer.echo(text, err=True))
    plan = make_plan(recipe, processes)
    console.print(tables(plan))
    batch = draw_first_pack(recipe, outline(recipe), picture, told=lambda text: typer.echo(text, err=True))
    facts = batch.facts
    console.print(
        f"\nThe first pack has {facts['samples']:,} samples, {facts['images']:,} pictures, {facts['image_tokens']:,} "
        f"image and {facts['text_tokens']:,} text tokens, {facts['learned']:,} of them learned: drawn in {picture}"
    )


def _run(recipe: "RunRecipe", folder: Path, resume: bool) -> None:
    from casa.cli.training_scores import scores_of
    from casa.training.own import train_run

    _quiet()
    evaluate = scores_of(recipe.evaluation) if recipe.evaluation.tasks else None
    final = train_run(recipe, folder, resume=resume, evaluate=evaluate, told=lambda text: typer.echo(text, err=True))
    if final is not None and int(os.environ.get("RANK", "0")) == 0:
        print(final)


def _quiet() -> None:
    """transformers' own bars and reports are left out: casa shows its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
