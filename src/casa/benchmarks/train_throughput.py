"""Samples per second in training: packed rows beside padded batches of the same samples, in one run.

    padded     a a a a . . . .        as many rows as a pack holds samples, in the order they came, filled up to the
               b b b b b b b b        longest: every step of the text model is done for the filling as well
               c c . . . . . .
    packed     a a a a b b b b b b b b c c        one row, filled to its budget

Image tokens are made without gradients, and beforehand: the tower sees no padding either way.
"""

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from casa.benchmarks.train_models import TINY, fresh_model, most_square, random_pictures
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration
from casa.training.packs import IGNORED, Length, Packer, spread_lengths
from casa.training.samples import Budget

Batch = dict[str, Tensor]

SAMPLES = 64
BUDGET = Budget(text=512, image=2560)


class Drawn:
    """Samples of one picture each, with random tokens, and the image tokens (N, d_v) of their pictures."""

    def __init__(self, model: CasaForConditionalGeneration, lengths: Sequence[Length], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config().vocab_size
        device = model.device
        self.lengths = lengths
        self.ids: list[Tensor] = []
        self.grids: list[Tensor] = []
        self.features: list[Tensor] = []
        for length in lengths:
            ids = torch.randint(1, vocabulary, (length.text_tokens,), generator=generator)
            pictures = random_pictures(model, [most_square(length.image_tokens)], generator)
            with torch.no_grad():
                found = model.encode_images(**{name: value.to(device) for name, value in pictures.items()})
            self.ids.append(ids.to(device))
            self.grids.append(pictures["image_grid_thw"].to(device))
            self.features.append(found)

    def packed(self, chosen: Sequence[int]) -> Batch:
        """Samples in one row."""
        starts = torch.tensor([0, *(len(self.ids[index]) for index in chosen)])[:-1].cumsum(0).tolist()
        labels = [self.ids[index].clone() for index in chosen]
        for each in labels:
            each[0] = IGNORED  # nothing predicts the first token of a sample
        return {
            "input_ids": torch.cat([self.ids[index] for index in chosen])[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(len(each)) for each in labels])[None].to(labels[0].device),
            "image_positions": torch.tensor([(0, start) for start in starts], device=labels[0].device),
            **self._images(chosen),
        }

    def padded(self, chosen: Sequence[int]) -> Batch:
        """A row for each sample, padded on the left."""
        longest = max(len(self.ids[index]) for index in chosen)
        rows, masks, labels, places = [], [], [], []
        for row, index in enumerate(chosen):
            ids = self.ids[index]
            empty = longest - len(ids)
            rows.append(torch.cat([ids.new_zeros(empty), ids]))
            masks.append(torch.cat([ids.new_zeros(empty), torch.ones_like(ids)]))
            labels.append(torch.cat([ids.new_full((empty + 1,), IGNORED), ids[1:]]))
            places.append((row, empty))
        return {
            "input_ids": torch.stack(rows),
            "attention_mask": torch.stack(masks),
            "labels": torch.stack(labels),
            "image_positions": torch.tensor(places, device=rows[0].device),
            **self._images(chosen),
        }

    def _images(self, chosen: Sequence[int]) -> Batch:
        return {
            "image_features": torch.cat([self.features[index] for index in chosen]),
            "image_grid_thw": torch.cat([self.grids[index] for index in chosen]),
        }


def packs_of(lengths: Sequence[Length], budget: Budget) -> list[list[int]]:
    """Numbers of the samples of each pack."""
    packer: Packer = Packer(budget, buffer=len(lengths))
    for length in lengths:
        packer.add(length)
    number = {id(length): index for index, length in enumerate(lengths)}
    found = []
    while len(packer):
        found.append([number[id(length)] for length in packer.pack()])
    return found


def batches_of(count: int, rows: int) -> list[list[int]]:
    """Numbers of the samples of each padded batch, in the order they came."""
    return [list(range(start, min(start + rows, count))) for start in range(0, count, rows)]


def ways_of(lengths: Sequence[Length], budget: Budget) -> dict[str, list[list[int]]]:
    """Numbers of the samples of every batch, packed and padded."""
    packs = packs_of(lengths, budget)
    return {"packed": packs, "padded": batches_of(len(lengths), max(1, round(len(lengths) / len(packs))))}


def text_slots(lengths: Sequence[Length], ways: dict[str, list[list[int]]]) -> dict[str, int]:
    """Text positions that are computed, packed and padded: what the two cost, whatever the clock says."""
    padded = (len(rows) * max(lengths[index].text_tokens for index in rows) for rows in ways["padded"])
    return {"packed": sum(length.text_tokens for length in lengths), "padded": sum(padded)}


def drawn_lengths(samples: int = SAMPLES, budget: Budget = BUDGET, seed: int = 0) -> list[Length]:
    """Those of the samples that go through packed and padded: about 25 of them fill a pack."""
    return spread_lengths(samples, budget, seed, images=budget.image / 32)


def bench_throughput(
    samples: int = SAMPLES,
    budget: Budget = BUDGET,
    rounds: int = 3,
    shape: str = TINY,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds of one pass over the samples, forward and backward, packed and padded, in turns; medians over rounds.

    budget: of a pack; the samples' lengths are spread as the paper's are, in proportion to it. The losses of both are
    the same mean over tokens, which is told along. Raises UserError for fewer than two samples, or no rounds.
    """
    if samples < 2 or rounds < 1:
        raise UserError("give two samples or more, and a round or more.")
    model = fresh_model("casa", shape, device, seed=seed)
    model.encoder.requires_grad_(False)
    drawn = Drawn(model, drawn_lengths(samples, budget, seed), seed)
    numbers = ways_of(drawn.lengths, budget)
    ways = {
        "packed": [drawn.packed(chosen) for chosen in numbers["packed"]],
        "padded": [drawn.padded(chosen) for chosen in numbers["padded"]],
    }
    learned = sum(length.text_tokens - 1 for length in drawn.lengths)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses = {}
    for _ in range(rounds):
        for way, batches in ways.items():
            spent, losses[way] = _pass(model, batches, learned)
            seconds[way].append(spent)
    text = sum(length.text_tokens for length in drawn.lengths)
    usual = {way: median(times) for way, times in seconds.items()}
    return {
        "settings": {
            "samples": samples,
            "text_tokens": text,
            "image_tokens": sum(length.image_tokens for length in drawn.lengths),
            "budget": [budget.text, budget.image],
            "rounds": rounds,
            "shape": shape,
            "packs": len(numbers["packed"]),
            "rows_of_a_padded_batch": len(numbers["padded"][0]),
        },
        "text_slots": text_slots(drawn.lengths, numbers),
        "loss": losses,
        "seconds": {way: round(value, 4) for way, value in usual.items()},
        "samples_per_second": {way: round(samples / value, 2) for way, value in usual.items()},
        "text_tokens_per_second": {way: round(text / value, 1) for way, value in usual.items()},
        "packed_over_padded": round(usual["padded"] / usual["packed"], 2),
    }


def _pass(model: CasaForConditionalGeneration, batches: Sequence[Batch], learned: int) -> tuple[float, float]:
    """Seconds of forward and backward over all batches, and the mean loss of the learned tokens."""
    _wait(model.device)
    began, total = time.perf_counter(), 0.0
    for loss in _losses(model, batches, learned):
        loss.backward()
        total += float(loss.detach())
    _wait(model.device)
    spent = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return spent, total


def _losses(model: CasaForConditionalGeneration, batches: Sequence[Batch], learned: int) -> Iterator[Tensor]:
    for batch in batches:
        yield model(**batch, use_cache=False, num_items_in_batch=learned).loss


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def throughput_table(found: dict[str, Any]) -> str:
    """Both ways as aligned lines."""
    lines = [f"{'':8}{'samples/s':>12}{'text tokens/s':>16}{'text slots':>12}{'loss':>10}"]
    for way in ("packed", "padded"):
        lines.append(
            f"{way:8}{found['samples_per_second'][way]:12,.1f}{found['text_tokens_per_second'][way]:16,.0f}"
            f"{found['text_slots'][way]:12,}{found['loss'][way]:10.4f}"
        )
    return "\n".join([*lines, f"packed over padded: {found['packed_over_padded']:.2f}x"])
