"""The loss of text without the logits of all tokens at once: those of a chunk are made, used and forgotten.

Shapes: B rows of L tokens, T tokens, d width, V vocabulary, C tokens of a chunk.

    forward     hidden (T, d)  ->  learned ones  ->  chunks (C, d)  ->  logits (C, V)  ->  one number each
    backward    the logits of a chunk are made once more, so that (T, V) never stands in memory

For Qwen2.5-VL's vocabulary of 151,936, the logits of 3,072 tokens and their gradient would take 3.7 GB in float32.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""The label of a token that is not learned, as in transformers."""


def chunked_cross_entropy(
    hidden: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor], chunk: int, count: Tensor | int | None = None
) -> Tensor:
    """The loss of predicting each label from its row: a scalar, in float32 or, for float64 logits, in float64.

    Args:
        hidden: (T, d), what the head reads.
        labels: int64 (T,), already shifted, `IGNORE_INDEX` where nothing is learned.
        logits_of: (C, d) to (C, V), called twice for a chunk of learned tokens where gradients are wanted.
        count: What the sum is divided by (transformers' `num_items_in_batch`); None for the learned tokens given.

    Returns:
        The loss; where nothing is learned it is 0 and so is its gradient, whatever the logits are.
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

    run = partial(checkpoint, loss_of, use_reentrant=False) if torch.is_grad_enabled() else loss_of
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    total = torch.stack([run(part, wanted) for part, wanted in parts]).sum()
    if count is None:
        return total / labels.numel()
    return total / at_least_one(count, total.device)


def at_least_one(count: Tensor | int, device: torch.device) -> Tensor | int:
    """The number that a sum of losses is divided by: no token learned makes the loss 0, and not no number."""
    return count.to(device).clamp(min=1) if isinstance(count, Tensor) else max(1, count)


def within_samples(labels: Tensor, sample_starts: Sequence[Sequence[int]] | None) -> Tensor:
    """Labels (B, L) in which no packed sample predicts the first token of the next."""
    if sample_starts is None:
        return labels
    labels = labels.clone()
    for row, starts in enumerate(sample_starts):
        labels[row, starts] = IGNORE_INDEX
    return labels
