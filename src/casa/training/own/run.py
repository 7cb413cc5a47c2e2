"""train_run: records -> samples -> packs -> CasaTrainer -> a model that from_pretrained takes.

out/recipe.yaml           what was asked for             out/checkpoint-500      to go on from
out/bad-records.jsonl     what could not be learned      out/tensorboard         curves while it runs
out/final                 model, processor, README.md    out/log.json            every line of the log
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, TrainerCallback

from casa.atomic import write_text
from casa.data import DataSettings, Records, Shard, open_records
from casa.errors import UserError
from casa.training.own.card import Facts, count_bad, write_card
from casa.training.own.lora import RECIPE
from casa.training.own.model import Loaded, load_model
from casa.training.own.preflight import check_run
from casa.training.own.rates import RecipeRates
from casa.training.own.recipe import RunRecipe, parse_run_recipe, run_recipe_values
from casa.training.packs import PackStream, StreamPosition
from casa.training.samples import SampleMaker, fold_of
from casa.training.seen.counts import made_of_records, trained_on
from casa.training.seen.evaluating import Evaluate, Evaluation
from casa.training.seen.measures import Measures
from casa.training.seen.progress import ProgressShown
from casa.training.seen.reporting import reporters
from casa.training.sharding import export_checkpoint
from casa.training.trainer import CasaTrainer, checkpoints, newest_checkpoint, parameter_groups, ranks

FINAL = "final"
# what may differ when a run is gone on with: nothing that was trained on, or that the model is
_MAY_CHANGE = ("watch", "loading", "saving", "logging", "evaluation", "device")
# of the optimisation, what a checkpoint's moments do not depend on
_MAY_VARY = (
    *("steps", "warmup", "decay", "decay_shape", "floor", "new_rate", "existing_rate"),
    *("clip", "checkpoint_blocks", "loss_chunk"),
)


@dataclass(frozen=True)
class OpenOwn:
    """Opens the records for one reader, in whichever process that is."""

    data: DataSettings
    seed: int
    report: str | None = None
    keep_frames: str | None = None

    def __call__(self, shard: Shard) -> Records:
        return open_records(self.data, seed=self.seed, shard=shard, report=self.report, keep_frames=self.keep_frames)


def train_run(
    recipe: RunRecipe,
    out: str | Path,
    *,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    told: Callable[[str], None] | None = None,
) -> Path | None:
    """Trains, and returns the folder of the finished model, `out/final`; None if SIGTERM ended the run.

    Whatever the run will open is opened before its first step (`check_run`), and before anything is written.
    resume: go on from the newest checkpoint in `out`; without it, `out` must be new or empty. evaluate: measures a
    model now and then (`recipe.evaluation`). told: is told what is done besides steps. Under torchrun, every process
    calls this.
    Raises UserError for what is not there or does not fit, and as `CasaTrainer.train` does.
    """
    out = Path(out)
    first = int(os.environ.get("RANK", "0")) == 0
    say = told if told is not None and first else _silent
    if first:
        check_claim(recipe, out, resume)
        check_run(recipe, out, resume=resume, processes=int(os.environ.get("WORLD_SIZE", "1")), told=say)
        claim(recipe, out, resume)
    say(f"reading {recipe.model.source}")
    loaded = load_model(recipe)
    stream = open_stream(recipe, loaded, out)
    for note in stream.maker.notes:
        say(note)
    # held in the order in which they are asked: what measures comes before what shows
    measures, shown = Measures(recipe.packing.budget), ProgressShown()
    evaluation = _evaluation(recipe, loaded, measures, evaluate)
    seen = [
        RecipeRates(recipe.optimisation),
        measures,
        evaluation,
        *reporters(recipe.logging.to, out),
        shown,
        *callbacks,
    ]
    trainer = CasaTrainer(
        loaded.model,
        stream,
        recipe.trainer_settings(str(out)),
        processor=loaded.processor,
        callbacks=seen,
        run_name=recipe.name,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in (measures, evaluation, shown):
        callback.trainer = trainer
    if resume and first:
        last = newest_checkpoint(out)
        say(f"going on from {last.name}" if last is not None else "there is no checkpoint yet: starting at step 0")
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    finally:
        shown.close()
    if trainer.stopped:
        say(f"stopped at step {trainer.state.global_step}; --resume goes on from there")
        return None
    positions = ranks.of_all_ranks(trainer.position)
    if first:
        _finish(recipe, trainer, positions, evaluation, out)
    return out / FINAL


def claim(recipe: RunRecipe, out: Path, resume: bool) -> None:
    """Makes `out` this recipe's folder, or refuses in a sentence."""
    if check_claim(recipe, out, resume):
        _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_dump(run_recipe_values(recipe), sort_keys=False, allow_unicode=True, width=110)
    write_text(out / RECIPE, values)


def check_claim(recipe: RunRecipe, out: Path, resume: bool) -> bool:
    """Refuses in a sentence if `out` cannot be this recipe's folder, and changes nothing.

    Returns whether it holds what another recipe has told of itself before its first checkpoint.
    """
    path = out / RECIPE
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to train in.")
    if path.is_file():
        # a run that never came to a checkpoint has nothing to lose
        begun = newest_checkpoint(out) is not None or (out / FINAL).exists()
        if begun and not resume:
            raise UserError(f"{out} holds a run already: go on with it (--resume), or give another folder (--out).")
        before = run_recipe_values(parse_run_recipe(yaml.safe_load(path.read_text(encoding="utf-8"))))
        now = run_recipe_values(recipe)
        changed = [key for key in now if key not in (*_MAY_CHANGE, "optimisation") and before[key] != now[key]]
        one, other = before["optimisation"], now["optimisation"]
        # Muon has its own moments: its rate may vary, but not whether there is one
        may_vary = (*_MAY_VARY, "muon") if one["muon"] and other["muon"] else _MAY_VARY
        changed += [f"optimisation.{key}" for key in other if key not in may_vary and one[key] != other[key]]
        if begun and changed:
            raise UserError(
                f"{out} holds a run with another {', '.join(changed)}: resume it with the same, or give another folder."
            )
        return before != now and not begun
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no run; give an empty or a new folder.")
    return False


def _clear(out: Path) -> None:
    """Removes what a run with another recipe has told of itself before its first checkpoint."""
    for path in out.glob("bad-records*.jsonl"):
        path.unlink()
    shutil.rmtree(out / "tensorboard", ignore_errors=True)


def open_stream(recipe: RunRecipe, loaded: Loaded, out: Path | None = None) -> PackStream:
    """The packs of a recipe. out: where bad records are named."""
    if out is None:
        # to look at, so nothing is written
        return _stream(recipe, loaded, OpenOwn(recipe.data, recipe.seed))
    return _stream(recipe, loaded, OpenOwn(recipe.data, recipe.seed, str(out), recipe.loading.keep_frames))


def _stream(recipe: RunRecipe, loaded: Loaded, records: OpenOwn) -> PackStream:
    packing = recipe.packing
    fold = fold_of(loaded.model.config)
    maker = SampleMaker(loaded.processor, packing.budget, packing.oversize, fold=fold, stop=loaded.stop)
    return PackStream(records, maker, packing)


def _evaluation(recipe: RunRecipe, loaded: Loaded, measures: Measures, evaluate: Evaluate | None) -> Evaluation:
    chosen = recipe.evaluation
    held = None
    if chosen.data is not None:
        held_out = replace(chosen.data, exhausted="leave", shuffle=0)
        records = OpenOwn(held_out, recipe.seed, keep_frames=recipe.loading.keep_frames)
        held = _HeldOut(recipe, loaded, records)
    return Evaluation(chosen.every, measures, held, chosen.packs, evaluate)


@dataclass(frozen=True)
class _HeldOut:
    """Packs of the held-out records, from their beginning at every call."""

    recipe: RunRecipe
    loaded: Loaded
    records: OpenOwn

    def __call__(self) -> PackStream:
        return _stream(self.recipe, self.loaded, self.records)


def _finish(
    recipe: RunRecipe, trainer: CasaTrainer, positions: list[StreamPosition], evaluation: Evaluation, out: Path
) -> None:
    """Writes the finished model, and what is to be known of it; one of an earlier end stays until this one is whole.

    positions: where each process stands in the data.
    """
    facts = Facts(
        steps=trainer.state.global_step,
        totals=trained_on(positions),
        made=made_of_records(positions),
        bad=count_bad(out),
        scores=evaluation.scores,
        history=trainer.state.log_history,
        parameters=trained_groups(trainer.model, recipe),
        device=str(trainer.args.device),
    )
    write_text(out / "log.json", json.dumps(trainer.state.log_history, indent=1) + "\n")
    narrow = torch.bfloat16 if recipe.optimisation.precision == "bfloat16" else None
    written = checkpoints.unfinished(out, FINAL)
    with checkpoints.reporting_full_disks(out, FINAL):
        if trainer.sharded:
            export_checkpoint(newest_checkpoint(out), written, average=trainer.ema is not None, dtype=narrow)
        else:
            with trainer.ema.in_place() if trainer.ema is not None else nullcontext():
                _save(trainer.accelerator.unwrap_model(trainer.model), written, narrow)
                trainer.processor.save_pretrained(written)
        write_card(written, recipe, facts)
    checkpoints.publish(out, FINAL)


def _save(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """dtype: of all weights, those that it computed with; None for their own. Masters are kept in the checkpoints."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    model.save_pretrained(folder)


def trained_groups(model: Any, recipe: RunRecipe) -> list[tuple[str, float | None, int]]:
    """(name, rate, parameters) of each group that is trained, and of what is frozen, whose rate is None."""
    groups: dict[str, tuple[float, int]] = {}
    for group in parameter_groups(model, recipe.optimisation):
        name = group["name"].removesuffix(", no decay")
        before = groups.get(name, (0.0, 0))[1]
        groups[name] = (group["lr"], before + sum(parameter.numel() for parameter in group["params"]))
    found: list[tuple[str, float | None, int]] = [(name, rate, count) for name, (rate, count) in groups.items()]
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return [*found, ("frozen", None, frozen)] if frozen else found


def _silent(_: str) -> None:
    pass
