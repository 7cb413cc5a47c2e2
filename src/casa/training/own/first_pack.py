"""The first packed batch of a run, made as the run would make it, and drawn."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from casa.errors import UserError
from casa.models.generation import stop_ids
from casa.training.own.model import Loaded, load_processor
from casa.training.own.pack_sheet import draw_pack
from casa.training.own.recipe import RunRecipe
from casa.training.own.run import open_stream
from casa.training.packs import Batch, Collator
from casa.training.samples import Sample
from casa.training.trainer.groups import below_lora


class _Watching(Collator):
    """Keeps the samples of the last batch."""

    samples: Sequence[Sample] = ()

    def __call__(self, samples: Sequence[Sample], prepared: Any = None) -> Any:
        self.samples = samples
        return super().__call__(samples, prepared)


def draw_first_pack(
    recipe: RunRecipe, model: Any, path: str | os.PathLike[str], told: Callable[[str], None] | None = None
) -> Batch:
    """Draws the first batch of the first process to a PNG, and returns it.

    model: the run's, weights or none (`outline`). told: is told what the run would tell of its samples. Raises
    UserError for data or a processor that are not there, and if no record can be learned from.
    """
    fused = below_lora(model)
    processor = load_processor(recipe.model)
    stream = open_stream(recipe, Loaded(fused, processor, next(iter(stop_ids(fused)), None)))
    if told is not None:
        for note in stream.maker.notes:
            told(note)
    watching = _Watching(processor, fold=stream.maker.grids.fold)
    stream.collator = watching
    batch = next(iter(stream), None)
    if batch is None:
        raise UserError("No record of the data can be learned from: `casa data check` tells why.")
    fusion = fused.fusion
    inserted = fusion.method == "insertion"
    what = "one stream of text and image tokens per sample" if inserted else f"windows by {fusion.split}"
    names = ", ".join(source.path for source in recipe.data.sources)
    draw_pack(
        watching.samples,
        path,
        budget=recipe.packing.budget,
        tokenizer=processor.tokenizer,
        split="sample" if inserted else fusion.split,
        title=f"{recipe.name}: the first packed batch",
        note=f"{len(watching.samples)} samples of {names}; {what}; samples see nothing of one another",
    )
    return batch
