"""What a run will ever open, opened before its first step: what would end it at step N is said at step 0.

    the folder of the run, those that keep frames and image tokens     can be written; have room for the checkpoints
    logging.to                                                         is installed
    weights, processor                                                 are there; config and file headers are read
    data.sources, evaluation.data                                      each gives a record, and one that fits a pack
    the checkpoint that is gone on from                                fits this run

No weights are read and nothing is written, so a dry run does the same.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from casa.data import BadRecord, DataSettings, Record, Report, SourceSettings
from casa.data.records import Records
from casa.data.settings import Shard
from casa.errors import UserError
from casa.models.generation import stop_ids
from casa.models.loading import UNREADABLE, resolve, sentence_of
from casa.training.own.model import load_processor, outline
from casa.training.own.recipe import ModelSettings, RunRecipe
from casa.training.samples import Budget, SampleMaker, fold_of
from casa.training.samples.maker import smallest
from casa.training.seen.reporting import check_reporters
from casa.training.trainer import checkpoints, newest_checkpoint
from casa.training.trainer.groups import below_lora, parameter_groups, written_weights
from casa.training.trainer.trainer import saved_position

# rows that are looked through for a record that can be learned from, and records for how many of them fit a pack
_MOST_ROWS, _LOOKED_AT = 1000, 32
# of encoded pictures held meanwhile: frames of videos take long to decode
_MOST_BYTES = 64 * 2**20


def check_run(
    recipe: RunRecipe,
    out: Path,
    *,
    resume: bool = False,
    processes: int = 1,
    told: Callable[[str], None] | None = None,
) -> None:
    """Raises UserError for whatever would end the run later, as far as it can be known. told: of what it can bear.

    resume: whether it goes on from the newest checkpoint in `out`, which its caller has seen to be this recipe's.
    """
    for folder in (out, recipe.loading.keep_folder, recipe.loading.keep_frames):
        if folder is not None:
            _check_writable(Path(folder).expanduser())
    check_reporters(recipe.logging.to)
    _check_weights(recipe.model)
    model = outline(recipe)
    begun = newest_checkpoint(out) if resume else None
    if begun is not None:
        _check_position(recipe, begun, processes)
    _check_room(model, recipe, out)
    fused = below_lora(model)
    stop = next(iter(stop_ids(fused)), None)
    packing = recipe.packing
    processor = load_processor(recipe.model)
    for settings in (recipe.data, recipe.evaluation.data):
        for source in settings.sources if settings is not None else ():
            # one each: `least` is of this source's records
            maker = SampleMaker(processor, packing.budget, packing.oversize, fold=fold_of(fused.config), stop=stop)
            _check_source(source, maker, told or _silent)


def _check_writable(folder: Path) -> None:
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{folder} cannot be made, since {there} is no folder: write elsewhere.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} cannot be written: change its permissions, or write elsewhere.")


def _check_weights(settings: ModelSettings) -> None:
    """Of models on this machine: that their files of weights are there and whole, by their headers."""
    for name in (settings.checkpoint, settings.backbone, settings.vision):
        folder = Path(str(resolve(name))) if name is not None else None
        if folder is None or not (folder / "config.json").is_file():
            continue  # a hub's, or refused by whoever reads the config
        files = {path.name for path in folder.glob("*.safetensors")}
        for index in folder.glob("*.safetensors.index.json"):
            try:
                files |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{name} cannot be loaded: {index.name} cannot be read; fetch it again.") from error
        if not files and not any(any(folder.glob(kind)) for kind in ("*.gguf", "*.bin")):
            raise UserError(
                f"{name} has no weights beside its config.json; give the folder that save_pretrained wrote."
            )
        for file in sorted(files):
            try:
                with safe_open(folder / file, "pt"):
                    pass
            except UNREADABLE as error:
                raise UserError(f"{name} cannot be loaded: {file}: {sentence_of(error)}") from error


def _check_position(recipe: RunRecipe, checkpoint: Path, processes: int) -> None:
    """That the data can be gone on with by all readers, from where the checkpoint left them."""
    positions = [saved_position(checkpoint, n, processes, recipe.sharding == "fsdp") for n in range(processes)]
    for rank, position in enumerate(positions):
        position.check_readers(recipe.loading.workers)
        for number, left in position.positions.items():
            shard = Shard(rank, processes, number, max(1, recipe.loading.workers))
            Records(recipe.data, recipe.seed, shard, Report()).load_state_dict(json.loads(left)["source"])


def checkpoint_bytes(model: Any, recipe: RunRecipe) -> tuple[int, int]:
    """Bytes of a checkpoint, and of the finished model. model: with or without weights (`outline`)."""
    chosen = recipe.optimisation
    groups = parameter_groups(model, chosen)
    # AdamW keeps two moments of each weight, as precise as the weight, Muon one
    moments = sum(_bytes(group["params"]) * (1 if group.get("muon") else 2) for group in groups)
    average = sum(4 * p.numel() for group in groups for p in group["params"]) if chosen.ema is not None else 0
    whole = list(below_lora(model).parameters())
    weights = _bytes(whole) if below_lora(model) is model else _bytes(written_weights(model).values())
    narrow = 2 if chosen.precision == "bfloat16" else None
    return weights + moments + average, sum(p.numel() * (narrow or p.element_size()) for p in whole)


def _check_room(model: Any, recipe: RunRecipe, out: Path) -> None:
    """The most that lies in `out` at once: the checkpoints that are kept and a new one, or these and the result."""
    each, result = checkpoint_bytes(model, recipe)
    count = math.ceil(recipe.optimisation.steps / recipe.saving.every)
    there = min(len(checkpoints.saved_checkpoints(out)), recipe.saving.keep)
    kept = min(count, recipe.saving.keep)
    needed = max(min(count, recipe.saving.keep + 1) * each, kept * each + result) - there * each
    checkpoints.check_room_at_start(out, needed, each)


def _check_source(source: SourceSettings, maker: SampleMaker, told: Callable[[str], None]) -> None:
    """Raises UserError if it has no record that can be learned from, or none that fits; tells if most do not."""
    looked = held = 0
    needs: list[Budget] = []
    first: str | None = None
    fits = 0
    for record in _first_records(source):
        if isinstance(record, str):
            first = first or record
            continue
        looked += 1
        held += sum(len(p.source) for p in record.pictures() if isinstance(p.source, bytes))
        try:
            maker(record)
            fits += 1
        except BadRecord as bad:
            first = first or f"{record.origin}: {bad}"
            if bad.reason == "over-budget":
                needs += maker.needs(record)
        if fits and (looked >= _LOOKED_AT or held > _MOST_BYTES):
            break
    if fits and 2 * fits >= looked:
        return
    if maker.least is None:
        if not fits:
            why = f" ({first.rstrip('.')})" if first is not None else ""
            raise UserError(
                f"{source.path} has no record that can be learned from{why}: "
                f"`casa data check {source.path}` tells more."
            )
        return
    least = smallest(needs, maker.budget) or maker.least
    most = Budget(max(need.text for need in needs), max(need.image for need in needs)) if needs else least
    sentence = (
        f"of the first {looked:,} records of {source.path}, {fits or 'none'} fit into a pack of {maker.budget.text:,} "
        f"text and {maker.budget.image:,} image tokens: a packing.budget of {least.text:,} and {least.image:,} would "
        f"hold the smallest, {most.text:,} and {most.image:,} all of them"
    )
    if not fits:
        raise UserError(sentence[0].upper() + sentence[1:] + ".")
    told(sentence)


def _first_records(source: SourceSettings) -> Iterator[Record | str]:
    """Records from the beginning; for a bad row, its place and what is wrong with it."""
    report = Report()
    records = Records(DataSettings((source,), shuffle=0, exhausted="leave"), 0, Shard(), report)
    for number, record in enumerate(records.rows(), start=1):
        if record is not None:
            yield record
        elif report.first:
            origin, bad = report.first[0]
            yield f"{origin}: {bad}"
        if number == _MOST_ROWS:
            return


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _silent(_: str) -> None:
    pass
