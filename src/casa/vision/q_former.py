"""A small Q-Former: q learned queries read an image and take its place (BLIP-2's idea; paper, C8).

Shapes: n images, N image tokens of all images, d their width, q queries, e inner width, M tokens of one image.

As in BLIP-2, the queries look at each other, then at the image, then pass an FFN, block by block. Unlike it,
there is no text in it, no pretraining, two blocks instead of twelve, norms come first, and the tokens' places
in the picture are added to what the queries look at: afterwards a token no longer stands anywhere.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from casa.errors import UserError
from casa.vision.projector import PLACE_WIDTH, place_features

INNER = 768  # e, at most: BLIP-2's width
HEAD = 64  # channels per head, about
BLOCKS = 2


class QFormer(nn.Module):
    """(N, d) tokens of n images to (n * q, d). Raises UserError for heads that do not divide its inner width."""

    def __init__(self, width: int, queries: int, heads: int | None = None, blocks: int = BLOCKS) -> None:
        super().__init__()
        inner = min(width, INNER)
        if heads is None:
            heads = next(count for count in range(max(1, inner // HEAD), 0, -1) if inner % count == 0)
        if heads < 1 or inner % heads:
            raise UserError(f"a Q-Former of width {inner} cannot have {heads} heads; give a divisor of {inner}.")
        self.queries = nn.Parameter(torch.empty(queries, inner))
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, inner)
        self.place = nn.Linear(PLACE_WIDTH, inner, bias=False)
        self.blocks = nn.ModuleList(Block(inner, heads) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, width))
        nn.init.normal_(self.queries)

    def reset_parameters(self) -> None:
        """Fresh weights."""
        for module in self.modules():
            if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        # apart from each other from the start: queries that look alike stay alike
        nn.init.normal_(self.queries)

    def grids(self, grids: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """One row of q tokens for each image."""
        return [(1, len(self.queries))] * len(grids)

    def forward(self, tokens: Tensor, grids: list[tuple[int, int]]) -> tuple[Tensor, list[tuple[int, int]]]:
        """(N, d) and grids to (n * q, d) and grids'. Images with equally many tokens go in one call."""
        places = place_features(grids, tokens.device, tokens.dtype)
        seen = self.enter(self.norm(tokens)) + self.place(places)
        counts = [rows * columns for rows, columns in grids]
        images = seen.split(counts)
        alike: dict[int, list[int]] = {}
        for number, count in enumerate(counts):
            alike.setdefault(count, []).append(number)
        found = [self._read(torch.stack([images[number] for number in numbers])) for numbers in alike.values()]
        order = torch.tensor([number for numbers in alike.values() for number in numbers], device=tokens.device)
        joined = torch.cat([seen.new_zeros(0, *self.queries.shape), *found])[order.argsort()]  # (n, q, e)
        return self.leave(joined.flatten(0, 1)), self.grids(grids)

    def _read(self, images: Tensor) -> Tensor:
        """(b, M, e) of b images to (b, q, e)."""
        hidden = self.queries.expand(len(images), -1, -1)
        for block in self.blocks:
            hidden = block(hidden, images)
        return hidden


class Block(nn.Module):
    """Queries (b, q, e) to queries, after a look at each other and at their image's tokens (b, M, e)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.look_around = Attention(width, heads)
        self.look_at_image = Attention(width, heads)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, images: Tensor) -> Tensor:
        normed = self.norms[0](hidden)
        hidden = hidden + self.look_around(normed, normed)
        hidden = hidden + self.look_at_image(self.norms[1](hidden), images)
        return hidden + self.down(gelu(self.up(self.norms[2](hidden))))


class Attention(nn.Module):
    """Plain attention of (b, q, e) on (b, M, e), without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, asking: Tensor, asked: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(asking), *self.key_value(asked).chunk(2, dim=-1))
        )
        return self.out(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
