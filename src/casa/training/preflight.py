"""What a run will ever open, opened before its first step: what would end it at step N is said at step 0.

    the folder of the run, those that keep frames and image tokens     can be written; have room for the checkpoints
    logging.report_to                                                  is installed
    weights, processor                                                 are there; config and file headers are read
    data.sources, evaluation.data                                      each gives a record, and one that fits a pack
    the checkpoint that is gone on from                                fits this run

No weights are read and nothing is written, so a dry run does the same.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import safe_open

from casa.data import BadRecord, BadRecordReport, DataSettings, Record, Records, Shard, SourceSettings
from casa.errors import UserError
from casa.models.generation import stop_ids
from casa.models.loading import UNREADABLE, resolve, sentence_of
from casa.training import checkpoints
from casa.training.callbacks import check_reporters
from casa.training.config import ModelSettings, Recipe
from casa.training.models import LoadedModel, load_processor, outline
from casa.training.optimizer import below_lora, checkpoint_bytes, final_bytes
from casa.training.packed_dataset import sample_maker
from casa.training.samples import SampleMaker
from casa.training.trainer import saved_position

# rows that are looked through for a record that can be learned from, and records for how many of them fit a pack
_MAX_ROWS, _LOOKED_AT = 1000, 32
# of encoded pictures held meanwhile: frames of videos take long to decode
_MAX_BYTES = 64 * 2**20


def check_run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    processes: int = 1,
    on_message: Callable[[str], None] | None = None,
) -> None:
    """Opens what the run will open.

    Args:
        resume: whether it goes on from the newest checkpoint in `out`, which its caller has seen to be this recipe's.
        on_message: is called with what the run can bear.

    Raises:
        UserError: something would end the run later, as far as it can be known.
    """
    for folder in (out, recipe.dataloader.feature_cache_dir, recipe.dataloader.frame_cache_dir):
        if folder is not None:
            _check_writable(Path(folder).expanduser())
    check_reporters(recipe.logging.report_to)
    _check_weights(recipe.model)
    model = outline(recipe)
    begun = checkpoints.newest_checkpoint(out) if resume else None
    if begun is not None:
        _check_position(recipe, begun, processes)
    _check_room(model, recipe, out)
    stop = next(iter(stop_ids(below_lora(model))), None)
    loaded = LoadedModel(model, load_processor(recipe.model), stop)
    for settings in (recipe.data, recipe.evaluation.data):
        for source in settings.sources if settings is not None else ():
            # one each: what records need is told by source
            sentence = _check_source(source, sample_maker(recipe.packing, loaded))
            if sentence is not None and on_message is not None:
                on_message(sentence)


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


def _check_position(recipe: Recipe, checkpoint: Path, processes: int) -> None:
    """That the data can be gone on with by all readers, from where the checkpoint left them."""
    workers = recipe.dataloader.num_workers
    positions = [saved_position(checkpoint, n, processes, recipe.sharding == "fsdp") for n in range(processes)]
    for rank, position in enumerate(positions):
        position.check_readers(workers)
        for number, left in position.positions.items():
            shard = Shard(rank, processes, number, max(1, workers))
            Records(recipe.data, recipe.seed, shard, BadRecordReport()).load_state_dict(json.loads(left)["source"])


def _check_room(model: Any, recipe: Recipe, out: Path) -> None:
    """The most that lies in `out` at once: the checkpoints that are kept and a new one, or these and the result."""
    each, result = checkpoint_bytes(model, recipe.optimisation), final_bytes(model, recipe.optimisation)
    count, keep = math.ceil(recipe.optimisation.steps / recipe.saving.every), recipe.saving.keep
    there = min(len(checkpoints.saved_checkpoints(out)), keep)
    needed = max(min(count, keep + 1) * each, min(count, keep) * each + result) - there * each
    checkpoints.check_room_at_start(out, needed, each)


def _check_source(source: SourceSettings, maker: SampleMaker) -> str | None:
    """A sentence if most of its records fit no pack.

    Raises UserError if it has no record that can be learned from, or none that fits.
    """
    looked = held = fits = 0
    first: str | None = None
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
        if fits and (looked >= _LOOKED_AT or held > _MAX_BYTES):
            break
    least, most, budget = maker.least, maker.most, maker.budget
    if (fits and 2 * fits >= looked) or (fits and least is None):
        return None
    if least is None or most is None:
        why = f" ({first.rstrip('.')})" if first is not None else ""
        raise UserError(
            f"{source.path} has no record that can be learned from{why}: `casa data check {source.path}` tells more."
        )
    sentence = (
        f"of the first {looked:,} records of {source.path}, {fits or 'none'} fit into a pack of {budget.text:,} "
        f"text and {budget.image:,} image tokens: a packing.budget of {least.text:,} and {least.image:,} would "
        f"hold the smallest, {most.text:,} and {most.image:,} all of them"
    )
    if not fits:
        raise UserError(sentence[0].upper() + sentence[1:] + ".")
    return sentence


def _first_records(source: SourceSettings) -> Iterator[Record | str]:
    """Records from the beginning; for a bad row, its place and what is wrong with it."""
    report = BadRecordReport()
    records = Records(DataSettings((source,), shuffle=0, exhausted="leave"), 0, Shard(), report)
    for record in islice(records.rows(), _MAX_ROWS):
        if record is not None:
            yield record
        elif report.first:
            origin, bad = report.first[0]
            yield f"{origin}: {bad}"
