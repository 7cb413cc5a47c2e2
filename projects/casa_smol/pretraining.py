"""Before pictures: the layers learn to find and to say texts, on pages that are never drawn and on pages as read.

    python -m projects.casa_smol.pretraining data/parts --out data/parts/start --read data/read

The layers begin as copies of the text model's attention and say nothing; all of them learn together, by Muon, what the
text model is to say, and four of them where to look (`looking.py`). First come single lines, since all else stands on
reading words one after the other. With pages that the encoder has read (`read_pages.py`), three of five samples are of
those. The run goes on where it was broken off, and takes pages that are there by then; at its end the projector takes
the place of the slots, and a model is written that looks at pictures. With `torchrun --nproc-per-node N` N processes
learn together, each from a batch of its own.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoTokenizer

from casa import adapt
from casa.atomic import replacing
from casa.models.auto import processor_for
from casa.training.optimizer import MuonAdamW
from casa.vision import output_width
from casa.vision.page_encoder import PageEncoder
from projects.casa_smol.looking import ask, look
from projects.casa_smol.perfect_pages import Batch, Pages, Sample, after, batch_of
from projects.casa_smol.read_pages import ReadPages
from projects.casa_smol.start import FUSION, Slots, calm_axes
from projects.casa_smol.tasks.films import PROMPT

POOL = 4  # batches are drawn together, and samples of one length put side by side: less of a step is padding


@dataclass(frozen=True)
class Settings:
    """What makes a run.

    lines: steps at first that see single lines alone. looking: how much it counts where layers look. pages: share of
    samples with more than one line. read: share of pages that the encoder has read, where there are any. films, chats:
    shares of samples that are frames of a session, and of more than one question.
    """

    seed: int = 1
    steps: int = 3000
    batch: int = 16
    rate: float = 5e-3
    lines: int = 225
    looking: float = 0.2
    pages: float = 0.6
    read: float = 0.6
    films: float = 0.1
    chats: float = 0.25
    warm_up: int = 20
    decay: float = 0.2
    keep_every: int = 25


def sample(rng: np.random.Generator, pages: Pages, read_pages: ReadPages | None, settings: Settings) -> Sample:
    """One of the mixture that follows the single lines."""
    is_read, kind = read_pages is not None and rng.random() < settings.read, rng.random()
    if kind < settings.films:
        return pages.film(rng)
    if kind < settings.films + settings.chats:
        one, two = (pages.sample(rng, settings.pages) for _ in range(2))
        return read_pages.chat(rng) if read_pages and is_read else after(two, one, pages.line_break)
    return read_pages.sample(rng) if read_pages and is_read else pages.sample(rng, settings.pages)


def train(model: Any, draw: Callable[[int], Batch], settings: Settings, folder: Path) -> None:
    """Trains the fusion layers, with the text model in bfloat16. draw: a step's batch, by its number."""
    model.bfloat16().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("casa_layers")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices: dict[str, Any] = {"params": [*learned.values()], "muon": True, "parts": [1] * len(learned)}
    optimizer = MuonAdamW([matrices], lr=settings.rate, weight_decay=0.01)
    folder.mkdir(parents=True, exist_ok=True)
    first, kept = 0, folder / "checkpoint.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(state["learned"][name])
    begun, (process, processes) = time.process_time(), rank()
    for step in range(first, settings.steps):
        falling = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, (step + 1) / settings.warm_up, max(0.02, falling))
        nats, missed, right = said(model, draw(step))
        (nats + settings.looking * missed).backward()
        for parameter in learned.values() if processes > 1 else ():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad.div_(processes))
        with torch.autocast("cpu", torch.bfloat16):  # half of what Muon takes, a tenth of a step
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if process:
            continue
        print(json.dumps({"step": step + 1, "seconds": round(time.process_time() - begun), **right}), flush=True)
        if (step + 1) % settings.keep_every == 0 or step + 1 == settings.steps:
            state = {"step": step + 1, "optimizer": optimizer.state_dict(), "settings": asdict(settings)}
            state["learned"] = {name: p.detach() for name, p in learned.items()}
            with replacing(kept) as path:
                torch.save(state, path)


def rank() -> tuple[int, int]:
    """Which process this is, of how many that learn together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def said(model: Any, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
    """How well a batch's answers are foretold, and found.

    Returns:
        Nats an answer token; what layers miss (`look`, `ask`); and shares of first tokens, of all tokens and of whole
        answers that are foretold, and what both of these have found.
    """
    are_said = batch.labels[:, 1:] >= 0
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch.inputs, use_cache=False, logits_to_keep=1, output_hidden_states=True)
        logits = model.decoder.logits(output.hidden_states[-1][:, :-1][are_said])
    wanted = batch.labels[:, 1:][are_said]
    nats = nn.functional.cross_entropy(logits.float(), wanted)
    right = logits.argmax(-1) == wanted
    is_first = (are_said & ~nn.functional.pad(are_said[:, :-1], (1, 0)))[are_said]
    wrong = torch.zeros(int(is_first.sum())).index_add(0, is_first.cumsum(0) - 1, (~right).float())
    shares = {"first": right[is_first], "tokens": right, "exact": wrong == 0}
    told = {"nats": nats.item()} | {name: hit.float().mean().item() for name, hit in shares.items()}
    missed, image = torch.zeros(()), model.projector(batch.inputs["image_features"], batch.inputs["image_grid_thw"])
    for name, known, of in (("found", batch.begins, look), ("asked", batch.asked, ask)):
        if len(known):
            more, told[name] = of(model, output.hidden_states, image, batch)
            missed = missed + more
    return nats, missed, {name: round(value, 3) for name, value in told.items()}


def main(arguments: list[str]) -> int:
    """Trains, and writes a model to begin with."""
    parser = argparse.ArgumentParser(description="Trains fusion layers on pages that are never drawn.")
    parser.add_argument("parts", type=Path, help="folder with text/ and eyes/, by projects.casa_smol.parts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--read", type=Path, help="folder by projects.casa_smol.read_pages, to learn from as well")
    parser.add_argument("--tokens", type=int, default=20_000, help="of text, to find the axes of image tokens on")
    given = parser.parse_args(arguments)
    settings = Settings(steps=given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    process, _ = rank()
    folder, eyes = given.parts / "text", given.parts / "eyes"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    pages = Pages(tokenizer)
    encoder = PageEncoder.from_pretrained(eyes, dtype=torch.float32).eval()
    model: Any = adapt(str(folder), fusion=FUSION, vision=str(eyes)).float().eval()
    read_pages = ReadPages(given.read, tokenizer) if given.read else None

    @lru_cache(maxsize=1)
    def pool(number: int, is_line: bool) -> list[Sample]:
        each = [np.random.default_rng((settings.seed, 1, process, number, at)) for at in range(settings.batch * POOL)]
        drawn = [pages.sample(rng, 0.0) if is_line else sample(rng, pages, read_pages, settings) for rng in each]
        return sorted(drawn, key=lambda one: one.length)

    def draw(step: int) -> Batch:
        rng, (number, turn) = np.random.default_rng((settings.seed, 2, process, step)), divmod(step, POOL)
        part = int(np.random.default_rng((settings.seed, 3, number)).permutation(POOL)[turn])
        some = pool(number, step < settings.lines)[part * settings.batch : (part + 1) * settings.batch]
        return batch_of(some, encoder, rng, empty=rng.random() ** 3)

    # found once: layers that have learned know no others
    if process:
        dist.barrier()
    elif not (axes := given.out / "axes.pt").exists():
        with replacing(axes) as path:
            torch.save(calm_axes(model, [*pages.sentences(np.random.default_rng(11), given.tokens)]), path)
    if dist.is_initialized() and not process:
        dist.barrier()
    slots = Slots(torch.load(given.out / "axes.pt", weights_only=True), encoder.config.word_sizes)
    projector, model.projector = model.projector, slots
    train(model, draw, settings, given.out)
    if process:
        os._exit(0)  # as `casa train` ends one of several processes
    model.projector = projector.float()
    slots.into(model.projector, output_width(encoder.config))
    model.bfloat16().save_pretrained(given.out / "model")
    processor = processor_for(tokenizer, str(eyes))
    processor.stream_prompt, processor.stream_turns = PROMPT, True
    processor.save_pretrained(given.out / "model")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
