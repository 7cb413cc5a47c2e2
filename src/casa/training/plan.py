"""What a recipe will do, before it does it: what the run opens is opened, its cost is told, its first pack is shown.

Nothing is written, and no weights are read: the model is an outline on the meta device. Activations are worked out from
widths of blocks: T tokens that the text model runs on, P patches of a pack's pictures, d and d_v widths of text model
and image encoder, L blocks of the text model, L_v blocks of the encoder from the first that is trained on.

    checkpointed    T d L + P d_v L_v      the input of every block, and one block in full: that which is run again
    otherwise       every block in full

In full, a block keeps about as many numbers as go into its matrices and come out of them, and what a gate is multiplied
by. Scores of attention are never kept. Frozen matrices keep less than this, image tokens that are updated in every
block (`update_images`) more.
"""

import json
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text
from safetensors import safe_open
from torch import nn

from casa.analysis.budget import fused_token_bytes, readable
from casa.analysis.flops import blocks_of, frame_of, matrix_features, tower_width
from casa.data import BadRecord, BadRecordReport, DataSettings, Record, Records, Shard, SourceSettings
from casa.data.files import data_files
from casa.data.html_report import BudgetBar, SampleCard, ShownPicture, ShownText, ShownWindow, write_report
from casa.data.hub import PREFIX
from casa.data.pictures import open_one
from casa.errors import UserError
from casa.figures import counted
from casa.models import CasaForConditionalGeneration
from casa.models.adapt import encoder_blocks
from casa.models.generation import stop_ids
from casa.models.loading import UNREADABLE, resolve, sentence_of
from casa.training import checkpoints
from casa.training.callbacks import check_reporters
from casa.training.collator import PackCollator
from casa.training.config import ModelSettings, Recipe, TokenBudget
from casa.training.models import LoadedModel, load_processor, outline
from casa.training.optimizer import (
    STACK,
    below_lora,
    bytes_of,
    checkpoint_bytes,
    final_bytes,
    group_sizes,
    moment_bytes,
    parameter_groups,
)
from casa.training.packed_dataset import PackedBatch, open_dataset, sample_maker
from casa.training.samples import SampleMaker, TrainingSample, fold_of
from casa.training.trainer import saved_position
from casa.windows import Window, WindowLayout

# rows that are looked through for a record that can be learned from, and records for how many of them fit a pack
_MAX_ROWS, _LOOKED_AT = 1000, 32
_MAX_BYTES = 64 * 2**20  # of encoded pictures held meanwhile: frames of videos take long to decode
_MUON_COPIES = 4  # of a stack of matrices, while they are made orthogonal
_SIDE = 896  # px of a picture by which image tokens before and after a compressor are compared
_MAX_SAMPLES, _MAX_WINDOWS, _MAX_PICTURES = 24, 12, 8  # that are shown of a pack, a sample and a window
_MAX_IDS = 400  # tokens of a text that are decoded: no more could be shown


def check_run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    processes: int = 1,
    on_message: Callable[[str], None] | None = None,
) -> None:
    """Opens what the run will ever open: what would end it at step N is said at step 0.

        the folder of the run, those that keep frames and image tokens     can be written; have room for checkpoints
        logging.report_to                                                  is installed
        weights, processor                                                 are there; config and headers are read
        data.sources, evaluation.data                                      each gives a record, and one that fits a pack
        the checkpoint that is gone on from                                fits this run

    Args:
        resume: Whether it goes on from the newest checkpoint in `out`, which its caller has seen to be this recipe's.
        on_message: Is called with what the run can bear.

    Raises:
        UserError: Something would end the run later, as far as it can be known.
    """
    for folder in (out, recipe.dataloader.feature_cache_dir, recipe.dataloader.frame_cache_dir):
        if folder is not None:
            _check_writable(Path(folder).expanduser())
    check_reporters(recipe.logging.report_to)
    _check_weights(recipe.model)
    loaded = _outlined(recipe)
    begun = checkpoints.newest_checkpoint(out) if resume else None
    if begun is not None:
        _check_position(recipe, begun, processes)
    _check_room(loaded.model, recipe, out)
    for settings in (recipe.data, recipe.evaluation.data):
        for source in settings.sources if settings is not None else ():
            # one each: what records need is told by source
            sentence = _check_source(source, sample_maker(recipe.packing, loaded))
            if sentence is not None and on_message is not None:
                on_message(sentence)


def _outlined(recipe: Recipe) -> LoadedModel:
    """What `load_model` gives, without weights."""
    model = outline(recipe)
    return LoadedModel(model, load_processor(recipe.model), next(iter(stop_ids(below_lora(model))), None))


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
    what = f"The checkpoints of this run ({checkpoints.size_in_words(each)} each) and its model need"
    checkpoints.check_room(out, needed, what, "free some space, keep fewer, or train elsewhere")


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
    if fits and (2 * fits >= looked or least is None):
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


@dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    Attributes:
        files: How many each source has; None: on a hub, not looked at.
        processes: That train.
        groups: (name, learning rate or None, parameters).
        memory: Bytes by what they are for, in one process without sharding.
    """

    recipe: Recipe
    files: list[int | None]
    processes: int
    groups: list[tuple[str, float | None, int]]
    memory: dict[str, int]

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        return sum(self.memory.values())


def make_plan(recipe: Recipe, processes: int = 1) -> RunPlan:
    """Raises UserError for a model or local data that are not there, and for patterns that fit no parameter."""
    sources = recipe.data.sources
    files = [None if each.path.startswith(PREFIX) else len(data_files(each.path, each.split)) for each in sources]
    model = outline(recipe)
    return RunPlan(recipe, files, processes, group_sizes(model, recipe.optimisation), _memory(model, recipe))


def _memory(prepared: Any, recipe: Recipe) -> dict[str, int]:
    """Bytes that a step holds, for a pack that is full. Work space of kernels, and of a frozen encoder, is left out."""
    optimisation, budget = recipe.optimisation, recipe.packing.budget
    model = below_lora(prepared)
    trained = [parameter for parameter in prepared.parameters() if parameter.requires_grad]
    groups = parameter_groups(prepared, optimisation)
    by_muon = sum(bytes_of(group["params"]) for group in groups if group.get("muon"))
    found = {
        "weights": bytes_of(prepared.parameters()),
        "gradients": bytes_of(trained),
        "moments": moment_bytes(prepared, optimisation),
    }
    if by_muon:
        found["work space of Muon"] = _MUON_COPIES * min(by_muon, 4 * STACK)
    if optimisation.ema_decay is not None:
        found["averaged weights"] = 4 * sum(parameter.numel() for parameter in trained)
    size = 2 if optimisation.precision == "bfloat16" else 4
    try:
        frame = frame_of(model, _SIDE, _SIDE)
        tokens = math.ceil(budget.image * frame.tokens / frame.connected)
    except UserError:
        tokens = budget.image
    inserted = model.fusion.method == "insertion"
    if not inserted:
        each = fused_token_bytes(blocks_of(model), size)
        found["keys and values of a pack's images, and their gradients"] = 2 * tokens * each
    text, patches = budget.text + (tokens if inserted else 0), budget.image * fold_of(model.config) ** 2
    found |= kept_by_blocks(model, text, patches, size, optimisation.gradient_checkpointing)
    vocabulary = model.config.get_text_config().vocab_size
    found["logits of one chunk, and their gradients"] = 2 * 4 * min(optimisation.loss_chunk, budget.text) * vocabulary
    return found


def kept_by_blocks(
    model: CasaForConditionalGeneration, text: int, patches: int, size: int, checkpointed: bool
) -> dict[str, int]:
    """Bytes of activations, by what they are for.

    Args:
        model: With requires_grad as it will be; weights are not looked at.
        text, patches: T and P.
        size: Bytes of a number that is computed with; the text model's sums between blocks are as wide as its
            embeddings.
    """
    embedding: Any = model.get_input_embeddings()
    encoder: Any = model.encoder
    texts = [_text_features(model, index) for index in range(len(model.decoder.blocks))]
    blocks = list(encoder_blocks(encoder))
    learns = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    # a gradient goes through the blocks from the first that has something to learn
    tower = [_features(block) for block in (blocks[learns.index(True) :] if any(learns) else [])]
    if not checkpointed:
        return {"what blocks keep for the backward pass, about": size * (text * sum(texts) + patches * sum(tower))}
    between = text * embedding.embedding_dim * len(texts) * embedding.weight.element_size()
    return {
        "inputs of blocks, kept for the backward pass": between
        + patches * tower_width(encoder.config) * len(tower) * size,
        "one block in full, run again, about": size * max(text * max(texts), patches * max(tower, default=0)),
    }


def _text_features(model: CasaForConditionalGeneration, index: int) -> int:
    found = _features(model.decoder.blocks[index])
    # a fusion layer is made like the self-attention that it stands beside
    beside = index in model.fused_blocks and model.fusion.placement != "replace"
    return found + beside * matrix_features(model.decoder.attention(index))


def _features(block: nn.Module) -> int:
    gates = [part for name, part in block.named_modules() if name.endswith("gate_proj")]
    return matrix_features(block) + sum(int(gate.out_features) for gate in gates)  # type: ignore[arg-type]


def plan_tables(plan: RunPlan) -> Group:
    """Tells what a run starts from, its sources, steps, parameters and memory."""
    recipe = plan.recipe
    chosen, budget, saving = recipe.optimisation, recipe.packing.budget, recipe.saving
    sources = _table("Sources", "path", "subset", "share", "files")
    total = math.fsum(source.weight for source in recipe.data.sources)
    for source, count in zip(recipe.data.sources, plan.files, strict=True):
        files = "on the hub, not looked at" if count is None else f"{count:,}"
        sources.add_row(source.path, source.subset or "", f"{100 * source.weight / total:.1f} %", files)
    constant = chosen.steps - chosen.warmup_steps - chosen.decay_steps
    packs = chosen.gradient_accumulation_steps * plan.processes
    text, image = (readable(packs * chosen.steps * most, "") for most in (budget.text, budget.image))
    steps = _table("Steps", "", "")
    rising = f"{chosen.warmup_steps:,} rising, {constant:,} constant, {chosen.decay_steps:,} falling"
    accumulated = f"{plan.processes:,} processes x {chosen.gradient_accumulation_steps:,} accumulated"
    steps.add_row("steps", f"{chosen.steps:,}: {rising}")
    steps.add_row("packs a step", f"{packs:,} ({accumulated})")
    steps.add_row("a pack", f"at most {budget.text:,} text and {budget.image:,} image tokens")
    steps.add_row("the whole run", f"at most {text} text and {image} image tokens")
    steps.add_row("checkpoints", f"every {saving.every:,} steps, the newest {saving.keep} kept")
    parameters = _table("Parameters", "group", "lr", "count")
    for name, lr, count in plan.groups:
        parameters.add_row(name, "frozen" if lr is None else f"{lr:g}", f"{count:,}")
    memory = _table(f"Memory of a process, for a full pack ({chosen.precision})", "", "")
    for name, size in plan.memory.items():
        memory.add_row(name, readable(size, "B", 1024))
    memory.add_row("together, about", readable(plan.memory_bytes, "B", 1024))
    memory.caption = "without sharding; worked out from widths: work space of kernels comes on top"
    return Group(_model_line(recipe), sources, steps, parameters, memory)


def _model_line(recipe: Recipe) -> Text:
    model = recipe.model
    if model.checkpoint is not None:
        told = f"CASA checkpoint {model.checkpoint}"
    else:
        fusion = model.fusion.to_dict() if model.fusion is not None else {}
        chosen = ", ".join(f"{key} {value}" for key, value in fusion.items() if value not in (None, False, 0))
        told = f"{model.backbone}" + (f" with the image encoder of {model.vision}" if model.vision else "")
        told += f"; fusion: {chosen or 'as adapt does it (CASA⊕ in every block)'}"
    lora = f"; LoRA of rank {model.lora.rank}" if model.lora is not None else ""
    return Text(f"{recipe.name}: {told}{lora}\n")


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", caption_justify="left", show_edge=False, show_header=bool(columns[0])
    )
    for column in columns:
        table.add_column(column, justify="right" if column in ("share", "files", "lr", "count") else "left")
    return table


class _RememberingCollator(PackCollator):
    """Keeps the samples of the last batch."""

    samples: Sequence[TrainingSample] = ()

    def __call__(self, samples: Sequence[TrainingSample], prepared: Any = None) -> Any:
        self.samples = samples
        return super().__call__(samples, prepared)


def show_first_pack(
    recipe: Recipe, path: str | os.PathLike[str], on_message: Callable[[str], None] | None = None
) -> PackedBatch:
    """Shows the first batch of the first process, made as the run would make it, as an HTML page; and returns it.

    Args:
        on_message: Is called with what the run would tell of its samples.

    Raises:
        UserError: Data, the model's config or its processor are not there, or no record can be learned from.
    """
    loaded = _outlined(recipe)
    dataset = open_dataset(recipe, loaded)
    if on_message is not None:
        for note in dataset.maker.notes:
            on_message(note)
    dataset.collator = remembering = _RememberingCollator(loaded.processor, fold=dataset.maker.grids.fold)
    batch = next(iter(dataset), None)
    if batch is None:
        raise UserError("No record of the data can be learned from: `casa data check` tells why.")
    fusion = below_lora(loaded.model).fusion
    inserted = fusion.method == "insertion"
    what = "one stream of text and image tokens per sample" if inserted else f"windows by {fusion.split}"
    names = ", ".join(source.path for source in recipe.data.sources)
    write_pack(
        remembering.samples,
        path,
        budget=recipe.packing.budget,
        tokenizer=loaded.processor.tokenizer,
        split="sample" if inserted else fusion.split,
        title=f"{recipe.name}: the first packed batch",
        note=f"{len(remembering.samples)} samples of {names}; {what}; samples see nothing of one another",
    )
    return batch


def write_pack(
    samples: Sequence[TrainingSample],
    path: str | os.PathLike[str],
    *,
    budget: TokenBudget,
    tokenizer: Any,
    split: Literal["image", "sample"] = "image",
    title: str = "",
    note: str = "",
) -> None:
    """Writes a pack's samples as an HTML page: how full both budgets are, and each sample's windows with their text.

    Args:
        split: What a window is (`FusionConfig.split`; "sample" also for insertion, where all is one stream).
        title, note: Two lines above the samples.

    Raises:
        UserError: The file has another ending than .html, or cannot be written.
    """
    bars = [
        BudgetBar("text", [sample.text_tokens for sample in samples], budget.text),
        BudgetBar("image", [sample.image_tokens for sample in samples], budget.image),
    ]
    more = len(samples) - _MAX_SAMPLES
    note += f"; the first {_MAX_SAMPLES} of them are shown" if more > 0 else ""
    cards = [_card(sample, tokenizer, split) for sample in samples[:_MAX_SAMPLES]]
    write_report(path, cards, title=title, note=note, bars=bars)


def _card(sample: TrainingSample, tokenizer: Any, split: Literal["image", "sample"]) -> SampleCard:
    places = [(place, sized.tokens) for place, sized in zip(sample.places, sample.pictures, strict=True)]
    windows = WindowLayout.from_insertions([sample.text_tokens], [places], split).windows
    facts = (
        f"{counted(len(windows), 'window')}, {counted(len(sample.pictures), 'picture')}, "
        f"{counted(sample.image_tokens, 'image token')}, {counted(sample.text_tokens, 'text token')}, "
        f"{sample.learned:,} learned"
    )
    origin = str(replace(sample.origin, path=Path(sample.origin.path).name))
    shown = [_window(window, sample, tokenizer) for window in windows[:_MAX_WINDOWS]]
    return SampleCard(origin, facts, shown, max(0, len(windows) - _MAX_WINDOWS))


def _window(window: Window, sample: TrainingSample, tokenizer: Any) -> ShownWindow:
    starts = list(accumulate((sized.tokens for sized in sample.pictures), initial=0))
    pictures = []
    for image in window.images[:_MAX_PICTURES]:
        number, tokens = bisect_right(starts, image.start) - 1, image.stop - image.start
        picture = open_one(sample.pictures[number].picture, number + 1)
        pictures.append(ShownPicture(picture, f"{tokens:,}", tokens))
    texts, position = [], window.text_start
    for learned, run in groupby(sample.learn[window.text_start : window.text_stop]):
        count = sum(1 for _ in run)
        text = tokenizer.decode(list(sample.ids[position : position + min(count, _MAX_IDS)]))
        texts.append(ShownText(text, learned=learned, tokens=count))
        position += count
    return ShownWindow(pictures, texts, len(window.images) - len(pictures))
