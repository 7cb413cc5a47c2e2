"""Before pictures: the layers learn to find and to say texts on pages that are never drawn.

    python -m projects.casa_smol.pretraining data/parts --out data/parts/start

A page is a grid of image tokens of which each says without fault which words begin in it: what the encoder is trained
to give. So a step costs nothing but the text model's own arithmetic, and where an answer's next word stands is known.
That is a second loss beside the one of the words: attention of the layers that speak is to be where the word is.
Layers begin as in `start.py`. The run goes on where it was broken off; at its end the encoder takes the place of the
perfect tokens, and a model is written with which `casa train` goes on.

Shapes: B samples, L text tokens of a row, N image tokens of all pages, D width, S slots (1 + BEGUN), K answer tokens
whose place on the page is known.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from transformers import AutoTokenizer

from casa import FusionConfig, adapt
from casa.atomic import replacing
from casa.models.auto import processor_for
from casa.vision.page_encoder import CELL, CODE_STEP, PageEncoder, place_waves
from casa.vision.page_reading import TextRun
from casa.vision.page_words import words_of_page
from projects.casa_smol.parts import embeddings_of
from projects.casa_smol.start import LAYERS, TELLING, Sentence, Slots, Strengths, begin, codes_of_words
from projects.casa_smol.targets import page
from projects.casa_smol.tasks.asked import ordinal, turn
from projects.casa_smol.tasks.lines import READ, READ_AFTER, READ_BEFORE, READ_LAST, READ_NUMBERED
from projects.casa_smol.words import Words, pick

TOKEN = 16  # px, height and width of an image token
PROMPT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
VALUE = ("What is the {key}?", "{key}?", "Tell me the {key}.", "What does it say for {key}?", "How much is the {key}?")
WORDINGS = (*READ, *READ_NUMBERED, *READ_AFTER, *READ_BEFORE, *READ_LAST, *VALUE)
FUSION = FusionConfig.parallel(layers=LAYERS, output="zero")
POINTING = ("first", "last", "top", "bottom")  # words of wordings that say which text is meant


@dataclass(frozen=True)
class Settings:
    """What makes a run. qk: how much slower queries, keys and the first layer learn, which are right from the start.

    attention: weight of the second loss. noise: of an image token's codes, in lengths of one.
    """

    seed: int = 1
    steps: int = 300
    batch: int = 12
    rate: float = 5e-4
    qk: float = 0.04
    attention: float = 0.5
    noise: float = 0.1
    pages: float = 0.6
    warm_up: int = 20
    decay: float = 0.4
    keep_every: int = 25


@dataclass(frozen=True)
class Sample:
    """A page and a question.

    ids: int (rows, columns, ids of an image token), what is written there. prompt, answer: token ids. wanted: which of
    the prompt's tokens this question does not share with others. found: for each answer token the image token in which
    it begins and its number there, -1 where that is not known.
    """

    ids: np.ndarray
    prompt: list[int]
    answer: list[int]
    wanted: list[bool]
    found: list[tuple[int, int]]


class Pages:
    """Draws samples: one line, lines one below the other, or names with their values, all in `token` ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.words = Words("train")
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        fixed = [part for wording in (*WORDINGS, PROMPT) for part in re.split(r"\{\w+\}", wording)]
        self.shared = {token for part in fixed for token, _ in self._encode(part)}
        self.shared -= {token for word in POINTING for token, _ in self._encode(f" {word}")}

    def _encode(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Ids, each with where in the text it begins and ends."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def _text(self, rng: Generator, most: int) -> str:
        count = int(rng.integers(1, most + 1))
        text = " ".join(self.words.styled(rng) if rng.random() < 0.85 else self.words.piece(rng) for _ in range(count))
        return text[:1].upper() + text[1:] if rng.random() < 0.4 else text

    def sample(self, rng: Generator, pages: float) -> Sample:
        """One page of the next kind."""
        if rng.random() >= pages:
            return self._asked(rng, [(self._text(rng, 6), 0, 0.0)], int(rng.integers(14, 40)), READ, 0, {})
        size = int(rng.integers(12, 22))
        count = int(rng.integers(2, 11))
        if rng.random() < 0.6:
            texts = list(dict.fromkeys(self._text(rng, 4) for _ in range(count)))
            placed = [(text, row, 0.0) for row, text in enumerate(texts)]
            row = int(rng.integers(len(texts)))
            kinds = [(READ_NUMBERED, row)] * 3 + [(READ_LAST, len(texts) - 1)]
            kinds += [(READ_AFTER, row + 1)] * 2 if row + 1 < len(texts) else []
            kinds += [(READ_BEFORE, row - 1)] if row else []
            wordings, answer = pick(rng, kinds)
            names = {"n": row + 1, "nth": ordinal(row + 1), "line": texts[row]}
            return self._asked(rng, placed, size, wordings, answer, names)
        keys = list(dict.fromkeys(self.words.phrase(rng, 1, 2) for _ in range(count)))
        values = [self.words.piece(rng) if rng.random() < 0.7 else self.words.phrase(rng, 1, 2) for _ in keys]
        right = max(map(len, keys)) * size * 0.5 + rng.uniform(8, 120)
        colon = ":" if rng.random() < 0.4 else ""
        placed = [(key + colon, row, 0.0) for row, key in enumerate(keys)]
        placed += [(value, row, right) for row, value in enumerate(values)]
        row = int(rng.integers(len(keys)))
        said = keys[row] if rng.random() < 0.4 else keys[row].lower()
        return self._asked(rng, placed, size, VALUE, len(keys) + row, {"key": said})

    def _asked(
        self, rng: Generator, placed: list[tuple[str, int, float]], size: int, wordings: Any, answer: int, names: Any
    ) -> Sample:
        wide, step = size * rng.uniform(0.45, 0.6), size * rng.uniform(1.3, 2.0)
        left, top = rng.uniform(2, 30), rng.uniform(0, 14)
        columns = int((left + max(x + len(text) * wide for text, _, x in placed)) // TOKEN) + 1
        rows = int((top + (max(row for _, row, _ in placed) + 1) * step) // TOKEN) + 1
        runs = [
            TextRun(
                text,
                np.full(len(text), (top + (row + 0.5) * step) / CELL[0] - 0.5),
                (left + x + (np.arange(len(text)) + 0.5) * wide) / CELL[1] - 0.5,
            )
            for text, row, x in placed
        ]
        block = TOKEN // CELL[0], TOKEN // CELL[1]
        page = words_of_page(runs, (rows, columns), block, self._encode, self.end)
        question = turn(rng, wordings, placed[answer][0], **names)
        prompt = [token for token, _ in self._encode(PROMPT.format(question=question.question))]
        said = [token for token, _ in self._encode(question.answer)]
        wanted = [token not in self.shared for token in prompt]
        return Sample(page.ids, prompt, [*said, self.end], wanted, page.spots[answer])

    def sentences(self, rng: Generator, tokens: int, rows: int = 8, length: int = 64) -> Iterator[Sentence]:
        """Questions with their answers, and behind them words of plain text, about so many tokens in all."""
        said = [self.tokenizer.decode([number]) for number in range(len(self.tokenizer))]
        plain = [number for number, text in enumerate(said) if text.strip() and text.isascii() and text.isprintable()]
        for _ in range(-(-tokens // (rows * length))):
            ids, wanted = [], []
            for _ in range(rows):
                one = self.sample(rng, 0.75)
                ids.append([*one.prompt, *one.answer, *rng.choice(plain, length).tolist()][:length])
                wanted.append([*one.wanted, *[False] * length][:length])
            yield Sentence(torch.tensor(ids), torch.tensor(wanted))


@dataclass(frozen=True)
class Batch:
    """inputs: of the model. labels: (B, L). where: int64 (K, 4): row, column of the query, image token, slot."""

    inputs: dict[str, Tensor]
    labels: Tensor
    where: Tensor


def batch_of(samples: list[Sample], encoder: PageEncoder, noise: float, rng: Generator, image_at: int = 3) -> Batch:
    """Samples padded at the left; pictures stand before the question's first word. encoder: knows codes of words."""
    length = max(len(one.prompt) + len(one.answer) for one in samples)
    ids, labels = torch.zeros(len(samples), length, dtype=torch.long), torch.full((len(samples), length), -100)
    mask = torch.zeros_like(ids)
    positions, grids, tokens, where, passed = [], [], [], [], 0
    for row, one in enumerate(samples):
        start = length - len(one.prompt) - len(one.answer)
        ids[row, start:] = torch.tensor(one.prompt + one.answer)
        mask[row, start:] = 1
        first = start + len(one.prompt)
        labels[row, first:] = torch.tensor(one.answer)
        positions.append((row, start + image_at))
        height, width, _ = one.ids.shape
        grids.append((1, height, width))
        written = torch.from_numpy(one.ids).flatten(0, 1)
        words = encoder.codes_of(written, torch.float32)
        off = noise / max(encoder.config.word_sizes) ** 0.5
        words = words + torch.from_numpy(rng.standard_normal(words.shape)).float() * off
        tokens.append(torch.cat([words, place_waves(height, width, encoder.config.token_size)], dim=1))
        where += [(row, first + n - 1, passed + at, slot) for n, (at, slot) in enumerate(one.found) if at >= 0]
        passed += len(written)
    inputs = {
        "input_ids": ids, "attention_mask": mask, "image_positions": torch.tensor(positions),
        "image_grid_thw": torch.tensor(grids), "image_features": torch.cat(tokens),
    }  # fmt: skip
    return Batch(inputs, labels, torch.tensor(where).reshape(-1, 4))


class Watched:
    """Queries and keys of the last forward, by CASA layer, and how far their attention is from where words stand."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.seen: dict[int, Any] = {}

    def __call__(self, layer: int, *parts: Any, **_: Any) -> None:
        self.seen[layer] = parts

    def loss(self, mask: Tensor, where: Tensor) -> tuple[Tensor, list[float]]:
        """Nats, the mean of the layers; and the share of words found in each."""
        packed = (mask.flatten().cumsum(0) - 1).view_as(mask)
        rows = packed[where[:, 0], where[:, 1]]
        total, hits = torch.zeros(()), []
        for layer in self.layers:
            query, text_key, image_key, layout = self.seen[layer]
            heads = query[rows].unflatten(1, (text_key.shape[1], -1))[torch.arange(len(rows)), where[:, 3]]
            keys = torch.cat([image_key, text_key]).transpose(0, 1)[where[:, 3]]  # (K, N + T, C)
            scores = torch.einsum("khd,knd->khn", heads.float(), keys.float()) / query.shape[-1] ** 0.5
            scores = scores.masked_fill(~layout.mask()[rows][:, None], -torch.inf)
            total = total - scores.log_softmax(-1)[torch.arange(len(rows)), :, where[:, 2]].mean()
            hits.append((scores[:, 0].argmax(-1) == where[:, 2]).float().mean().item())
        return total / len(self.layers), hits


def train(model: Any, draw: Any, settings: Settings, folder: Path) -> None:
    """Trains what fusion added, with the text model in bfloat16. draw: a step's number to its Batch."""
    model.bfloat16().train()
    slow, fast = [], []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("casa_layers")
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            right = "q_proj" in name or "k_proj" in name or name.startswith(f"casa_layers.{TELLING}.")
            (slow if right else fast).append(parameter)
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
    watched = Watched([number for number, block in enumerate(LAYERS) if block >= 8])
    begun = time.process_time()
    for step in range(first, settings.steps):
        falling = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * group["share"] * min(1.0, (step + 1) / settings.warm_up, max(0.02, falling))
        batch = draw(step)
        kept_tokens = int((batch.labels >= 0).any(0).sum()) + 1
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch.inputs, use_cache=False, record=watched, logits_to_keep=kept_tokens).logits
        predicted, labels = logits[:, :-1], batch.labels[:, 1 - kept_tokens :]
        learned_ones = labels >= 0
        words = nn.functional.cross_entropy(predicted[learned_ones].float(), labels[learned_ones])
        attention, hits = watched.loss(batch.inputs["attention_mask"], batch.where)
        (words + settings.attention * attention).backward()
        nn.utils.clip_grad_norm_([*slow, *fast], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        right = (predicted.argmax(-1) == labels) | ~learned_ones
        line = {
            "step": step + 1, "seconds": round(time.process_time() - begun), "nats": round(words.item(), 3),
            "tokens": round((right & learned_ones).sum().item() / learned_ones.sum().item(), 3),
            "exact": round(right.all(1).float().mean().item(), 3), "attention": round(attention.item(), 3),
            "found": [round(hit, 2) for hit in hits],
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        if (step + 1) % settings.keep_every == 0 or step + 1 == settings.steps:
            state = {"step": step + 1, "optimizer": optimizer.state_dict(), "settings": asdict(settings)}
            state["learned"] = {name: p.detach() for name, p in learned.items()}
            with replacing(kept) as path:
                torch.save(state, path)


@torch.no_grad()
def written_tokens(encoder: PageEncoder, pages: int = 16) -> Tensor:
    """(M, d_v): image tokens of training pages in which text begins."""
    found = []
    for number in range(pages):
        picture = torch.from_numpy(page((7, number), (256, 256))[0])[None]
        tokens = encoder.tokens(((picture / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))[0]
        found.append(tokens[tokens[:, : encoder.config.word_sizes[0]].any(1)])
    return torch.cat(found)


def main(arguments: list[str]) -> int:
    """Trains, and writes a model to begin with."""
    parser = argparse.ArgumentParser(description="Trains fusion layers on pages that are never drawn.")
    parser.add_argument("parts", type=Path, help="folder with text/ and eyes/, by projects.casa_smol.parts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--tokens", type=int, default=50_000, help="of text, to fit the start on")
    given = parser.parse_args(arguments)
    settings = Settings(steps=given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    folder, eyes = given.parts / "text", given.out / "eyes"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    embeddings, pages = embeddings_of(folder), Pages(tokenizer)
    sentences = list(pages.sentences(np.random.default_rng(11), given.tokens))
    encoder = PageEncoder.from_pretrained(given.parts / "eyes", dtype=torch.float32).eval()
    if not (eyes / "config.json").exists():
        model: Any = adapt(str(folder), fusion=FUSION, vision=str(given.parts / "eyes")).float().eval()
        codes = codes_of_words(model, sentences, embeddings, max(encoder.config.word_sizes))
        encoder.learn_words(codes, (folder / "tokenizer.json").read_text(), end=tokenizer.eos_token_id)
        encoder.config.token_parts = ("words", "features", "places")
        encoder.save_pretrained(eyes)
    encoder = PageEncoder.from_pretrained(eyes, dtype=torch.float32).eval()
    model = adapt(str(folder), fusion=FUSION, vision=str(eyes)).float().eval()

    def draw(step: int) -> Batch:
        rng = np.random.default_rng((settings.seed, step))
        return batch_of(
            [pages.sample(rng, settings.pages) for _ in range(settings.batch)], encoder, settings.noise, rng
        )

    sizes, start = encoder.config.word_sizes, given.out / "start.pt"
    if not start.exists():  # minutes, which a run that goes on need not take again
        codes, written = encoder.word_codes.float() * CODE_STEP, draw(0).inputs["image_features"]
        slots = begin(model, sentences, codes, embeddings, sizes, written, Strengths())
        with replacing(start) as path:
            torch.save({"axes": slots.axes, "layers": model.casa_layers.state_dict()}, path)
    begun = torch.load(start, weights_only=True)
    model.casa_layers.load_state_dict(begun["layers"])
    slots = Slots(begun["axes"], sizes)
    projector, model.projector = model.projector, slots
    train(model, draw, settings, given.out)
    model.projector = projector.float()
    slots.into(model.projector, written_tokens(encoder))
    model.bfloat16().save_pretrained(given.out / "model")
    processor_for(tokenizer, str(eyes)).save_pretrained(given.out / "model")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
