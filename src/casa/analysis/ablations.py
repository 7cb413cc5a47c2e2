"""Parts taken out of a model while it runs, to see what they do (paper, "Implicit gate", and its comparisons).

with ablated(model, "no-self-attention"):
    model.generate(**inputs)

    no-self-attention     no token sees itself in CASA layers: the implicit gate is gone
    no-random-text        no token sees one other text token, drawn anew for each: what the line above is compared with
    no-text               no text is seen in CASA layers, which leaves plain cross-attention
    no-images             no image token is seen
    shuffled-images       every sample of a batch sees the images of another: the blind control
    no-gate               the tanh gates are zero
    without-layers=3,4    the updates of the fusion layers in blocks 3 and 4 are dropped
    only-layers=0,1       all but those

Insertion models have no fusion layers: of these they know no-images and shuffled-images.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from casa.errors import UserError
from casa.layers import Ablation
from casa.models import CasaForConditionalGeneration
from casa.models.generation import IMAGE_INPUTS
from casa.settings import near

HIDES = {"no-self-attention": "itself", "no-random-text": "random_text", "no-text": "text", "no-images": "images"}
LAYERED = ("without-layers", "only-layers")
ABLATIONS = (*HIDES, "shuffled-images", "no-gate", *LAYERED)


@dataclass(frozen=True)
class NamedAblation:
    """An ablation by its name. blocks: those named by without-layers and only-layers."""

    name: str
    blocks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}={','.join(map(str, self.blocks))}" if self.name in LAYERED else self.name


def parse_ablation(text: str) -> NamedAblation:
    """Reads "no-images" or "without-layers=3,4". Raises UserError for anything else."""
    name, _, value = text.strip().partition("=")
    if name not in ABLATIONS:
        raise UserError(f"there is no ablation {name!r}; {near(name, ABLATIONS, 'there are')}")
    if (name in LAYERED) != bool(value):
        raise UserError(f"{text!r}: blocks are named by without-layers=3,4 and only-layers=0,1, and by these alone.")
    try:
        return NamedAblation(name, tuple(sorted({int(part) for part in value.split(",")})) if value else ())
    except ValueError:
        raise UserError(f"{text!r}: blocks are whole numbers with commas between them, as in {name}=3,4.") from None


@contextmanager
def ablated(model: CasaForConditionalGeneration, *what: str | NamedAblation, seed: int = 0) -> Iterator[None]:
    """Takes parts out of the model inside the `with`; several at once, and nested, add up.

    Args:
        model: Of this library. Whether anything is taken out of it is told by `model.ablation`, and for shuffled-images
            by a forward pre-hook.
        what: Names as in the list above.
        seed: Of what is drawn.

    Raises:
        UserError: A name is unknown, or the model has nothing of the kind.
    """
    named = [parse_ablation(one) if isinstance(one, str) else one for one in what]
    before = model.ablation
    hidden, silent = (set(before.hidden), set(before.silent)) if before is not None else (set(), set())
    for one in named:
        _check(model, one)
        if one.name in HIDES:
            hidden.add(HIDES[one.name])
        elif one.name != "shuffled-images":
            silent |= _silenced(model, one)
    shuffles = any(one.name == "shuffled-images" for one in named)
    hook = model.register_forward_pre_hook(partial(_shuffle, seed), with_kwargs=True) if shuffles else None
    if hidden or silent:
        base = before if before is not None else Ablation(seed=seed)
        model.ablation = replace(base, hidden=frozenset(hidden), silent=frozenset(silent))
    try:
        yield
    finally:
        model.ablation = before
        if hook is not None:
            hook.remove()


def _check(model: CasaForConditionalGeneration, one: NamedAblation) -> None:
    fusion = model.fusion
    if one.name in ("no-images", "shuffled-images"):
        return
    if fusion.method == "insertion":
        raise UserError(f"an insertion model has no fusion layers, which {one} is about; take no-images for it.")
    if one.name in HIDES and fusion.attend == "image":
        raise UserError(f"this model's layers see images alone, and {one} takes text from them; take no-images.")
    if one.name == "no-gate" and fusion.gate is None:
        raise UserError("this model's layers have no gate; the implicit gate is cut by no-self-attention.")


def _silenced(model: CasaForConditionalGeneration, one: NamedAblation) -> set[int]:
    """Numbers of the fusion layers that say nothing."""
    every = set(range(len(model.fused_blocks)))
    if one.name == "no-gate":
        # tanh of zero times the update
        return every
    if missing := [block for block in one.blocks if block not in model.fused_blocks]:
        known = ", ".join(map(str, model.fused_blocks))
        raise UserError(f"block {missing[0]} has no fusion layer; blocks {known} have one.")
    chosen = {model.fused_blocks.index(block) for block in one.blocks}
    return chosen if one.name == "without-layers" else every - chosen


def _shuffle(seed: int, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Gives each row of a batch the images of another one, in its own images' places."""
    places: Tensor | None = kwargs.get("image_positions")
    if places is None or not len(places):
        return None
    assert isinstance(model, CasaForConditionalGeneration)
    rows: list[int] = places[:, 0].tolist()
    chosen = others_images(rows, seed)
    images = {name: kwargs.get(name) for name in IMAGE_INPUTS}
    return args, kwargs | model.picked(images, chosen) | {"image_positions": places}


def others_images(owners: Sequence[int], seed: int = 0) -> list[int]:
    """For each image, the number of one that belongs to another sample, in whose place it is to stand.

    Args:
        owners: The sample that each image belongs to.
        seed: Of the order in which the samples, in a ring, give their images to the next.

    Returns:
        A sample's first image becomes the first of another's, and so on, beginning again where that has fewer.

    Raises:
        UserError: All images belong to one sample.
    """
    samples = sorted(set(owners))
    if len(samples) < 2:
        raise UserError(
            "shuffled images come from other samples of the batch; give a batch of two or more with images."
        )
    generator = torch.Generator().manual_seed(seed)
    ring = [samples[number] for number in torch.randperm(len(samples), generator=generator).tolist()]
    giver = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
    held = {sample: [number for number, owner in enumerate(owners) if owner == sample] for sample in samples}
    met = dict.fromkeys(samples, 0)
    chosen = []
    for owner in owners:
        offered = held[giver[owner]]
        chosen.append(offered[met[owner] % len(offered)])
        met[owner] += 1
    return chosen
