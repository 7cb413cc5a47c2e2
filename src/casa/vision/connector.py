"""What stands between an image encoder and the text model: the projector, and token compressors before fusion.

Shapes: n images, N image tokens of all images, N' of them after compression, d_v width of the encoder, d width of the
text model, s side of a cell (s * s neighbouring tokens become one), q learned queries, e inner width of the Q-Former,
M tokens of one image.

A compressor is named by a string "kind:number": "pool:2" and "pixel_shuffle:2" leave one token of each 2x2
cell, "q_former:32" leaves 32 tokens of each image, whatever its size. No image sees another.
"""

from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from casa.errors import UserError
from casa.vision.encoder import Grids

OCTAVES = 4
PLACE_WIDTH = 2 * (1 + 2 * OCTAVES)
# the smallest number that makes sense, per kind of compressor: a cell of one token changes nothing
LEAST = {"pool": 2, "pixel_shuffle": 2, "q_former": 1}
# of a Q-Former: its inner width at most (BLIP-2's), channels per head (about), blocks
INNER, HEAD, BLOCKS = 768, 64, 2


def place_features(grids: Grids, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(N, PLACE_WIDTH): height and width fraction of each token's centre, and their sines and cosines.

    Args:
        grids: Rows and columns of tokens of each image, whose tokens are in reading order.
    """
    found = []
    for rows, columns in grids:
        y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows
        x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns
        place = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # (rows * columns, 2)
        angles = place[..., None] * torch.pi * 2.0 ** torch.arange(OCTAVES, device=device)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        found.append(torch.cat([place, waves], dim=-1))
    empty = torch.zeros(0, PLACE_WIDTH, device=device)
    return torch.cat([empty, *found]).to(dtype)


class Projector(nn.Module):
    """LayerNorm of the encoder's token, its place beside it, then two linear layers: (N, d_v) to (N, d).

    A text model with one-dimensional rotary positions gives all tokens of an image one position (paper,
    "Positions"), and the encoder's own rotary positions are relative. So the place is put into the token here.
    """

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_width, eps=1e-6)
        self.up = nn.Linear(vision_width + PLACE_WIDTH, text_width)
        self.down = nn.Linear(text_width, text_width)

    def forward(self, tokens: Tensor, grids: Grids) -> Tensor:
        place = place_features(grids, tokens.device, tokens.dtype)
        hidden = self.up(torch.cat([self.norm(tokens), place], dim=-1))
        return self.down(nn.functional.gelu(hidden))


class LinearProjector(nn.Module):
    """The encoder's token and its place through one linear map, without a norm: (N, d_v) to (N, d).

    For encoders whose tokens have a scale of their own, which a norm would lose.
    """

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.map = nn.Linear(vision_width + PLACE_WIDTH, text_width)

    def forward(self, tokens: Tensor, grids: Grids) -> Tensor:
        return self.map(torch.cat([tokens, place_features(grids, tokens.device, tokens.dtype)], dim=-1))


PROJECTORS = {"mlp": Projector, "linear": LinearProjector}


def parse_compressor(spec: str) -> tuple[str, int]:
    """Returns kind and number of "pool:2", "pixel_shuffle:2", "q_former:32". Raises UserError for anything else."""
    kind, _, number = str(spec).partition(":")
    if kind not in LEAST:
        close = get_close_matches(kind, LEAST, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the known ones are: {', '.join(LEAST)}."
        raise UserError(f"compressor {spec!r} is of no known kind; {hint}")
    if not (number.isascii() and number.isdigit()) or int(number) < LEAST[kind]:
        least = LEAST[kind]
        counted = "queries per image" if kind == "q_former" else "tokens per side of a cell"
        raise UserError(f"compressor {spec!r} needs a number of {counted}, {least} or more, as in '{kind}:{least}'.")
    return kind, int(number)


def make_compressor(spec: str, width: int, heads: int | None = None) -> "AveragePool | PixelShuffle | QFormer":
    """Makes a compressor for tokens of `width` channels: `forward((N, width), grids)` gives `((N', width), grids')`.

    Its `grids(grids)` gives grids' without computing, and `reset_parameters()` fresh weights, for callers that
    initialise modules wholesale (transformers' `post_init`) and would undo the start chosen here.

    Args:
        spec: "pool:2", "pixel_shuffle:2", "q_former:32".
        width: d.
        heads: Attention heads of a Q-Former; about 64 channels each if None.

    Returns:
        The module.

    Raises:
        UserError: `parse_compressor` refuses the spec, or the heads do not divide the width.
    """
    kind, number = parse_compressor(spec)
    if kind == "q_former":
        return QFormer(width, number, heads)
    return AveragePool(number) if kind == "pool" else PixelShuffle(width, number)


def cells(grids: Grids, side: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Where the tokens of each cell are: int64 (N', s * s) rows of the token tensor, and bool which are real.

    Cells cut off by the edge of their image name its last row or column again in place of what is missing.

        3 columns, s = 2:   a b c     cells   a b | c c     real   1 1 | 1 0
                            d e f             d e | f f            1 1 | 1 0
    """
    shape = torch.tensor(grids, dtype=torch.int64, device=device).view(-1, 2)
    rows, columns = shape.unbind(1)
    down, across = ((shape + side - 1) // side).unbind(1)
    image = torch.repeat_interleave(down * across)  # (N',) the image each cell is in
    place = torch.arange(len(image), device=device) - _starts(down * across)[image]
    step = torch.arange(side, device=device)
    row = (place // across[image] * side)[:, None] + step  # (N', s)
    column = (place % across[image] * side)[:, None] + step
    last_row, last_column = (rows - 1)[image, None], (columns - 1)[image, None]
    real = (row <= last_row)[:, :, None] & (column <= last_column)[:, None, :]
    inside = torch.minimum(row, last_row)[:, :, None] * columns[image, None, None]
    source = _starts(rows * columns)[image, None, None] + inside + torch.minimum(column, last_column)[:, None, :]
    return source.flatten(1), real.flatten(1)


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


class _Cells(nn.Module):
    """What pooling and pixel-shuffle share: an image of r x c tokens becomes ceil(r / s) x ceil(c / s)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def grids(self, grids: Grids) -> Grids:
        """Rows and columns after compression."""
        return [(-(-rows // self.side), -(-columns // self.side)) for rows, columns in grids]

    def reset_parameters(self) -> None:
        """Fresh weights, where there are any."""

    def extra_repr(self) -> str:
        return f"side={self.side}"


class AveragePool(_Cells):
    """The mean of each cell's tokens; at an edge, of those that are there. No weights."""

    def forward(self, tokens: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
        """(N, d) and grids to (N', d) and grids'."""
        source, real = cells(grids, self.side, tokens.device)
        share = real.to(tokens.dtype)[..., None]
        return (tokens[source] * share).sum(1) / share.sum(1), self.grids(grids)


class PixelShuffle(_Cells):
    """Each cell's tokens side by side, then one linear map back to the width.

    What is missing at an edge is filled with the edge's own tokens. The map starts as the mean of the cell, so
    that a trained projector goes on reading what it knows. (Idefics3 and InternVL reduce their tokens so.)
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__(side)
        self.join = nn.Linear(side * side * width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        width, count = self.join.out_features, self.side**2
        self.join.weight.copy_(torch.eye(width).repeat(1, count) / count)
        nn.init.zeros_(self.join.bias)

    def forward(self, tokens: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
        """(N, d) and grids to (N', d) and grids'."""
        source, _ = cells(grids, self.side, tokens.device)
        return self.join(tokens[source].flatten(1)), self.grids(grids)


class QFormer(nn.Module):
    """(N, d) tokens of n images to (n * q, d): q learned queries read an image and take its place.

    As in BLIP-2, the queries look at each other, then at the image, then pass an FFN, block by block. Unlike it,
    there is no text in it, no pretraining, two blocks instead of twelve, norms come first, and the tokens' places
    in the picture are added to what the queries look at: afterwards a token no longer stands anywhere.
    Raises UserError for heads that do not divide its inner width.
    """

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
        self.blocks = nn.ModuleList(QFormerBlock(inner, heads) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, width))
        nn.init.normal_(self.queries)

    def reset_parameters(self) -> None:
        """Fresh weights."""
        for module in self.modules():
            if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        # apart from each other from the start: queries that look alike stay alike
        nn.init.normal_(self.queries)

    def grids(self, grids: Grids) -> Grids:
        """One row of q tokens for each image."""
        return [(1, len(self.queries))] * len(grids)

    def forward(self, tokens: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
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


class QFormerBlock(nn.Module):
    """Queries (b, q, e) to queries, after a look at each other and at their image's tokens (b, M, e)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.look_around = QFormerAttention(width, heads)
        self.look_at_image = QFormerAttention(width, heads)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, images: Tensor) -> Tensor:
        normed = self.norms[0](hidden)
        hidden = hidden + self.look_around(normed, normed)
        hidden = hidden + self.look_at_image(self.norms[1](hidden), images)
        return hidden + self.down(gelu(self.up(self.norms[2](hidden))))


class QFormerAttention(nn.Module):
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
