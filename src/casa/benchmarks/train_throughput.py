"""Samples per second in training: packed rows beside padded batches of the same samples, in one run.

    padded     a a a a . . . .        as many rows as a pack holds samples, in the order they came, filled up to the
               b b b b b b b b        longest: every step of the text model is done for the filling as well
               c c . . . . . .
    packed     a a a a b b b b b b b b c c        one row, filled to its budget

Image tokens are made without gradients, and beforehand: the tower sees no padding either way. What packing gains
hangs on how lengths are spread, so two kinds of samples are measured, of each several draws:

    in proportion    one picture each, text in the proportion of the budget
    image stage      the paper's first stage: short questions, pages of text, several pictures, text alone
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from casa.benchmarks.train_models import TINY, fresh_model, most_square, random_pictures
from casa.benchmarks.train_packing import PROPORTIONED
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration
from casa.training.packs import IGNORE_INDEX, Length, Packer, spread_lengths, stage_lengths
from casa.training.samples import BUDGETS, Budget

Batch = dict[str, Tensor]

SAMPLES = 64
BUDGET = Budget(text=512, image=2560)
SCALE = 4  # by which samples of the image stage, and its budget, are made smaller
IMAGE_STAGE = "image stage"
KINDS = {
    PROPORTIONED: BUDGET,
    IMAGE_STAGE: Budget(text=BUDGETS["image"].text // SCALE, image=BUDGETS["image"].image // SCALE),
}


class Drawn:
    """Samples of one picture or none, with random tokens, and the image tokens (N, d_v) of their pictures."""

    def __init__(self, model: CasaForConditionalGeneration, lengths: Sequence[Length], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config().vocab_size
        device = model.device
        self.lengths = lengths
        self.ids: list[Tensor] = []
        self.images: list[dict[str, Tensor]] = []  # empty for text alone
        for length in lengths:
            ids = torch.randint(1, vocabulary, (length.text_tokens,), generator=generator)
            self.ids.append(ids.to(device))
            if not length.image_tokens:
                self.images.append({})
                continue
            pictures = random_pictures(model, [most_square(length.image_tokens)], generator)
            pictures = {name: value.to(device) for name, value in pictures.items()}
            with torch.no_grad():
                found = model.encode_images(**pictures)
            self.images.append({"image_features": found, "image_grid_thw": pictures["image_grid_thw"]})

    def packed(self, chosen: Sequence[int]) -> Batch:
        """Samples in one row."""
        starts = torch.tensor([0, *(len(self.ids[index]) for index in chosen)])[:-1].cumsum(0).tolist()
        labels = [self.ids[index].clone() for index in chosen]
        for each in labels:
            each[0] = IGNORE_INDEX  # nothing predicts the first token of a sample
        return {
            "input_ids": torch.cat([self.ids[index] for index in chosen])[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(len(each)) for each in labels])[None].to(labels[0].device),
            **self._images(chosen, [(0, start) for start in starts]),
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
            labels.append(torch.cat([ids.new_full((empty + 1,), IGNORE_INDEX), ids[1:]]))
            places.append((row, empty))
        return {
            "input_ids": torch.stack(rows),
            "attention_mask": torch.stack(masks),
            "labels": torch.stack(labels),
            **self._images(chosen, places),
        }

    def _images(self, chosen: Sequence[int], places: Sequence[tuple[int, int]]) -> Batch:
        """places: row and token before which each sample's picture stands, if it has one."""
        pairs = zip(chosen, places, strict=True)
        shown = [(self.images[index], place) for index, place in pairs if self.images[index]]
        if not shown:
            return {}
        joined = {name: torch.cat([images[name] for images, _ in shown]) for name in shown[0][0]}
        positions = torch.tensor([place for _, place in shown], device=joined["image_features"].device)
        return {"image_positions": positions, **joined}


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


def drawn_lengths(
    kind: str = PROPORTIONED, samples: int = SAMPLES, budget: Budget = BUDGET, seed: int = 0
) -> list[Length]:
    """Those of the samples that go through packed and padded; some 25 of them fill a pack."""
    if kind == PROPORTIONED:
        return spread_lengths(samples, budget, seed, images=budget.image / 32)
    text, image = BUDGETS["image"].text / budget.text, BUDGETS["image"].image / budget.image
    found = stage_lengths("image", samples, seed)[:samples]
    return [Length(max(2, int(length.text_tokens / text)), int(length.image_tokens / image)) for length in found]


def bench_throughput(
    samples: int = SAMPLES,
    rounds: int = 3,
    draws: int = 3,
    shape: str = TINY,
    device: str = "cpu",
    seed: int = 0,
    budgets: Mapping[str, Budget] | None = None,
) -> dict[str, Any]:
    """Seconds of one pass over the samples, forward and backward, packed and padded, in turns; medians over rounds, for
    each kind of samples and each draw of them.

    budgets: of a pack, by kind. The losses of both ways are the same mean over tokens, which is told along. Raises
    UserError for fewer than two samples, no rounds or no draws.
    """
    if samples < 2 or rounds < 1 or draws < 1:
        raise UserError("give two samples or more, a round or more, and a draw or more.")
    model = fresh_model("casa", shape, device, seed=seed)
    model.encoder.requires_grad_(False)
    kinds: dict[str, Any] = {}
    for kind, budget in (budgets or KINDS).items():
        found = [
            _draw(model, drawn_lengths(kind, samples, budget, each), budget, rounds, each)
            for each in range(seed, seed + draws)
        ]
        usual = round(median(each["packed_over_padded"] for each in found), 2)
        kinds[kind] = {"budget": [budget.text, budget.image], "packed_over_padded": usual, "draws": found}
    return {"settings": {"samples": samples, "rounds": rounds, "shape": shape}, "kinds": kinds}


def _draw(
    model: CasaForConditionalGeneration, lengths: list[Length], budget: Budget, rounds: int, seed: int
) -> dict[str, Any]:
    """The same samples packed and padded, in turns."""
    drawn = Drawn(model, lengths, seed)
    numbers = ways_of(lengths, budget)
    ways = {
        "packed": [drawn.packed(chosen) for chosen in numbers["packed"]],
        "padded": [drawn.padded(chosen) for chosen in numbers["padded"]],
    }
    text = sum(length.text_tokens for length in lengths)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses = {}
    for _ in range(rounds):
        for way, batches in ways.items():
            spent, losses[way] = _pass(model, batches, text - len(lengths))
            seconds[way].append(spent)
    usual = {way: median(times) for way, times in seconds.items()}
    return {
        "seed": seed,
        "text_tokens": text,
        "image_tokens": sum(length.image_tokens for length in lengths),
        "packs": len(numbers["packed"]),
        "rows_of_a_padded_batch": len(numbers["padded"][0]),
        "text_slots": text_slots(lengths, numbers),
        "loss": losses,
        "seconds": {way: round(value, 4) for way, value in usual.items()},
        "samples_per_second": {way: round(len(lengths) / value, 2) for way, value in usual.items()},
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
    """Both ways as aligned lines: each draw of each kind of samples, and what packing gains in the median of draws."""
    titles = f"{'samples/s':16}{'draw':>6}{'packed':>10}{'padded':>10}{'gain':>8}{'text slots':>16}{'loss':>20}"
    lines = [titles]
    for kind, row in found["kinds"].items():
        for draw in row["draws"]:
            pace, slots, loss = draw["samples_per_second"], draw["text_slots"], draw["loss"]
            lines.append(
                f"{kind:16}{draw['seed']:6}{pace['packed']:10,.1f}{pace['padded']:10,.1f}"
                f"{draw['packed_over_padded']:7.2f}x{slots['packed']:8,}{slots['padded']:8,}"
                f"{loss['packed']:10.4f}{loss['padded']:10.4f}"
            )
    usual = [f"{kind} {row['packed_over_padded']:.2f}x" for kind, row in found["kinds"].items()]
    return "\n".join([*lines, f"packed over padded, medians: {', '.join(usual)}"])
