"""Fewer image tokens before fusion: average pooling, pixel-shuffle, and a Q-Former (paper, C8 and question 1).

Shapes: n images, N image tokens of all images, N' of them after compression, d their width, s side of a cell
(s * s neighbouring tokens become one), q learned queries, e inner width of the Q-Former.

A compressor is named by a string "kind:number": "pool:2" and "pixel_shuffle:2" leave one token of each 2x2
cell, "q_former:32" leaves 32 tokens of each image, whatever its size. No image sees another.
"""

from difflib import get_close_matches

import torch
from torch import Tensor, nn

from casa.errors import UserError
from casa.vision.encoder import Grids
from casa.vision.q_former import QFormer

# the smallest number that makes sense, per kind: a cell of one token changes nothing
LEAST = {"pool": 2, "pixel_shuffle": 2, "q_former": 1}


def parse_compressor(spec: str) -> tuple[str, int]:
    """Kind and number of "pool:2", "pixel_shuffle:2", "q_former:32". Raises UserError for anything else."""
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


def make_compressor(spec: str, width: int, heads: int | None = None) -> nn.Module:
    """A compressor for tokens of `width` channels: `forward((N, width), grids)` gives `((N', width), grids')`.

    Its `grids(grids)` gives grids' without computing, and `reset_parameters()` fresh weights, for callers that
    initialise modules wholesale (transformers' `post_init`) and would undo the start chosen here.
    heads: attention heads of a Q-Former; about 64 channels each if left out.
    Raises UserError for a spec that `parse_compressor` refuses, or for heads that do not divide the width.
    """
    kind, number = parse_compressor(spec)
    if kind == "q_former":
        return QFormer(width, number, heads)
    return Pool(number) if kind == "pool" else PixelShuffle(width, number)


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


class Pool(_Cells):
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
