"""From the image encoder's width to the text model's, telling each token where in its picture it stands.

Shapes: N image tokens of all images, d_v width of the encoder, d width of the text model.

A text model with one-dimensional rotary positions gives all tokens of an image one position (paper,
"Positions"), and the encoder's own rotary positions are relative. So the place is put into the token here.
"""

import torch
from torch import Tensor, nn

OCTAVES = 4
PLACE_WIDTH = 2 * (1 + 2 * OCTAVES)


def place_features(grids: list[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(N, PLACE_WIDTH): height and width fraction of each token's centre, and their sines and cosines.

    grids: rows and columns of tokens of each image, whose tokens are in reading order.
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
    """LayerNorm of the encoder's token, its place beside it, then two linear layers: (N, d_v) to (N, d)."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_width, eps=1e-6)
        self.up = nn.Linear(vision_width + PLACE_WIDTH, text_width)
        self.down = nn.Linear(text_width, text_width)

    def forward(self, tokens: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        place = place_features(grids, tokens.device, tokens.dtype)
        hidden = self.up(torch.cat([self.norm(tokens), place], dim=-1))
        return self.down(nn.functional.gelu(hidden))
