"""Before pictures: the layers learn to find and to say texts on pages that are never drawn.

    python -m projects.casa_smol.pretraining data/parts --out data/parts/start
    python -m projects.casa_smol.pretraining data/parts --out data/parts/start --read data/read --steps 3000

First each layer learns where to look, on hidden states kept once (`finding.py`), from the first layer to the last; then
all of them learn together what to say, and go on learning where to look (`looking.py`). With pages that the encoder has
read (`read_pages.py`), three of five samples are of those. The run goes on where it was broken off; at its end the
encoder takes the place of the perfect tokens, and a model is written with which `casa train` goes on. With
`torchrun --nproc-per-node N` N processes learn together, each from a batch of its own.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from casa import adapt
from casa.atomic import replacing
from casa.models.auto import processor_for
from casa.vision import output_width
from casa.vision.page_encoder import CODE_STEP, PageEncoder
from projects.casa_smol.closed_form import Closed, begin_asking, share_asked
from projects.casa_smol.finding import LEARNING, Finder, Kept, keep, say_found
from projects.casa_smol.looking import look
from projects.casa_smol.parts import embeddings_of
from projects.casa_smol.perfect_pages import Batch, Pages, Sample, after, batch_of, names_of
from projects.casa_smol.read_pages import ReadPages
from projects.casa_smol.start import FUSION, STAGES, Slots, Stage, Start, start_of
from projects.casa_smol.tasks.films import PROMPT

POOL = 4  # batches are drawn together, and samples of one length put side by side: less of a step is padding


@dataclass(frozen=True)
class Settings:
    """What makes a run.

    finding: samples on which layers learn where to look, and steps on them, till others are drawn. looking: how much a
    layer's look at the right place counts beside what is said, when all learn together. qk: how much slower
    queries, keys and the first layer learn then, since they are nearly right. pages: share of samples with more than
    one line. read: share of pages that the encoder has read, where there are any. films, chats: shares of samples that
    are frames of a session, and of more than one question, when all learn together.
    """

    seed: int = 1
    finding: tuple[int, int] = (2_000, 60)
    steps: int = 300
    batch: int = 16
    rate: float = 5e-4
    looking: float = 0.1
    qk: float = 0.6
    pages: float = 0.7
    read: float = 0.6
    films: float = 0.1
    chats: float = 0.25
    warm_up: int = 20
    decay: float = 0.3
    keep_every: int = 25


@dataclass(frozen=True)
class Draws(Dataset[Sample]):
    """Samples by number, without an end. found: only pages without films and chats, whose answers' places are known."""

    pages: Pages
    read_pages: ReadPages | None
    settings: Settings
    seed: tuple[int, ...]
    found: bool = False

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> Sample:
        settings, pages, read_pages = self.settings, self.pages, self.read_pages
        rng = np.random.default_rng((settings.seed, *self.seed, number))
        is_read, kind = read_pages is not None and rng.random() < settings.read, 1.0 if self.found else rng.random()
        if kind < settings.films:
            return pages.film(rng)
        if kind < settings.films + settings.chats:
            one, two = (pages.sample(rng, settings.pages) for _ in range(2))
            return read_pages.chat(rng) if read_pages and is_read else after(two, one, pages.line_break)
        if read_pages and is_read:
            return read_pages.sample(rng, self.found)
        return pages.sample(rng, settings.pages)


def rounds(draws: Draws) -> Iterator[list[Sample]]:
    """Samples of one round after the other, drawn by a process beside: that takes as long as a model's lower blocks."""
    yield from DataLoader(draws, draws.settings.finding[0], num_workers=1, prefetch_factor=1, collate_fn=list)


def find(
    model: Any,
    start: Start,
    encoder: PageEncoder,
    drawn: Iterator[Sequence[Sample]],
    closed: Closed,
    settings: Settings,
    folder: Path,
    stages: Sequence[Stage] = STAGES,
) -> None:
    """Sets all layers of a model, stage by stage; layers that `folder` has are taken from there. drawn: by round."""
    start.hand_on(model)
    files = {block: folder / f"layer-{block}.pt" for roles, _ in stages for block in roles}
    for block, file in files.items():
        if file.exists():
            model.casa_layers[str(block)].load_state_dict(torch.load(file, weights_only=True))
    for number, (roles, is_aloud) in enumerate(stages):
        missing = [block for block in roles if not files[block].exists()]
        finders, kept = dict[int, Finder](), list[Kept]()
        for turn in range(max([LEARNING[roles[block]][1] for block in missing], default=0)):
            kept = keep(model, start.slots, encoder, next(drawn), missing, seed=100 * number + turn)
            for block in missing:
                layer, role, (rate, turns) = model.casa_layers[str(block)], roles[block], LEARNING[roles[block]]
                if turn == 0:
                    begin_asking(layer, block, role, kept, closed)
                    steps = turns * settings.finding[1]
                    finders[block] = Finder(layer, block, start.gains[block], role, steps, rate)
                if turn < turns:
                    missed, share = finders[block].learn(kept, settings.finding[1])
                    line = {"layer": block, "role": role, "step": finders[block].step}
                    print(json.dumps(line | {"missed": round(missed, 3), "found": round(share, 3)}), flush=True)
        for place, (block, role) in enumerate(roles.items()):
            if block not in missing:
                continue
            layer = model.casa_layers[str(block)]
            if role == "asked":
                share_asked(layer)
            else:
                say_found(layer, block, role, kept, start, place % 2, is_aloud)
            with replacing(files[block]) as path:
                torch.save(layer.state_dict(), path)


def train(
    model: Any, draw: Callable[[int], Batch], settings: Settings, folder: Path, stages: Sequence[Stage] = STAGES
) -> None:
    """Trains what fusion added, with the text model in bfloat16. draw: from a step's number."""
    roles = {block: role for some, _ in stages for block, role in some.items() if role != "asked"}
    model.bfloat16().train()
    slow, fast = [], []
    first_layer = f"casa_layers.{min(map(int, model.casa_layers))}."
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("casa_layers")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            (slow if "q_proj" in name or "k_proj" in name or name.startswith(first_layer) else fast).append(parameter)
    groups = [{"params": slow, "share": settings.qk}, {"params": fast, "share": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
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
            group["lr"] = settings.rate * group["share"] * min(1.0, (step + 1) / settings.warm_up, max(0.02, falling))
        batch = draw(step)
        nats, missed, right = said(model, batch, roles)
        (nats + settings.looking * missed).backward()
        for parameter in learned.values() if processes > 1 else ():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad.div_(processes))
        nn.utils.clip_grad_norm_([*slow, *fast], 1.0)
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


def said(model: Any, batch: Batch, roles: Mapping[int, str]) -> tuple[Tensor, Tensor, dict[str, float]]:
    """How well a batch's answers are foretold, and found. roles: of layers, by block.

    Returns:
        Nats an answer token; what layers miss (`look`); and shares of first tokens, of all tokens and of whole answers
        that are right, and of words that a layer finds.
    """
    are_said = batch.labels[:, 1:] >= 0
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch.inputs, use_cache=False, logits_to_keep=1, output_hidden_states=True)
        logits = model.decoder.logits(output.hidden_states[-1][:, :-1][are_said])
    labels = batch.labels[:, 1:][are_said]
    nats = nn.functional.cross_entropy(logits.float(), labels)
    right = logits.argmax(-1) == labels
    is_first = (are_said & ~nn.functional.pad(are_said[:, :-1], (1, 0)))[are_said]
    wrong = torch.zeros(int(is_first.sum())).index_add(0, is_first.cumsum(0) - 1, (~right).float())
    shares = {"first": right[is_first], "tokens": right, "exact": wrong == 0}
    told = {"nats": nats.item()} | {name: hit.float().mean().item() for name, hit in shares.items()}
    image = model.projector(batch.inputs["image_features"], batch.inputs["image_grid_thw"])
    missed, found = look(model, roles, output.hidden_states, image, batch)
    told["found"] = sum(found.values()) / len(found)
    return nats, missed, {name: round(value, 3) for name, value in told.items()}


def main(arguments: list[str]) -> int:
    """Trains, and writes a model to begin with."""
    parser = argparse.ArgumentParser(description="Trains fusion layers on pages that are never drawn.")
    parser.add_argument("parts", type=Path, help="folder with text/ and eyes/, by projects.casa_smol.parts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument(
        "--finding", type=int, nargs=2, default=Settings.finding, help="samples of a round, and steps on them"
    )
    parser.add_argument("--read", type=Path, help="folder by projects.casa_smol.read_pages, to learn from as well")
    parser.add_argument("--tokens", type=int, default=20_000, help="of text, to fit codes on")
    given = parser.parse_args(arguments)
    settings = Settings(steps=given.steps, finding=tuple(given.finding))
    given.out.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    process, _ = rank()
    folder, eyes = given.parts / "text", given.parts / "eyes"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    pages = Pages(tokenizer)
    encoder = PageEncoder.from_pretrained(eyes, dtype=torch.float32).eval()
    model: Any = adapt(str(folder), fusion=FUSION, vision=str(eyes)).float().eval()

    read_pages = ReadPages(given.read, tokenizer, pages.shared) if given.read else None

    @lru_cache(maxsize=1)
    def pool(number: int) -> list[Sample]:
        some = Draws(pages, read_pages, settings, (1, process, number))
        return sorted((some[place] for place in range(settings.batch * POOL)), key=lambda one: one.length)

    def draw(step: int) -> Batch:
        rng, (number, turn) = np.random.default_rng((settings.seed, 2, process, step)), divmod(step, POOL)
        part = int(np.random.default_rng((settings.seed, 3, number)).permutation(POOL)[turn])
        some = pool(number)[part * settings.batch : (part + 1) * settings.batch]
        return batch_of(some, encoder, rng, empty=rng.random() ** 3)

    codes, sizes = encoder.word_codes.float() * CODE_STEP, encoder.config.word_sizes
    if process:  # what the first one finds, the others read
        dist.barrier()
    known = given.out / "start.pt"
    if not known.exists():  # minutes, which a run that goes on need not take again
        texts = list(pages.sentences(np.random.default_rng(11), given.tokens))
        written, names = draw(0).inputs["image_features"], names_of(tokenizer)
        found = start_of(model, texts, codes, embeddings_of(folder), sizes, written, names)
        with replacing(known) as path:
            torch.save(vars(found) | {"slots": found.slots.axes}, path)
    parts = torch.load(known, weights_only=True)
    start = Start(**parts | {"slots": Slots(parts["slots"], sizes)})
    closed = Closed(start, line_break=pages.line_break)
    find(
        model, start, encoder, rounds(Draws(pages, read_pages, settings, (0,), found=True)), closed, settings, given.out
    )
    if dist.is_initialized() and not process:
        dist.barrier()
    projector, model.projector = model.projector, start.slots
    train(model, draw, settings, given.out)
    if process:
        return 0
    model.projector = projector.float()
    start.slots.into(model.projector, output_width(encoder.config))
    model.bfloat16().save_pretrained(given.out / "model")
    processor = processor_for(tokenizer, str(eyes))
    processor.stream_prompt, processor.stream_turns = PROMPT, True
    processor.save_pretrained(given.out / "model")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
