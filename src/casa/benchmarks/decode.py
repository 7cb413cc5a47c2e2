"""What a token costs beside the backbone's own text decoding, and the first token of a frame, and a long prompt.

All over the same backbone in turns: the floor (every weight matrix multiplied once with one row, nothing else),
transformers' own text decoding, CASA without an image, with a frame in its window, and insertion. The frame's features
are given, since encoders differ: what is timed is projector, fusion and text.

Weights of the backbone are real where one is named, and random in the shape of SmolLM2-135M if not.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from casa.benchmarks.harness import Benchmark, Figures, clock, percentiles, table, take_turns
from casa.benchmarks.settings import DecodeSettings
from casa.models import CasaForConditionalGeneration, FusionConfig, adapt
from casa.models.auto import pick_device
from casa.models.backbone_source import load_backbone
from casa.models.backbones import new_backbone
from casa.models.cache import CACHE
from casa.models.int8 import to_int8
from casa.models.replay import PATIENCE, launched
from casa.vision import new_encoder

DTYPES = {"bf16": torch.bfloat16, "int8": torch.bfloat16, "fp32": torch.float32}
SAID = 256  # tokens on which int8 weights are compared with whole ones
PROMPT = 64  # tokens of text before the frame
BEFORE = 2  # frames before it, which history shows
FLOOR, OWN, TEXT = "all matrices once", "transformers", "CASA, no image"
EVERY, ALL, INSERTED = "CASA every {}", "CASA every block", "insertion"

Run = Callable[[], float]
"""One turn of a contestant: milliseconds."""


class Contestants:
    """Models over one backbone, and what is timed of them. Weights that need not differ are shared."""

    def __init__(self, settings: DecodeSettings, kind: str) -> None:
        torch.manual_seed(settings.seed)
        self.kind, dtype = kind, DTYPES[kind]
        self.settings, self.device = settings, pick_device(settings.device)
        self.now = clock(self.device, settings.cpu_time)
        self.own = small_backbone(settings.backbone).eval()
        self.own.to(device=self.device, dtype=dtype)  # type: ignore[call-overload]
        fusions = {
            EVERY.format(settings.every): FusionConfig(every=settings.every),
            ALL: FusionConfig(),
            INSERTED: FusionConfig.insertion(),
        }
        self.models = {name: self._over(fusion, dtype) for name, fusion in fusions.items()}
        width = 4 * 32
        generator = torch.Generator().manual_seed(settings.seed)
        self.features = torch.randn(settings.image_tokens, width, generator=generator).to(self.device, dtype)
        self.vocabulary = self.own.config.vocab_size

    def _over(self, fusion: FusionConfig, dtype: torch.dtype) -> CasaForConditionalGeneration:
        tower = Qwen2_5_VLVisionConfig(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=128, fullatt_block_indexes=[0]
        )
        model = adapt(copy.deepcopy(self.own), fusion, new_encoder(tower)).eval()
        model.to(device=self.device, dtype=dtype)  # type: ignore[call-overload]
        return to_int8(model) if self.kind == "int8" else model

    def ids(self, rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(3, self.vocabulary, (rows, length), generator=generator).to(self.device)

    def frame(self, rows: int) -> dict[str, Tensor]:
        """A frame for every row, before its first token."""
        side = self.settings.image_tokens
        return {
            "image_features": self.features.repeat(rows, 1),
            "image_grid_thw": torch.tensor([[1, 2, 2 * side]] * rows, device=self.device),
            "image_positions": torch.tensor([[row, 0] for row in range(rows)], device=self.device),
        }

    def prefilled(self, model: PreTrainedModel, rows: int, frames: int) -> Any:
        """A cache of the prompt and so many frames, each with a token behind it."""
        output = model(input_ids=self.ids(rows, PROMPT), use_cache=True, logits_to_keep=1)
        for _ in range(frames):
            cache = output[CACHE]
            output = model(
                input_ids=self.ids(rows, 1), **{CACHE: cache}, use_cache=True, logits_to_keep=1, **self.frame(rows)
            )
        return output[CACHE]

    def tokens(self, model: PreTrainedModel, rows: int, frames: int) -> Run:
        """Milliseconds a token, of every row at once, picked greedily."""
        cache, count = self.prefilled(model, rows, frames), self.settings.tokens

        def said(mine: Any, ids: Tensor, number: int) -> Tensor:
            for _ in range(number):
                output = model(input_ids=ids, **{CACHE: mine}, use_cache=True, logits_to_keep=1)
                ids = output.logits[:, -1].argmax(-1, keepdim=True)
            return ids

        def run() -> float:
            mine, ids = copy.deepcopy(cache), self.ids(rows, 1)
            if self.device.startswith("cuda"):  # by then a token is captured
                ids = said(mine, ids, PATIENCE + 1)
            begun = self.now()
            said(mine, ids, count)
            return 1000 * (self.now() - begun) / count

        return run

    def first_token(self, model: PreTrainedModel) -> Run:
        """Milliseconds of the call that brings a frame, behind one frame that was seen."""
        cache = self.prefilled(model, 1, 1)

        def run() -> float:
            mine, frame, ids = copy.deepcopy(cache), self.frame(1), self.ids(1, 1)
            return self.timed(lambda: model(input_ids=ids, **{CACHE: mine}, logits_to_keep=1, **frame))

        return run

    def prefill(self, model: PreTrainedModel, framed: bool, at: int = 0) -> Run:
        """Milliseconds of a whole prompt, without an image or with one before its token `at`."""
        images, ids = self.frame(1) if framed else {}, self.ids(1, self.settings.prompt)
        if framed:
            images["image_positions"][:, 1] = at
        return lambda: self.timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1, **images))

    def floor(self, rows: int) -> Run:
        """Milliseconds of every weight matrix of the backbone, the head included, times so many rows."""
        weights = [module.weight for module in self.own.modules() if isinstance(module, nn.Linear)]
        inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=self.device, dtype=w.dtype) for w in weights}

        def run() -> float:
            return self.timed(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights])

        return run

    def quality(self) -> Figures:
        """Compares int8 weights with whole ones, on text that the backbone says by itself, drawn at temperature 1.

        Returns:
            tokens; agreement, the share of them of which the likeliest is the same; kl, of the probabilities, in nats;
            perplexity and perplexity_whole.
        """
        torch.manual_seed(self.settings.seed)
        start = torch.tensor([[self.own.config.bos_token_id or 0]], device=self.device)
        said: Any = self.own.generate(start, max_new_tokens=SAID, do_sample=True, top_k=0, eos_token_id=None)  # type: ignore[operator]
        model = self.models[EVERY.format(self.settings.every)]
        whole, rounded = (of(input_ids=said).logits[0, :-1].float().log_softmax(-1) for of in (self.own, model))
        each = said[0, 1:, None]
        return {
            "tokens": len(each),
            "agreement": float((whole.argmax(-1) == rounded.argmax(-1)).float().mean()),
            "kl": float((whole.exp() * (whole - rounded)).sum(-1).mean()),
            "perplexity": float((-rounded.gather(1, each)).mean().exp()),
            "perplexity_whole": float((-whole.gather(1, each)).mean().exp()),
        }

    def timed(self, work: Callable[[], object]) -> float:
        begun = self.now()
        work()
        return 1000 * (self.now() - begun)


def as_launched(run: Run) -> Run:
    """The same without CUDA graphs."""

    def of_launches() -> float:
        with launched():
            return run()

    return of_launches


def small_backbone(name: str | None) -> PreTrainedModel:
    """The language model of that name; random weights in the shape of SmolLM2-135M without one."""
    if name is not None:
        return load_backbone(name)
    shape: dict[str, Any] = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536}
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    return new_backbone(LlamaConfig(vocab_size=49_152, tie_word_embeddings=True, **shape))


@torch.inference_mode()
def bench_decode(settings: DecodeSettings) -> Benchmark:
    """Every contestant in turn, `rounds` times, for every dtype: tokens, then first tokens, then prompts.

    Under int8, CASA and insertion have such weights, and transformers' own bf16.
    """
    figures: Figures = {}
    tables = []
    for kind in settings.dtypes:
        made = Contestants(settings, kind)
        figures[kind] = _measured(made)
        tables.append(f"{kind}\n{decode_table(figures[kind])}")
        if kind == "int8":
            found = figures["quality"] = made.quality()
            tables.append(
                "int8 beside whole weights: the likeliest token is the same at {agreement:.1%} of {tokens} places, "
                "perplexity {perplexity:.3f} beside {perplexity_whole:.3f}, {kl:.5f} nats apart".format(**found)
            )
    told = {name: value for name, value in vars(settings).items() if name not in ("backbone", "device")}
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
    return Benchmark("decode", told, figures, "\n\n".join(tables), pick_device(settings.device), settings.backbone)


def _measured(made: Contestants) -> Figures:
    settings, own = made.settings, made.own
    every = made.models[EVERY.format(settings.every)]
    found: Figures = {}
    for rows in settings.rows:
        runs = {FLOOR: made.floor(rows), OWN: made.tokens(own, rows, 0), TEXT: made.tokens(every, rows, 0)}
        for name, model in made.models.items():
            runs[name] = made.tokens(model, rows, BEFORE + 1)
        if made.device.startswith("cuda"):
            runs[f"{EVERY.format(settings.every)}, launched"] = as_launched(made.tokens(every, rows, BEFORE + 1))
        for history in settings.history:
            if history:
                model = _with_history(every, history)
                runs[f"{EVERY.format(settings.every)}, history {history}"] = made.tokens(model, rows, BEFORE + 1)
        found[f"token, {rows} rows" if rows > 1 else "token"] = summary(runs, settings.rounds)
    runs = {OWN: made.tokens(own, 1, 0)} | {name: made.first_token(model) for name, model in made.models.items()}
    found["first token of a frame"] = summary(runs, settings.rounds)
    runs = {OWN: made.prefill(own, framed=False), TEXT: made.prefill(every, framed=False)}
    runs |= {name: made.prefill(model, framed=True) for name, model in made.models.items()}
    runs[f"{EVERY.format(settings.every)}, frame last"] = made.prefill(every, framed=True, at=settings.prompt - 1)
    found["prompt"] = summary(runs, settings.rounds)
    return found


def _with_history(model: CasaForConditionalGeneration, history: int) -> CasaForConditionalGeneration:
    """The same weights with another history."""
    twin = copy.copy(model)
    twin.fusion = replace(model.fusion, history=history)
    return twin


def summary(runs: Mapping[str, Run], rounds: int) -> Figures:
    """Medians in ms, their spread (the middle half over the median), and the ratio to transformers' own.

    The ratio is the median of those within a round: a busy machine slows both.
    """
    for run in runs.values():
        run()  # what is made once is made
    turns = take_turns(runs, rounds)
    found = {}
    for name, times in turns.items():
        low, middle, high = percentiles(times, 25, 50, 75, digits=3)
        ratio = median(mine / own for mine, own in zip(times, turns[OWN], strict=True))
        found[name] = {"ms": middle, "spread": round((high - low) / middle, 3), "ratio": round(ratio, 3)}
    return found


def decode_table(found: Figures) -> str:
    """One part below the other; transformers' own is 1."""
    columns = {"": "{name}", "ms": "{ms:.2f}", "spread": "{spread:.2f}", "to transformers": "{ratio:.2f}"}
    parts = []
    for title, rows in found.items():
        shown = table([{"name": name, **row} for name, row in rows.items()], columns)
        parts.append(f"{title}\n{shown}")
    return "\n\n".join(parts)
