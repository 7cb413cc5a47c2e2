"""What insertion would hold, and how much longer it would take, for the frames and captions that a stream has seen.

Bytes are computed: all tokens so far, times the keys and values of all blocks. Time is this frame's own, plus what
attending to the cached tokens adds. That slope is measured once, at start, on an insertion model with the same weights.
"""

from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from casa.analysis.flops import blocks_of
from casa.analysis.streaming_cost import insertion_twin
from casa.models import CasaCache, CasaForConditionalGeneration, CasaProcessor
from casa.models.chat_template import ChatText
from casa.models.int8 import is_int8

PICTURE_SIDE = 224
PROBES = 8  # of which the quickest counts
FILLED = 256  # tokens at once, to fill the long cache
MAX_TOKENS = 4096
MAX_PARAMETERS = 500_000_000  # of a model that is built a second time, beside the first, to be measured


class InsertionCosts:
    """Costs of insertion with this model's weights."""

    def __init__(self, model: CasaForConditionalGeneration, processor: CasaProcessor) -> None:
        self._model, self._processor = model, processor
        size = torch.empty((), dtype=model.dtype).element_size()
        # keys and values of each block, and how many tokens it keeps
        self._blocks = [(2 * block.key * size, block.span) for block in blocks_of(model)]
        # seconds that one new token takes longer for each cached one, when it comes with a whole frame and when alone
        self.prefill: float | None = None
        self.decode: float | None = None

    @property
    def is_measured(self) -> bool:
        return self.decode is not None

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of a cache of `tokens` tokens."""
        return sum(each * (tokens if span is None else min(tokens, span)) for each, span in self._blocks)

    def extra_seconds(self, tokens: int, fed: int, said: int) -> float | None:
        """How much longer a frame of `fed` tokens and `said` more takes with `tokens` cached than with none."""
        if self.prefill is None or self.decode is None:
            return None
        return tokens * (self.prefill * fed + self.decode * said)

    @torch.no_grad()
    def measure(self, seconds: float = 2.0) -> None:
        """Times an insertion model with a short cache and with a long one; the difference is the slope.

        The long one is filled for at most so many seconds. A model of more than `MAX_PARAMETERS`, or with int8 weights,
        is left unmeasured.
        """
        if self._model.num_parameters() > MAX_PARAMETERS or is_int8(self._model):
            return
        twin = insertion_twin(self._model)
        short, long = twin.new_cache(), twin.new_cache()
        before, after, pixels = self._processor.frame(Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), "grey"))
        stop = self._processor.tokenizer.eos_token_id or 0
        one, many = (torch.full((1, count), stop, device=twin.device) for count in (1, FILLED))
        frame = {
            "input_ids": torch.tensor([[stop, *before, *after]]),
            "image_positions": torch.tensor([(0, 1 + len(before))]),
            **pixels,
        }
        frame = {name: value.to(twin.device) for name, value in frame.items()}

        def timed(inputs: dict[str, Tensor], cache: CasaCache) -> float:
            start = perf_counter()
            logits = twin(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            logits[0, -1, 0].item()  # an accelerator works on after a call returns
            return perf_counter() - start

        def held(cache: CasaCache) -> int:
            return cache.num_bytes // max(1, self.cache_bytes(1))

        timed(frame, short)  # warms up
        fed = held(short)
        end = perf_counter() + seconds
        while held(long) < MAX_TOKENS and perf_counter() < end:
            timed({"input_ids": many}, long)
        grown = max(1, held(long) - held(short))
        # in turns, so that other work on this machine falls on both alike; load only ever adds, so the least counts
        rounds = [
            [timed(inputs, cache) for cache in (short, long) for inputs in (frame, {"input_ids": one})]
            for _ in range(PROBES)
        ]
        frame_short, one_short, frame_long, one_long = map(min, zip(*rounds, strict=True))
        self.prefill = max(0.0, (frame_long - frame_short) / grown / fed)
        self.decode = max(0.0, (one_long - one_short) / grown)


class InsertionTally:
    """Insertion's cache for one stream: all that was fed since it began, `tokens` of the prompt first."""

    def __init__(self, costs: InsertionCosts, processor: CasaProcessor, tokens: int) -> None:
        self._costs, self._processor = costs, processor
        self._around = sum(map(len, processor.around_frame()))
        self.tokens = tokens

    def frame(self, image_tokens: int, text: str, seconds: float) -> dict[str, Any]:
        """Insertion's figures after a frame and its caption. seconds: what the frame took here."""
        said = self._count(text)
        fed = 1 + self._around + image_tokens
        extra = self._costs.extra_seconds(self.tokens, fed, said)
        self.tokens += fed + said
        return {
            "cache_bytes": self._costs.cache_bytes(self.tokens),
            # rounded as the frame's own is, which it is never below
            "latency": None if extra is None else round(seconds + extra, 4),
        }

    def answer(self, question: str, text: str) -> None:
        """A question and its answer stay in the cache as well."""
        self.tokens += 1 + self._count(question) + self._count(text)

    def _count(self, text: str) -> int:
        """Tokens of what people type, or the model says: words that look like special tokens are none."""
        typed, tokenizer = self._processor.typed_text, self._processor.tokenizer
        return len(typed.encode(tokenizer, ChatText.of(text, [(0, len(text))]))) if text else 0
