"""The loss of text: transformers' own from logits, or without the logits of all tokens at once.

Of the second, those of a chunk are made, used and forgotten.

Shapes: T tokens, d width, V vocabulary, C tokens of a chunk.

    forward     hidden (T, d)  ->  learned ones  ->  chunks (C, d)  ->  logits (C, V)  ->  one number each
    backward    the logits of a chunk are made once more, so that (T, V) never stands in memory

For Qwen2.5-VL's vocabulary of 151,936, the logits of 3,072 tokens and their gradient would take 3.7 GB in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from casa.models.inputs import TextInputs

IGNORE_INDEX = -100
"""The label of a token that is not learned, as in transformers."""


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    chunk: int,
    count: Tensor | int | None = None,
) -> Tensor:
    """The loss of predicting each label from its row: a scalar, in float32 or, for float64 logits, in float64.

    hidden: (T, d), what the head reads. labels: int64 (T,), already shifted, `IGNORE_INDEX` where nothing is learned.
    logits_of: (C, d) to (C, V), called twice for a chunk of learned tokens where gradients are wanted.
    count: what the sum is divided by (transformers' `num_items_in_batch`); None for the learned tokens given.
    Where nothing is learned, the loss is 0 and so is its gradient, whatever the logits are.
    """
    learned = labels != IGNORE_INDEX
    # nothing to learn still needs a loss whose gradient reaches every parameter: ranks wait for one another's
    if not bool(learned.any()):
        logits = logits_of(hidden[:1])
        return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0).sum()
    hidden, labels = hidden[learned], labels[learned]

    def loss_of(part: Tensor, wanted: Tensor) -> Tensor:
        logits = logits_of(part)
        # half precision would lose the small probabilities
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return F.cross_entropy(logits, wanted, reduction="sum")

    sums = []
    for part, wanted in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        if torch.is_grad_enabled():
            sums.append(checkpoint(loss_of, part, wanted, use_reentrant=False))
        else:
            sums.append(loss_of(part, wanted))
    total = torch.stack(sums).sum()
    if count is None:
        return total / labels.numel()
    return total / _at_least_one(count, total.device)


class CasaLosses:
    """Mixed into CasaForConditionalGeneration, whose attributes these are."""

    config: Any
    decoder: Any
    loss_function: Any
    # with labels, the logits of so many tokens are made at once and none are returned; None returns all of them
    loss_chunk: int | None = None

    def _loss(self, logits: Tensor, labels: Tensor, text: TextInputs, kwargs: dict[str, Any]) -> Tensor:
        labels = _within_samples(labels, text)
        vocabulary = self.config.get_text_config().vocab_size
        count = kwargs.get("num_items_in_batch")
        if count is None:
            # the mean over no token is no number; the sum over at least one is 0
            count = (labels[:, 1:] != IGNORE_INDEX).sum()
        count = _at_least_one(count, logits.device)
        return self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, num_items_in_batch=count)

    def _chunked_loss(self, hidden: Tensor, labels: Tensor, text: TextInputs, count: Any) -> Tensor:
        """The same loss from hidden states (B, L, d), without the logits of all tokens at once."""
        assert self.loss_chunk is not None
        before = hidden[:, :-1].flatten(0, 1)
        wanted = _within_samples(labels, text)[:, 1:].flatten().to(hidden.device)
        return chunked_cross_entropy(before, wanted, self.decoder.logits, self.loss_chunk, count)


def _at_least_one(count: Tensor | int, device: torch.device) -> Tensor | int:
    return count.to(device).clamp(min=1) if isinstance(count, Tensor) else max(1, count)


def _within_samples(labels: Tensor, text: TextInputs) -> Tensor:
    """The first token of a packed sample is not for the last one of the sample before it to predict."""
    if text.sample_starts is None:
        return labels
    labels = labels.clone()
    for row, starts in enumerate(text.sample_starts):
        labels[row, starts] = IGNORE_INDEX
    return labels
