"""train: a recipe to a model that from_pretrained takes, with a card that says what it learned from.

records -> samples -> packs -> CasaTrainer -> out/final

out/recipe.yaml           what was asked for             out/checkpoint-500      to go on from
out/bad-records.jsonl     what could not be learned      out/tensorboard         curves while it runs
out/final                 model, processor, README.md    out/log.json            every line of the log
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, TrainerCallback

from casa.atomic import write_text
from casa.data.record import REASONS, read_report
from casa.errors import UserError
from casa.figures import BLUE, ORANGE, filled, new_figure, public_name, quieten, write_png
from casa.models import FusionConfig
from casa.provenance import provenance
from casa.training import checkpoints
from casa.training.callbacks import Evaluate, EvaluationCallback, ProgressCallback, reporters
from casa.training.checkpoints import FINAL, newest_checkpoint, of_all_ranks
from casa.training.config import Recipe, open_recipe, parse_recipe
from casa.training.models import RECIPE, LoadedModel, export_checkpoint, load_model
from casa.training.optimizer import group_sizes
from casa.training.packed_dataset import DataPosition, open_dataset
from casa.training.plan import check_run
from casa.training.trainer import CasaTrainer

# what may differ when a run is gone on with: nothing that was trained on, or that the model is
_MAY_CHANGE = ("spike_detection", "dataloader", "saving", "logging", "evaluation", "device")
# of the optimisation, what a checkpoint's moments do not depend on
_MAY_VARY = (
    *("steps", "warmup_steps", "decay_steps", "decay_type", "min_lr_ratio", "new_lr", "existing_lr"),
    *("max_grad_norm", "gradient_checkpointing", "loss_chunk"),
)
# of the card: what is counted of packs, and of records
COUNTED = ("packs", "samples", "text_tokens", "image_tokens", "images", "learned", "dropped")
_OVERSIZE = ("downscaled", "split", "refused", "pieces refused")
_CURVE = "loss.png"
_SMOOTH = 20  # entries that a point of the smoothed line looks back over
_FRONT = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["casa"]}


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
        recipe: A file, its values, or a recipe that was read.
        out: The folder of the run.
        resume: Go on from the newest checkpoint in `out`; without it, `out` must be new or empty.
        evaluate: Measures the model now and then; wanted where the recipe's evaluation has tasks or metrics.
        callbacks: Further ones of transformers' Trainer.
        on_message: Is called with what is done besides steps.

    Returns:
        The folder of the finished model, `out/final`; None if SIGTERM ended the run.

    Raises:
        UserError: Something is not there or does not fit, a loss is no number or jumps, or a disk is full.
    """
    recipe, out = open_recipe(recipe), Path(out)
    if recipe.evaluation.every and recipe.evaluation.asks and evaluate is None:
        raise UserError(
            "evaluation.tasks and evaluation.metrics need an evaluate function to be measured by: give one, or leave "
            "tasks and metrics out."
        )
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
    dataset = open_dataset(recipe, loaded, report=out, keep_frames=recipe.dataloader.frame_cache_dir)
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
        _finish(recipe, trainer, positions, evaluation.scores)
    return out / FINAL


def check_folder(recipe: Recipe, out: Path, resume: bool) -> bool:
    """Whether `out` holds what another recipe has written there before its first checkpoint. Changes nothing.

    Raises:
        UserError: It cannot be this recipe's folder.
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
    write_text(out / RECIPE, _yaml(recipe))


def _yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=110)


def _evaluation(recipe: Recipe, loaded: LoadedModel, evaluate: Evaluate | None) -> EvaluationCallback:
    chosen, held_out = recipe.evaluation, None
    if chosen.data is not None:
        # from its beginning at every call
        data, frames = replace(chosen.data, exhausted="leave", shuffle=0), recipe.dataloader.frame_cache_dir
        held_out = partial(open_dataset, recipe, loaded, data, keep_frames=frames)
    return EvaluationCallback(chosen.every, held_out, chosen.packs, evaluate)


def _finish(recipe: Recipe, trainer: CasaTrainer, positions: list[DataPosition], scores: Mapping[str, float]) -> None:
    """Writes the finished model and its card; one of an earlier end stays until this one is whole."""
    out, model = trainer.folder, trainer.accelerator.unwrap_model(trainer.model)
    groups = group_sizes(model, recipe.optimisation)  # before adapters are merged
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
        try:
            drawn = draw_curve(trainer.state.log_history, written / _CURVE, recipe.name)
        except UserError:
            drawn = False  # without matplotlib: a card without its picture is a card
        card = _card(recipe, trainer, positions, scores, count_bad(out))
        card |= {"groups": groups, "curve": _CURVE if drawn else None}
        write_text(written / "README.md", filled("casa.training", "model_card.md", **card))
    checkpoints.publish(out, FINAL)


def _save(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """dtype: of all weights, those that it computed with; None for their own. Masters are kept in the checkpoints."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    model.save_pretrained(folder)


def trained_on(positions: Iterable[DataPosition]) -> dict[str, int]:
    """Totals since the run began, by the keys of `COUNTED`. positions: one of each process."""
    found: Counter[str] = Counter()
    for position in positions:
        found.update(position.taken)
    return {name: found[name] for name in COUNTED}


def made_of_records(positions: Iterable[DataPosition]) -> Counter[str]:
    """Records, samples, and how many records were downscaled, split or refused (`SampleMaker.counts`)."""
    found: Counter[str] = Counter()
    for position in positions:
        for reader in position.positions.values():
            found.update(json.loads(reader)["counts"])
    return found


def count_bad(folder: Path) -> Counter[str]:
    """Bad records by reason, from the reports of all readers of a run.

    A record is one, however many readers met it: files go to another of them each epoch.
    """
    reasons: dict[str, str] = {}
    for path in sorted(folder.glob("bad-records*.jsonl")):
        reasons.update(read_report(path.read_bytes()))
    return Counter(reasons.values())


def _card(
    recipe: Recipe, trainer: CasaTrainer, positions: list[DataPosition], scores: Mapping[str, float], bad: Counter[str]
) -> dict[str, Any]:
    """What the template of a model's card is filled with: what hubs read, what it is, what it learned from."""
    source, model = recipe.model.source, recipe.model
    base = {"base_model": source} if source.count("/") == 1 and not Path(source).exists() else {}
    if model.checkpoint is not None:
        began = f"Trained further from the CASA checkpoint `{public_name(model.checkpoint)}`"
    else:
        fusion = model.fusion or FusionConfig()
        how = "insertion" if fusion.method == "insertion" else f"{fusion.method} ({fusion.placement})"
        seen = f" with the image encoder of `{public_name(model.vision)}`" if model.vision is not None else ""
        began = f"`{public_name(model.backbone)}`{seen}, given eyes by {how}"
    made = made_of_records(positions)
    return {
        "recipe": recipe,
        "front": yaml.safe_dump({**_FRONT, **base}, sort_keys=False),
        "began": began,
        "scores": _scores(recipe, trainer, scores),
        "counts": trained_on(positions) | {f"records {name}": made[name] for name in _OVERSIZE if made[name]},
        "bad": bad,
        "reasons": REASONS,
        "written": _yaml(recipe),
        "made": provenance(str(trainer.args.device)),
    }


def _scores(recipe: Recipe, trainer: CasaTrainer, scores: Mapping[str, float]) -> list[tuple[str, str]]:
    def logged(name: str) -> list[float]:
        return [entry[name] for entry in trainer.state.log_history if name in entry]

    rows = [("steps", f"{trainer.state.global_step:,}")]
    if losses := logged("loss"):
        rows.append(("loss per answer token, first and last in the log", f"{losses[0]:.4g}, {losses[-1]:.4g}"))
    names = {"loss": "held-out loss per answer token"}
    rows += [(names.get(name, name), f"{value:.4g}") for name, value in scores.items()]
    max_side = recipe.evaluation.max_side
    if recipe.evaluation.tasks and max_side is not None:
        rows.append(("pictures of these tasks", f"at most {max_side} px"))
    if rates := logged("text_tokens_per_second"):
        rows.append(("text tokens per second, median", f"{median(rates):,.0f}"))
    if memory := logged("memory_gib"):
        rows.append(("most memory held", f"{max(memory):.1f} GiB"))
    return rows


def draw_curve(history: Sequence[Mapping[str, float]], path: str | os.PathLike[str], title: str = "") -> bool:
    """Draws the log's `loss`, and `eval_loss` if there is any, over steps; False if there is no loss to draw.

    Raises:
        UserError: matplotlib is not installed.
    """
    steps = [entry["step"] for entry in history if "loss" in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if not losses:
        return False
    figure = new_figure(7, 3.4)
    axes = figure.subplots()
    if len(losses) < 2 * _SMOOTH:
        dots = "o" if len(losses) < 12 else None
        axes.plot(steps, losses, color=BLUE, linewidth=1.2, marker=dots, markersize=3, label="training")
    else:
        axes.plot(steps, losses, color=BLUE, linewidth=0.8, alpha=0.25)
        smoothed = [fmean(losses[max(0, end - _SMOOTH) : end]) for end in range(1, len(losses) + 1)]
        axes.plot(steps, smoothed, color=BLUE, linewidth=1.6, label="training")
    if held:
        axes.plot(*zip(*held, strict=True), color=ORANGE, marker="o", markersize=3.5, linewidth=1.4, label="held out")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    quieten(axes)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    write_png(figure, path)
    return True
