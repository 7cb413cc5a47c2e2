"""How a session picks the next token: greedy or sampled, through transformers' own logits processors where they exist.

Shapes: V vocabulary.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from casa.errors import UserError

COLDEST = 1e-4  # below that logits divided by the temperature may be infinite, and nothing but the best is left anyway


@dataclass(frozen=True)
class Sampling:
    """What a session does with its logits, in this order.

    stop_bias: added to the logits of the stop tokens; above 0 says less, below 0 more.
    repetition: taken from a token's logit for each time that it was said, a saying counting `decay` as much at every
        token after it. 0 leaves repetition alone.
    presence_penalty, frequency_penalty: taken from a token's logit if it was said in this caption, and for each time
        that it was; below 0 they are added. 0 leaves it alone. As OpenAI's and vLLM's.
    no_repeat: no run of so many tokens is said twice within what is remembered; 0 allows it.
    temperature: 0 is greedy. top_k 0 and top_p 1 keep the whole vocabulary.
    memory: tokens of what was said before that `repetition` and `no_repeat` look at.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_bias: float = 0.0
    repetition: float = 0.0
    decay: float = 0.9
    no_repeat: int = 0
    memory: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; give 0 for greedy, or more.")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"top_k is {self.top_k} and top_p {self.top_p}; top_k is 0 or more, top_p in (0, 1].")
        if not 0 <= self.decay < 1:
            raise UserError(f"decay is {self.decay}; give a number from 0 up to, but not including, 1.")
        if self.repetition < 0 or self.no_repeat < 0 or self.memory < 0:
            raise UserError("repetition, no_repeat and memory are 0 or more.")
        if not (math.isfinite(self.presence_penalty) and math.isfinite(self.frequency_penalty)):
            raise UserError("presence_penalty and frequency_penalty are numbers, best from -2 to 2.")
        if not all(isinstance(number, int) for number in (self.top_k, self.no_repeat, self.memory)):
            raise UserError("top_k, no_repeat and memory are whole numbers.")

    def to_dict(self) -> dict[str, Any]:
        return {known.name: getattr(self, known.name) for known in fields(Sampling)}

    def pick(
        self,
        logits: Tensor,
        said: list[int],
        generator: torch.Generator,
        stops: frozenset[int] = frozenset(),
        earlier: list[int] | None = None,
    ) -> int:
        """The next token from logits (V,). said: of this caption; earlier: of the captions before."""
        scores = logits.float().cpu()[None]
        before = [*(earlier or ()), *said][-self.memory :] if self.memory else []
        if self.repetition and before:
            scores = scores - self.repetition * self._counts(before, scores.shape[-1], stops)
        if said and (self.presence_penalty or self.frequency_penalty):
            counts = torch.bincount(torch.tensor(said), minlength=scores.shape[-1]).to(scores.dtype)
            scores = scores - self.frequency_penalty * counts - self.presence_penalty * counts.clamp(max=1)
        greedy = self.temperature < COLDEST
        processors = LogitsProcessorList()
        if self.stop_bias and stops:
            # transformers takes numbers that are floats only, here and below
            bias: Any = {(stop,): float(self.stop_bias) for stop in stops}
            processors.append(SequenceBiasLogitsProcessor(bias))
        if self.no_repeat and len(before) >= self.no_repeat:
            processors.append(NoRepeatNGramLogitsProcessor(self.no_repeat))
        if not greedy:
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                processors.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                processors.append(TopPLogitsWarper(self.top_p))
        scores = processors(torch.tensor([before], dtype=torch.int64), scores)  # type: ignore[arg-type]
        if greedy:
            return int(scores[0].argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))

    def _counts(self, before: list[int], vocabulary: int, stops: frozenset[int]) -> Tensor:
        """(V,): how often each token was said, older sayings counting less. Stopping is no repetition."""
        ages = torch.arange(len(before) - 1, -1, -1)
        counts = torch.zeros(vocabulary).index_add(0, torch.tensor(before), self.decay**ages)
        counts[list(stops)] = 0.0
        return counts
