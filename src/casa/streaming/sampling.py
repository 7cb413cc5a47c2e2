"""How a session picks the next token: greedy, or sampled through transformers' own logits processors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from casa.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; give 0 for greedy, or more.")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"top_k is {self.top_k} and top_p {self.top_p}; top_k is 0 or more, top_p in (0, 1].")

    def pick(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token from logits (V,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        warpers = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        said: Any = torch.empty(1, 0, dtype=torch.int64)  # these warpers do not look at it
        scores = warpers(said, logits[None].float().cpu())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))
