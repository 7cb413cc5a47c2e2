"""What a recipe will do, before it does it: sources, steps, parameters and rates, the memory that it takes.

Nothing is read but configs: the model is an outline on the meta device.
"""

import math
from dataclasses import dataclass
from typing import Any

from casa.analysis.anatomy import blocks_of, frame_of
from casa.analysis.budget import fused_token_bytes
from casa.data import SourceSettings
from casa.data.hub import PREFIX
from casa.data.places import data_files
from casa.errors import UserError
from casa.training.muon import STACK
from casa.training.own.activations import kept_by_blocks
from casa.training.own.model import outline
from casa.training.own.recipe import RunRecipe
from casa.training.own.run import trained_groups
from casa.training.samples import fold_of
from casa.training.trainer.groups import below_lora, parameter_groups

_MUON_COPIES = 4  # of a stack of matrices, while they are made orthogonal
_SIDE = 896  # px of a picture by which image tokens before and after a compressor are compared


@dataclass(frozen=True)
class Source:
    """One source: its share of the records, and how many files it has (None: on a hub, not looked at)."""

    path: str
    subset: str | None
    share: float
    files: int | None


@dataclass(frozen=True)
class Plan:
    """groups: (name, rate or None, parameters). memory: bytes by what they are for, in one process without sharding.

    processes: that train. text, image: tokens of a step at most, of all processes.
    """

    recipe: RunRecipe
    sources: list[Source]
    processes: int
    groups: list[tuple[str, float | None, int]]
    memory: dict[str, int]

    @property
    def packs(self) -> int:
        """Per step, on all processes."""
        return self.recipe.optimisation.accumulate * self.processes

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


def make_plan(recipe: RunRecipe, processes: int = 1) -> Plan:
    """Raises UserError for a model or local data that are not there, and for patterns that fit no parameter."""
    total = math.fsum(source.weight for source in recipe.data.sources)
    sources = [_source(source, total) for source in recipe.data.sources]
    model = outline(recipe)
    return Plan(recipe, sources, processes, trained_groups(model, recipe), _memory(model, recipe))


def _source(source: SourceSettings, total: float) -> Source:
    files = None if source.path.startswith(PREFIX) else len(data_files(source.path, source.split))
    return Source(source.path, source.subset, source.weight / total, files)


def _memory(prepared: Any, recipe: RunRecipe) -> dict[str, int]:
    """Bytes that a step holds, for a pack that is full. Work space of kernels, and of a frozen tower, is left out."""
    optimisation, budget = recipe.optimisation, recipe.packing.budget
    model = below_lora(prepared)
    parameters = list(prepared.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    in_trained = _bytes(trained)
    groups = parameter_groups(prepared, optimisation)
    by_muon = sum(_bytes(group["params"]) for group in groups if group.get("muon"))
    found = {
        "weights": _bytes(parameters),
        "gradients": in_trained,
        # AdamW keeps two moments of each weight, as precise as the weight, Muon one
        "moments": 2 * in_trained - by_muon,
    }
    if by_muon:
        found["work space of Muon"] = _MUON_COPIES * min(by_muon, 4 * STACK)
    if optimisation.ema is not None:
        found["averaged weights"] = 4 * sum(parameter.numel() for parameter in trained)
    size = 2 if optimisation.precision == "bfloat16" else 4
    try:
        frame = frame_of(model, _SIDE, _SIDE)
        tokens = math.ceil(budget.image * frame.tokens / frame.connected)
    except UserError:
        tokens = budget.image
    inserted = model.fusion.method == "insertion"
    if not inserted:
        # and as much again for their gradients
        found["keys and values of a pack's images, and their gradients"] = (
            2 * tokens * fused_token_bytes(blocks_of(model), size)
        )
    found |= kept_by_blocks(
        model,
        text=budget.text + (tokens if inserted else 0),
        patches=budget.image * fold_of(model.config) ** 2,
        size=size,
        checkpointed=optimisation.checkpoint_blocks,
    )
    vocabulary = model.config.get_text_config().vocab_size
    found["logits of one chunk, and their gradients"] = 2 * 4 * min(optimisation.loss_chunk, budget.text) * vocabulary
    return found


def _bytes(parameters: list[Any]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
