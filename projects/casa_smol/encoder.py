"""Stage 1: the page encoder, trained on dense targets.

    python -m projects.casa_smol.encoder runs/page-encoder --steps 40000
    python -m projects.casa_smol.encoder runs/longer --steps 40000 --start runs/page-encoder

The second command is a new run that begins with the first one's weights, or with a file of `weights.py`. A cell is told
which character stands there, and which ones stand around it, so that reading mends what one cell alone has missed.

Every batch is a function of seed and step, so a run that was killed goes on from its last checkpoint and ends with the
same weights, bit for bit, as one that was not. `--steps` may be changed underway: the rate falls over the last part.
Runs beside other work with `OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 nice -n 19`.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from casa.atomic import replacing, write_text
from casa.errors import UserError
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig
from casa.vision.page_reading import FOLLOWING
from projects.casa_smol.canvas import COLOURS, Glyphs
from projects.casa_smol.fonts import CHARACTERS
from projects.casa_smol.targets import NO_INK, UNKNOWN, Targets, page

Batch = dict[str, Tensor]
LOSS_WEIGHTS = {"classes": 1.0, "middles": 0.5, "inks": 0.1, "grounds": 0.1, "around": 0.5}


@dataclass(frozen=True)
class Settings:
    """What makes a run.

    shapes: (pages, width, height) of a batch, taken in turn. hidden_size, dilations, stem_sizes: the encoder's.
    decay: the last share of the steps, over which the rate falls to nothing. ema: of the weights that are kept.
    """

    seed: int = 1
    steps: int = 40000
    shapes: tuple[tuple[int, int, int], ...] = ((4, 256, 256), (4, 256, 256), (3, 384, 224), (1, 512, 512))
    hidden_size: int = 128
    dilations: tuple[int, ...] = (1, 2, 1, 3, 1, 2, 1, 3, 2, 4, 8, 4)
    stem_sizes: tuple[int, int] = (32, 64)
    rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    warm_up: int = 40
    decay: float = 0.3
    ema: float = 0.999
    bf16: bool = True
    keep_every: int = 250
    score_every: int = 2000
    score_pages: int = 48

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warm_up, max(0.01, falling))

    def encoder(self) -> PageEncoderConfig:
        """Config of the encoder in training."""
        return PageEncoderConfig(
            characters=CHARACTERS,
            stem_sizes=self.stem_sizes,
            hidden_size=self.hidden_size,
            dilations=self.dilations,
            batch_norm=True,
        )


class Heads(nn.Module):
    """What is asked of a cell beside its class: whether a character has its middle there, its ink, its ground."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.middles = nn.Conv2d(width, 1, 1)
        self.inks = nn.Conv2d(width, len(COLOURS), 1)
        self.grounds = nn.Conv2d(width, len(COLOURS), 1)


class Learner(nn.Module):
    """Encoder and heads as one."""

    def __init__(self, config: PageEncoderConfig) -> None:
        super().__init__()
        self.encoder = PageEncoder(config)
        self.heads = Heads(config.hidden_size)
        self.around = nn.Linear(config.hidden_size, (1 + FOLLOWING) * config.classes)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """uint8 (n, H, W, 3) to logits (n, classes, R, C) by the names of the targets."""
        config = self.encoder.config
        mean, std = (
            pictures.new_tensor(list(values), dtype=torch.float32) for values in (config.image_mean, config.image_std)
        )
        seen = ((pictures / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        cells = self.encoder(seen)
        found = {"cells": cells, "classes": self.encoder.classifier(cells)}
        return found | {name: head(cells) for name, head in self.heads.named_children()}

    def reader(self) -> PageEncoder:
        """The encoder with what reading needs, BatchNorm worked into its convolutions; inks and grounds are left."""
        config = PageEncoderConfig.from_dict(self.encoder.config.to_dict() | {"reads": True})
        whole = PageEncoder(config)
        whole.load_state_dict(self.encoder.state_dict(), strict=False)
        whole.middles.load_state_dict(self.heads.middles.state_dict())
        whole.around.load_state_dict(self.around.state_dict())
        return whole.folded()

    def around_loss(self, cells: Tensor, batch: Batch) -> Tensor:
        """Nats of a character beside another, in all cells that are told which these are."""
        wanted = batch["around"].permute(0, 2, 3, 1)
        there = (wanted != UNKNOWN).any(-1) & (batch["classes"] > 0)
        wanted = wanted[there].long()
        guessed = self.around(cells.permute(0, 2, 3, 1)[there]).unflatten(-1, (1 + FOLLOWING, -1))
        # a batch of empty pages has none
        nats = nn.functional.cross_entropy(
            guessed.flatten(0, 1).float(), wanted.flatten(), ignore_index=UNKNOWN, reduction="sum"
        )
        return nats / (wanted != UNKNOWN).sum().clamp(min=1)


def losses(found: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Each target's own loss; LOSS_WEIGHTS says how they add up."""
    weights = batch["weights"]
    each = nn.functional.cross_entropy(found["classes"].float(), batch["classes"].long(), reduction="none")
    seen = (weights > 0).float()
    middle = nn.functional.binary_cross_entropy_with_logits(
        found["middles"].float()[:, 0], batch["middles"].float(), reduction="none", pos_weight=torch.tensor(3.0)
    )
    inks = nn.functional.cross_entropy(
        found["inks"].float(), batch["inks"].long(), ignore_index=NO_INK, reduction="sum"
    )
    return {
        "classes": (each * weights).sum() / weights.sum(),
        "middles": (middle * seen).sum() / seen.sum(),
        "inks": inks / (batch["inks"] != NO_INK).sum().clamp(min=1),
        "grounds": nn.functional.cross_entropy(found["grounds"].float(), batch["grounds"].long()),
    }


class Pages(Dataset[Batch]):
    """Training batches by step."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> Batch:
        settings = self.settings
        count, width, height = settings.shapes[step % len(settings.shapes)]
        return stacked([page((settings.seed, step, number), (width, height)) for number in range(count)])


def stacked(pages: list[tuple[np.ndarray, Targets, Glyphs]]) -> Batch:
    """Pages of one size as a batch: pictures, and the maps of their targets."""
    names = ("classes", "weights", "middles", "inks", "grounds", "around")
    batch = {name: torch.from_numpy(np.stack([getattr(targets, name) for _, targets, _ in pages])) for name in names}
    return batch | {"pictures": torch.from_numpy(np.stack([picture for picture, _, _ in pages]))}


@torch.no_grad()
def scores(learner: Learner, settings: Settings, split: str, worn_by: float) -> dict[str, float]:
    """Characters and words read rightly where they are known to stand, on pages of a split's fonts and words.

    "folded" takes letters alike but for case, and I l 1 |, O 0, as the same. inks: colours, over characters.
    """
    learner.eval()
    right, folded, words, inks = [], [], [], []
    for number in range(settings.score_pages):
        picture, targets, _ = page((settings.seed, 987654321, number), (256, 256), split, worn_by)
        if not len(targets.centres):
            continue
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            found = learner(torch.from_numpy(picture)[None])
        row, column, wanted, word = targets.centres.T
        read = found["classes"][0].argmax(0).numpy()[row, column]
        ink = found["inks"][0].argmax(0).numpy()[row, column]
        letters = word >= 0
        hits = (read == wanted)[letters]
        right.append(hits)
        folded.append(FOLDED[read[letters]] == FOLDED[wanted[letters]])
        inks.append((ink == targets.inks[row, column])[letters])
        words += [hits[word[letters] == one].all() for one in np.unique(word[letters])]
    learner.train()
    parts = {"characters": right, "folded": folded, "inks": inks}
    return {name: round(float(np.concatenate(part).mean()), 4) for name, part in parts.items()} | {
        "words": round(float(np.mean(words)), 4)
    }


def _fold(character: str) -> str:
    return {"i": "l", "1": "l", "|": "l", "0": "o", "–": "-", "×": "x", "•": "."}.get(
        character.lower(), character.lower()
    )


FOLDED = np.array([0, *(1 + "".join(map(_fold, CHARACTERS)).index(_fold(c)) for c in CHARACTERS)])


@dataclass
class Run:
    """A training under way: what a checkpoint holds."""

    settings: Settings
    learner: Learner
    average: Learner
    optimiser: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def start(settings: Settings) -> "Run":
        """A run at step 0, its weights by the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            learner, average = (Learner(settings.encoder()) for _ in range(2))
        average.load_state_dict(learner.state_dict())
        for module in (learner, average):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        matrices = [p for p in learner.parameters() if p.dim() > 1]
        others = [p for p in learner.parameters() if p.dim() <= 1]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(
            groups, lr=settings.rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        return Run(settings, learner, average, optimiser)

    @staticmethod
    def at(folder: Path, settings: Settings) -> "Run":
        """The run of a folder where it stopped, or a new one. Raises UserError for a run of other settings."""
        run, file = Run.start(settings), folder / "checkpoint.pt"
        if file.exists():
            kept = torch.load(file, weights_only=True)
            if kept["settings"] != _told(settings):
                raise UserError(f"{folder} holds a run of other settings; give another folder.")
            for name in ("learner", "average", "optimiser"):
                getattr(run, name).load_state_dict(kept[name])
            run.step, run.seconds, run.log = kept["step"], kept["seconds"], kept["log"]
        return run

    def take(self, start: Path) -> None:
        """Begins with the weights of another run's folder, or of a file of `weights.py`, where it has them.

        Blocks that these lack change nothing at first.
        """
        if start.is_dir():
            kept = torch.load(start / "checkpoint.pt", weights_only=True)["average"]
        else:
            kept = {_in_learner(name): tensor.float() for name, tensor in load_file(start).items()}
        lacking, further = self.learner.load_state_dict(kept, strict=False)
        with torch.no_grad():
            for name in lacking:
                if name.startswith("encoder.blocks.") and name.endswith("mix.1.weight"):
                    self.learner.get_parameter(name).zero_()
        if further:  # biases of convolutions that BatchNorm was worked into
            _, width, height = self.settings.shapes[0]
            seen = stacked([page((self.settings.seed, 987654320, number), (width, height)) for number in range(16)])
            _unfold(self.learner, {name: kept[name] for name in further}, seen["pictures"])
        self.average.load_state_dict(self.learner.state_dict())

    def keep(self, folder: Path) -> None:
        """Writes the checkpoint and the log, each whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in ("learner", "average", "optimiser")}
        told = {"settings": _told(self.settings), "step": self.step, "seconds": self.seconds, "log": self.log}
        with replacing(folder / "checkpoint.pt") as path:
            torch.save(state | told, path)
        write_text(folder / "log.json", json.dumps(told, indent=1) + "\n")

    def learn(self, batch: Batch) -> dict[str, float]:
        """One step; the losses before it."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate_at(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            found = self.learner(batch["pictures"])
            around = self.learner.around_loss(found["cells"], batch)
        parts = losses(found, batch) | {"around": around}
        torch.stack([LOSS_WEIGHTS[name] * part for name, part in parts.items()]).sum().backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), self.settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        share = 1 - min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, new in zip(self.average.state_dict().values(), self.learner.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(new, share)
        return {name: part.item() for name, part in parts.items()}


def _in_learner(name: str) -> str:
    """The name in a `Learner` of a weight of an exported encoder."""
    return {"middles": "heads.", "around": ""}.get(name.split(".")[0], "encoder.") + name


@torch.no_grad()
def _unfold(learner: Learner, biases: dict[str, Tensor], pictures: Tensor) -> None:
    """Gives convolutions the BatchNorm back that was worked into them: on these pictures they compute what they did."""

    def restored(pair: Any, given: tuple[Tensor], _: Tensor, bias: Tensor | None) -> Tensor:
        conv, norm = pair
        found = conv(given[0])
        variance, mean = torch.var_mean(found, (0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        if bias is not None:
            norm.weight.copy_((variance + norm.eps).sqrt())
            norm.bias.copy_(mean + bias)
        return norm(found)

    hooks = [
        module.register_forward_hook(partial(restored, bias=biases.get(f"{name}.0.bias")))
        for name, module in learner.named_modules()
        if isinstance(module, nn.Sequential)
    ]
    learner.eval()(pictures)
    for hook in hooks:
        hook.remove()
    learner.train()


def _told(settings: Settings) -> dict[str, Any]:
    """Settings as JSON has them, without what may change underway."""
    free = ("steps", "decay", "keep_every", "score_every", "score_pages")
    return {name: value for name, value in json.loads(json.dumps(asdict(settings))).items() if name not in free}


def batches(settings: Settings, start: int, stop: int, workers: int) -> Iterator[Batch]:
    """Training batches of the steps from `start` to `stop`, made ahead by processes of their own."""
    ahead: dict[str, Any] = {"prefetch_factor": 8} if workers else {}
    order = range(start, stop)
    return iter(DataLoader(Pages(settings), batch_size=None, sampler=order, num_workers=workers, **ahead))


def train(
    folder: Path,
    settings: Settings,
    workers: int = 1,
    score: bool = True,
    stop: int | None = None,
    start: Path | None = None,
) -> Run:
    """Trains to the settings' last step, or to `stop` before it, going on from what is in the folder.

    start: folder of a run, or file of weights, that a new one begins with.
    """
    stop = settings.steps if stop is None else min(stop, settings.steps)
    folder.mkdir(parents=True, exist_ok=True)
    run, sums, began = Run.at(folder, settings), {}, time.process_time()
    since = run.step
    if start is not None and run.step == 0:
        run.take(start)
    for batch in batches(settings, run.step, stop, workers):
        for name, loss in run.learn(batch).items():
            sums[name] = sums.get(name, 0.0) + loss
        last = run.step == stop
        if run.step % settings.keep_every == 0 or last:
            now = time.process_time()
            run.seconds, began = round(run.seconds + now - began, 1), now
            line: dict[str, Any] = {"step": run.step, "seconds": run.seconds}
            line |= {name: round(total / (run.step - since), 4) for name, total in sums.items()}
            if score and (run.step % settings.score_every == 0 or last):
                line["held_out"] = scores(run.average, settings, "held_out", 1.0)
                line["held_out_clean"] = scores(run.average, settings, "held_out", 0.0)
                line["seen"] = scores(run.average, settings, "train", 1.0)
                began = time.process_time()
            run.log.append(line)
            run.keep(folder)
            print(json.dumps(line), flush=True)
            sums, since = {}, run.step
    return run


def main(arguments: list[str]) -> int:
    """Trains from the command line."""
    parser = argparse.ArgumentParser(description="Trains the page encoder on pages drawn by seed.")
    parser.add_argument("out", type=Path, help="folder of the run; one that was broken off goes on")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--stop", type=int, help="the step to stop at for now, before the last")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--start", type=Path, help="folder of a run, or file of weights, to begin with")
    parser.add_argument("--tiny", action="store_true", help="a setting of seconds, to try the command")
    given = parser.parse_args(arguments)
    settings = Settings(seed=given.seed, steps=given.steps)
    if given.start is not None:  # what is learned is not to be shaken
        settings = replace(settings, rate=1e-3, warm_up=300, decay=0.5)
    if given.tiny:
        settings = replace(
            settings,
            shapes=((1, 64, 64),),
            hidden_size=8,
            stem_sizes=(4, 4),
            dilations=(1,),
            keep_every=2,
            score_pages=2,
        )
    try:
        train(
            given.out,
            settings,
            workers=0 if given.tiny else 1,
            score=not given.tiny,
            stop=given.stop,
            start=given.start,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
