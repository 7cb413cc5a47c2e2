"""How words are found: the settings by which a token is chosen, and the loop in which all texts are generated.

Shapes: n texts in one batch, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Protocol, cast

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
from casa.models import CasaCache, CasaForConditionalGeneration
from casa.settings import Bounds, NonNegative, Settings

COLDEST = 1e-4  # below that logits divided by the temperature may be infinite, and nothing but the best is left anyway


@dataclass(frozen=True)
class Sampling(Settings):
    """What is done with the logits before a token is chosen, in this order.

    Args:
        temperature: 0 is greedy.
        top_k: Draw from the k likeliest tokens; 0 keeps the whole vocabulary.
        top_p: Draw from the likeliest tokens of this probability in all; 1 keeps the whole vocabulary.
        stop_bias: Added to the logits of the stop tokens; above 0 says less, below 0 more.
        repetition: Taken from a token's logit for each time that it was said; 0 leaves repetition alone.
        decay: How much of a saying counts one token later.
        no_repeat_ngram_size: No run of so many tokens is said twice within `memory`; 0 allows it.
        memory: Tokens said before that `repetition` and `no_repeat_ngram_size` look at.
        presence_penalty: Taken from a token's logit if this caption has said it; below 0 it is added. OpenAI's.
        frequency_penalty: The same for each time that this caption has said it.

    Raises:
        UserError: A setting is out of its bounds.
    """

    temperature: Annotated[float, Bounds(ge=0)] = 0.0
    top_k: NonNegative = 0
    top_p: Annotated[float, Bounds(gt=0, le=1)] = 1.0
    stop_bias: float = 0.0
    repetition: Annotated[float, Bounds(ge=0)] = 0.0
    decay: Annotated[float, Bounds(ge=0, lt=1)] = 0.9
    no_repeat_ngram_size: NonNegative = 0
    memory: NonNegative = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.presence_penalty) and math.isfinite(self.frequency_penalty)):
            raise UserError("presence_penalty and frequency_penalty are numbers, best from -2 to 2.")
        if not all(isinstance(number, int) for number in (self.top_k, self.no_repeat_ngram_size, self.memory)):
            raise UserError("top_k, no_repeat_ngram_size and memory are whole numbers.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def pick(
        self,
        logits: Tensor,
        said: list[int],
        generator: torch.Generator,
        stops: frozenset[int] = frozenset(),
        earlier: Sequence[int] = (),
    ) -> int:
        """The next token.

        Args:
            logits: (V,), of the next token.
            said: Tokens of this caption so far.
            generator: What is drawn from.
            stops: The stop tokens.
            earlier: Tokens of the captions before.
        """
        scores = logits.float().cpu()[None]
        before = [*earlier, *said][-self.memory :] if self.memory else []
        if self.repetition and before:
            scores = scores - self.repetition * self._counts(before, scores.shape[-1], stops)
        if said and (self.presence_penalty or self.frequency_penalty):
            counts = torch.bincount(torch.tensor(said), minlength=scores.shape[-1]).to(scores.dtype)
            scores = scores - self.frequency_penalty * counts - self.presence_penalty * counts.clamp(max=1)
        greedy = self.temperature < COLDEST
        processors = LogitsProcessorList()
        if self.stop_bias and stops:
            # transformers takes numbers that are floats only, here and below
            processors.append(SequenceBiasLogitsProcessor([[[stop], float(self.stop_bias)] for stop in stops]))
        if self.no_repeat_ngram_size and len(before) >= self.no_repeat_ngram_size:
            processors.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if not greedy:
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                processors.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                processors.append(TopPLogitsWarper(self.top_p))
        scores = processors(torch.LongTensor([before]), cast("torch.FloatTensor", scores))
        if greedy:
            return int(scores[0].argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))

    def _counts(self, before: list[int], vocabulary: int, stops: frozenset[int]) -> Tensor:
        """(V,): how often each token was said, older sayings counting less. Stopping is no repetition."""
        ages = torch.arange(len(before) - 1, -1, -1)
        counts = torch.zeros(vocabulary).index_add(0, torch.tensor(before), self.decay**ages)
        counts[list(stops)] = 0.0
        return counts


class RunningText(Protocol):
    """A text while it is generated: a caption, an answer, a choice of a chat. `is_open`: it goes on.

    `last` is the token to feed next (of a text that has ended, any). `take` chooses one from logits (V,), and is True
    if the text has ended with it.
    """

    @property
    def is_open(self) -> bool: ...

    @property
    def last(self) -> int: ...

    def take(self, logits: Tensor) -> bool: ...


def decode(
    model: CasaForConditionalGeneration,
    inputs: Mapping[str, Tensor],
    cache: CasaCache,
    texts: Sequence[RunningText],
    *,
    drafts: Mapping[int, Sequence[int]] | None = None,
    drop_ended: bool = False,
) -> Iterator[list[int]]:
    """Reads a prompt, and then goes on with all texts in step. Yields after each pass which of them ended with it.

    Args:
        model: What is asked for logits.
        inputs: The first call of all rows; a single row is read once and repeated for every text.
        cache: Filled as the texts go on.
        texts: One per row.
        drafts: By row, tokens at the end of its inputs that its text may begin with: as far as it does, they are said
            in the first pass; the rest is taken back.
        drop_ended: Makes the batch smaller as texts end. Otherwise their rows run on, unheard, which costs less where
            texts are short.
    """
    rows, drafts = list(enumerate(texts)), drafts or {}
    while True:
        keep = 1 + max(map(len, drafts.values()), default=0)
        logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        if len(logits) < len(rows):
            cache.batch_repeat_interleave(len(rows))
            logits = logits.expand(len(rows), -1, -1)
        ended, refused = [], [0] * len(rows)
        for at, (number, text) in enumerate(rows):
            if text.is_open:
                refused[at] = _follow(text, drafts.get(number, ()), logits[at])
                ended += [] if text.is_open else [number]
        if any(refused):
            cache.crop(-refused[0]) if len(rows) == 1 else cache.forget_last(torch.tensor(refused, device=model.device))
        yield ended
        still = [at for at, (_, text) in enumerate(rows) if text.is_open]
        if not still:
            return
        if drop_ended and len(still) < len(rows):
            cache.batch_select_indices(torch.tensor(still, device=model.device))
            rows = [rows[at] for at in still]
        inputs, drafts = {"input_ids": torch.tensor([[text.last] for _, text in rows], device=model.device)}, {}


def _follow(text: RunningText, draft: Sequence[int], logits: Tensor) -> int:
    """Chooses tokens from the last logits (.., V) as long as they are the draft's; how many of that were not chosen."""
    left = len(draft)
    while not text.take(logits[-1 - left]) and left and text.last == draft[-left]:
        left -= 1
    return left
