"""Image tokens on their way to the fusion layers: how many, where in their picture, and how they change with depth.

Shapes: N image tokens of all images, d width of the text model, k deep-stack levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from casa.models.backbones import Decoder
from casa.vision import Grids


def count_tokens(grids: Grids) -> int:
    return sum(rows * columns for rows, columns in grids)


@dataclass(frozen=True)
class ImageTokens:
    """tokens: (N, d), of all images. extra: k times (N, d), what joins them behind each of the first k blocks.

    projected: keys and values (N, Hkv, D) of each fusion layer, where the caller brought them; tokens is (N, 0) then.
    """

    tokens: Tensor
    extra: list[Tensor] = field(default_factory=list)
    grids: Grids = field(default_factory=list)
    projected: list[tuple[Tensor, Tensor]] | None = None

    @staticmethod
    def none(width: int, dtype: torch.dtype, device: torch.device) -> "ImageTokens":
        return ImageTokens(torch.zeros(0, width, dtype=dtype, device=device))

    @property
    def lengths(self) -> list[int]:
        return [rows * columns for rows, columns in self.grids]

    def places(self) -> Tensor:
        """int64 (2, N): row and column of each token in its image."""
        found = [torch.zeros(2, 0, dtype=torch.int64)]
        for rows, columns in self.grids:
            found.append(
                torch.stack([torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)])
            )
        return torch.cat(found, dim=1).to(self.tokens.device)


def by_depth(images: ImageTokens, decoder: Decoder, blocks: Sequence[int], update: bool) -> list[Tensor]:
    """What the fusion layer of each of `blocks` (rising) sees: (N, d), the same tensor where nothing has changed.

    update: image tokens also go through each block's feed-forward network (paper v2, D4).
    """
    tokens, found, block = images.tokens, [], 0
    for index in blocks:
        while block < index:
            if update:
                tokens = tokens + decoder.feed_forward(block, tokens)
            if block < len(images.extra):
                tokens = tokens + images.extra[block]
            block += 1
        found.append(tokens)
    return found
