"""train: a recipe to a model that from_pretrained takes.

records -> samples -> packs -> CasaTrainer -> out/final

out/recipe.yaml           what was asked for             out/checkpoint-500      to go on from
out/bad-records.jsonl     what could not be learned      out/tensorboard         curves while it runs
out/final                 model, processor, README.md    out/log.json            every line of the log
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, TrainerCallback

from casa.atomic import write_text
from casa.errors import UserError
from casa.training import checkpoints
from casa.training.callbacks import Evaluate, EvaluationCallback, ProgressCallback, reporters
from casa.training.card import RunFacts, write_card
from casa.training.checkpoints import FINAL, newest_checkpoint, of_all_ranks
from casa.training.config import Recipe, open_recipe, parse_recipe
from casa.training.models import RECIPE, LoadedModel, export_checkpoint, load_model
from casa.training.optimizer import group_sizes
from casa.training.packed_dataset import DataPosition, open_dataset
from casa.training.preflight import check_run
from casa.training.trainer import CasaTrainer

# what may differ when a run is gone on with: nothing that was trained on, or that the model is
_MAY_CHANGE = ("spike_detection", "dataloader", "saving", "logging", "evaluation", "device")
# of the optimisation, what a checkpoint's moments do not depend on
_MAY_VARY = (
    *("steps", "warmup_steps", "decay_steps", "decay_type", "min_lr_ratio", "new_lr", "existing_lr"),
    *("max_grad_norm", "gradient_checkpointing", "loss_chunk"),
)


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    resume: bool = False,
    *,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    on_message: Callable[[str], None] | None = None,
) -> Path | None:
    """Trains a model as a recipe says. Under torchrun, every process calls this.

    Whatever the run will open is opened before its first step (`check_run`), and before anything is written.

    Args:
        recipe: a file, its values, or a recipe that was read.
        out: the folder of the run.
        resume: go on from the newest checkpoint in `out`; without it, `out` must be new or empty.
        evaluate: measures the model now and then; wanted where the recipe's evaluation has tasks.
        callbacks: further ones of transformers' Trainer.
        on_message: is called with what is done besides steps.

    Returns:
        The folder of the finished model, `out/final`; None if SIGTERM ended the run.

    Raises:
        UserError: something is not there or does not fit, a loss is no number or jumps, or a disk is full.
    """
    recipe, out = open_recipe(recipe), Path(out)
    if recipe.evaluation.every and recipe.evaluation.tasks and evaluate is None:
        raise UserError("evaluation.tasks need an evaluate function to be measured by: give one, or leave tasks out.")
    first = int(os.environ.get("RANK", "0")) == 0

    def say(sentence: str) -> None:
        if on_message is not None and first:
            on_message(sentence)

    if first:
        check_folder(recipe, out, resume)
        check_run(recipe, out, resume=resume, processes=int(os.environ.get("WORLD_SIZE", "1")), on_message=say)
        claim_folder(recipe, out, resume)
    say(f"reading {recipe.model.source}")
    loaded = load_model(recipe)
    frames = recipe.dataloader.frame_cache_dir
    dataset = open_dataset(recipe, loaded, report=out, keep_frames=frames)
    for note in dataset.maker.notes:
        say(note)
    evaluation, progress = _evaluation(recipe, loaded, evaluate), ProgressCallback()
    trainer = CasaTrainer(
        loaded.model,
        dataset,
        recipe,
        out,
        processor=loaded.processor,
        callbacks=[evaluation, *reporters(recipe.logging.report_to, out), progress, *callbacks],
        run_name=recipe.name,
    )
    trainer.remove_callback(PrinterCallback)
    evaluation.trainer = trainer
    if resume:
        last = newest_checkpoint(out)
        say(f"going on from {last.name}" if last is not None else "there is no checkpoint yet: starting at step 0")
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    finally:
        progress.close()
    if trainer.stopped:
        say(f"stopped at step {trainer.state.global_step}: resume the run to go on from there")
        return None
    positions = of_all_ranks(trainer.position)
    if first:
        _finish(recipe, trainer, positions, evaluation.scores, out)
    return out / FINAL


def check_folder(recipe: Recipe, out: Path, resume: bool) -> bool:
    """Whether `out` holds what another recipe has written there before its first checkpoint. Changes nothing.

    Raises:
        UserError: it cannot be this recipe's folder.
    """
    path = out / RECIPE
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to train in.")
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and holds no run; give an empty or a new folder.")
        return False
    # a run that never came to a checkpoint has nothing to lose
    begun = newest_checkpoint(out) is not None or (out / FINAL).exists()
    if begun and not resume:
        raise UserError(
            f"{out} holds a run already: go on with it (resume=True), or give another folder (out).",
            field=("resume", "out"),
        )
    before = parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8"))).to_dict()
    now = recipe.to_dict()
    changed = [key for key in now if key not in (*_MAY_CHANGE, "optimisation") and before[key] != now[key]]
    one, other = before["optimisation"], now["optimisation"]
    # Muon has its own moments: its learning rate may vary, but not whether there is one
    may_vary = (*_MAY_VARY, "muon_lr") if one["muon_lr"] and other["muon_lr"] else _MAY_VARY
    changed += [f"optimisation.{key}" for key in other if key not in may_vary and one[key] != other[key]]
    if begun and changed:
        raise UserError(
            f"{out} holds a run with another {', '.join(changed)}: resume it with the same, or give another folder."
        )
    return before != now and not begun


def claim_folder(recipe: Recipe, out: Path, resume: bool) -> None:
    """Makes `out` this recipe's folder, or refuses in a sentence."""
    if check_folder(recipe, out, resume):
        for path in out.glob("bad-records*.jsonl"):
            path.unlink()
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RECIPE, yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=110))


def _evaluation(recipe: Recipe, loaded: LoadedModel, evaluate: Evaluate | None) -> EvaluationCallback:
    chosen, held_out = recipe.evaluation, None
    if chosen.data is not None:
        # from its beginning at every call
        data = replace(chosen.data, exhausted="leave", shuffle=0)
        held_out = partial(open_dataset, recipe, loaded, data, keep_frames=recipe.dataloader.frame_cache_dir)
    return EvaluationCallback(chosen.every, held_out, chosen.packs, evaluate)


def _finish(
    recipe: Recipe, trainer: CasaTrainer, positions: list[DataPosition], scores: Mapping[str, float], out: Path
) -> None:
    """Writes the finished model, and what is to be known of it; one of an earlier end stays until this one is whole.

    positions: where each process stands in the data.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    facts = RunFacts(
        steps=trainer.state.global_step,
        positions=positions,
        scores=scores,
        history=trainer.state.log_history,
        parameters=group_sizes(model, recipe.optimisation),
        device=str(trainer.args.device),
    )
    write_text(out / "log.json", json.dumps(trainer.state.log_history, indent=1) + "\n")
    narrow = torch.bfloat16 if recipe.optimisation.precision == "bfloat16" else None
    written = checkpoints.unfinished(out, FINAL)
    with checkpoints.reporting_full_disks(out, FINAL):
        if trainer.sharded and (newest := newest_checkpoint(out)) is not None:
            export_checkpoint(newest, written, average=trainer.ema is not None, dtype=narrow)
        else:
            with trainer.ema.in_place() if trainer.ema is not None else nullcontext():
                _save(model, written, narrow)
            if trainer.processor is not None:
                trainer.processor.save_pretrained(written)
        write_card(written, recipe, facts, out)
    checkpoints.publish(out, FINAL)


def _save(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """dtype: of all weights, those that it computed with; None for their own. Masters are kept in the checkpoints."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    model.save_pretrained(folder)
