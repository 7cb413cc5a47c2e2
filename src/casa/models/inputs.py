"""What a call gives the model, read the way transformers reads it; what cannot be meant is refused.

Shapes: B rows, L new tokens, S cached tokens, N image tokens of all images, d width of the text model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from casa.errors import UserError
from casa.models.cache import CasaCache
from casa.vision import Grids


@dataclass(frozen=True)
class TextInputs:
    """The text of a call.

    Attributes:
        valid: bool (B, L), the real tokens of this call.
        mask: (B, S + L) as given, or None.
        position_ids: (B, L).
        sample_starts: Per row the indices at which packed samples start; None if every row is one sample.
    """

    valid: Tensor
    mask: Tensor | None
    position_ids: Tensor
    sample_starts: list[list[int]] | None

    @property
    def packed(self) -> bool:
        return self.sample_starts is not None


@torch.compiler.disable(reason="looks at the values of masks and positions")
def read_text_inputs(
    embeds: Tensor, cache: CasaCache | None, mask: Tensor | None, position_ids: Tensor | None
) -> TextInputs:
    """Checks `attention_mask` and `position_ids` of a call with text (B, L, d) against each other and the cache."""
    (rows, length), device = embeds.shape[:2], embeds.device
    cached = 0
    if cache is not None:
        if cache.num_text and cache.num_rows != rows:
            raise UserError(f"the cache holds {cache.num_rows} rows and this call has {rows}; give one row for each.")
        cached, mask = cache.num_text, cache.covering(mask, length)
    if mask is not None:
        if mask.dim() != 2:
            raise UserError(f"attention_mask has shape {tuple(mask.shape)}; give (rows, cached and new tokens).")
        if mask.shape != (rows, cached + length):
            raise UserError(
                f"attention_mask has shape {tuple(mask.shape)}, but there are {rows} rows of {cached} cached and "
                f"{length} new tokens; it must cover both."
            )
        mask = mask.to(device)
    starts = None
    valid = torch.ones(rows, length, dtype=torch.bool, device=device) if mask is None else mask[:, cached:].bool()
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != length:
            raise UserError(f"position_ids have shape {tuple(position_ids.shape)}; give ({rows}, {length}).")
        position_ids = position_ids.to(device).expand(rows, length)
        starts = _packed_samples(position_ids, valid)
    elif mask is None:
        position_ids = torch.arange(cached, cached + length, device=device).expand(rows, -1)
    else:
        position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)[:, cached:]
    if cache is not None and mask is not None:
        cache.check_mask(mask)
    return TextInputs(valid, mask, position_ids, starts)


def _packed_samples(position_ids: Tensor, valid: Tensor) -> list[list[int]] | None:
    """Where positions restart at 0 inside a row; None if they do so nowhere."""
    restart = (position_ids[:, 1:] == 0) & valid[:, 1:] & valid[:, :-1]
    if not bool(restart.any()):
        return None
    starts = []
    for row, real in zip(restart, valid, strict=True):
        first = real.nonzero().flatten()[:1].tolist()
        starts.append(first + [index + 1 for index in row.nonzero().flatten().tolist()])
    return starts


@torch.compiler.disable(reason="looks at the values of positions")
def read_image_places(positions: Tensor | None, images: int) -> list[tuple[int, int]]:
    """(row, index) of each image, from `image_positions` (n, 2). Raises UserError if they do not match."""
    if positions is None:
        if images:
            raise UserError(f"there are {images} images but no image_positions; the processor makes them.")
        return []
    if positions.dim() != 2 or positions.shape[1] != 2:
        raise UserError(f"image_positions have shape {tuple(positions.shape)}; give (images, 2): row and index.")
    if positions.shape[0] != images:
        raise UserError(f"there are {images} images but {positions.shape[0]} image_positions; give one each.")
    return [(row, index) for row, index in positions.tolist()]


def count_tokens(grids: Grids) -> int:
    return sum(rows * columns for rows, columns in grids)
