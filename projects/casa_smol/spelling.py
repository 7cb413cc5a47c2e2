"""What is written, in the tokens of a language model: dense targets of the page encoder, and how they are learned.

An image token of 16 x 16 px is told which of the model's tokens begin in it, and which one stands before those, so that
its code says what a reader who has come that far says next. A text begins after a line break and ends with one: a
prompt's last token is a line break, so reading begins where a text does, and where a break is read the text is over.

Shapes: n pages, Rt x Ct image tokens of each, OWN tokens of text in each at most, V words of the language model, D
width of their embeddings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from projects.casa_smol.canvas import Glyphs
from projects.casa_smol.fonts import CHARACTERS
from projects.casa_smol.targets import LEAST_X_HEIGHT

OWN = 3
UNKNOWN, NOTHING = -1, -2


@dataclass(frozen=True)
class Spelling:
    """The tokens of a language model that a page's texts are made of, by the image token where each begins.

    ids: int32 (rows, columns, 1 + OWN): the token before the first that begins here, and those that begin here, in
        order; NOTHING where there is none, UNKNOWN where it is not all on the page.
    counts: uint8 (rows, columns): how many begin here, OWN at most.
    """

    ids: np.ndarray
    counts: np.ndarray


def spelling_of(
    glyphs: Glyphs, size: tuple[int, int], token: tuple[int, int], encode: Callable[[str], Any]
) -> Spelling:
    """size: width and height of the page. token: height and width of an image token. encode: a text to ids and offsets.

    Only tokens whose characters are all on the page count. The line break after a text stands at its last character.
    """
    rows, columns = size[1] // token[0], size[0] // token[1]
    line_break = encode("\n")[0][0]
    ids = np.full((rows, columns, 1 + OWN), NOTHING, dtype=np.int32)
    counts = np.zeros((rows, columns), dtype=np.uint8)
    x, y = glyphs.boxes[:, [0, 2]].mean(1), glyphs.boxes[:, [1, 3]].mean(1)
    inside = (x >= 0) & (y >= 0) & (x < columns * token[1]) & (y < rows * token[0])
    inside &= glyphs.boxes[:, 3] - glyphs.boxes[:, 1] >= LEAST_X_HEIGHT
    for start, stop in _runs(glyphs.runs):
        text = "".join(CHARACTERS[one - 1] for one in glyphs.classes[start:stop])
        if not inside[start:stop].any() or not text.strip():
            continue
        before = line_break
        end = len(text.rstrip())
        for number, (first, last) in [*encode(text[:end]), (line_break, (end - 1, end))]:
            first += len(text[first:last]) - len(text[first:last].lstrip())
            if first == last:
                continue
            if not inside[start + first : start + last].all():
                before = UNKNOWN
                continue
            spot = int(y[start + first] // token[0]), int(x[start + first] // token[1])
            place = counts[spot]
            if place < OWN:
                if place == 0:
                    ids[spot][0] = before
                ids[spot][1 + place] = number
                counts[spot] += 1
            before = number
    return Spelling(ids, counts)


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """First and one past the last of equal numbers in a row."""
    borders = np.flatnonzero(np.diff(numbers)) + 1
    edges = [0, *borders.tolist(), len(numbers)]
    return list(pairwise(edges)) if len(numbers) else []


@lru_cache(maxsize=2)
def encoder_of(folder: Path) -> Callable[[str], list[tuple[int, tuple[int, int]]]]:
    """Of a text model's folder: a text to its tokens' ids and where each stands in it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text: str) -> list[tuple[int, tuple[int, int]]]:
        found = tokenizer.encode(text, add_special_tokens=False)
        return list(zip(found.ids, found.offsets, strict=True))

    return encode


def embeddings_of(folder: Path) -> Tensor:
    """(V, D) float32: a text model's words, each less their mean and of length 1."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        table = file.get_tensor("model.embed_tokens.weight").float()
    return nn.functional.normalize(table - table.mean(0), dim=-1)


class Speller(nn.Module):
    """Asks a code which tokens it stands for: by the model's own embeddings, so that rare ones are learned too.

    width: of the code.
    """

    words: Tensor

    def __init__(self, width: int, words: Tensor) -> None:
        super().__init__()
        self.counts = nn.Linear(width, 1 + OWN)
        self.asks = nn.Linear(width, (1 + OWN) * words.shape[1])
        self.sharpness = nn.Parameter(torch.tensor(2.3))
        self.register_buffer("words", words, persistent=False)

    def losses(self, code: Tensor, ids: Tensor, counts: Tensor, others: Tensor) -> dict[str, Tensor]:
        """How far the code is from saying what is written.

        spelled: nats a token, among those of the batch and the others. sizes: what is asked for is of length 1 where
        there is a token and of length 0 where there is none, so that a linear map of the code tells both.

        code: (n, T, width). ids: (n, T, 1 + OWN). counts: (n, T). others: any numbers, for words among which the
        right one is to be found.
        """
        code, ids, begins = code.flatten(0, 1), ids.flatten(0, 1).long(), counts.flatten() > 0
        asked = self.asks(code).unflatten(-1, (1 + OWN, -1)).float()
        length = asked.norm(dim=-1)
        known = ids >= 0
        near = torch.cat([ids[known].unique(), others % len(self.words)]).unique()
        place = torch.zeros(len(self.words), dtype=torch.long, device=ids.device)
        place[near] = torch.arange(len(near), device=ids.device)
        directions = nn.functional.normalize(asked[known], dim=-1).to(code.dtype)
        scores = (self.sharpness.exp() * directions @ self.words[near].to(code.dtype).T).float()
        spelled = nn.functional.cross_entropy(scores, place[ids[known]], reduction="sum") / known.sum().clamp(min=1)
        nothing = ids == NOTHING
        groups = ((length - 1)[known], length[nothing & begins[:, None]], length[nothing & ~begins[:, None]])
        sizes = torch.stack([part.square().sum() / max(1, part.numel()) for part in groups]).sum()
        counted = nn.functional.cross_entropy(self.counts(code).float(), counts.flatten().long())
        return {"spelled": spelled, "sizes": sizes, "counts": counted}

    @torch.no_grad()
    def right(self, code: Tensor, ids: Tensor) -> Tensor:
        """Whether the best of all V words is the right one: (M, 1 + OWN) for (M, width) and (M, 1 + OWN)."""
        # the code comes in bfloat16 where the encoder ran in it
        asked = self.asks(code.to(self.asks.weight.dtype)).unflatten(-1, (1 + OWN, -1))
        return (asked @ self.words.T).argmax(-1) == ids
