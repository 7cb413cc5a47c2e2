"""The windows that the attention benchmark times: small ones on a CPU, the paper's on CUDA."""

import random
from dataclasses import dataclass

from casa.windows import WindowLayout


@dataclass(frozen=True)
class BenchShape:
    """`windows` windows of one image of `image` tokens and `text[0]`..`text[1]` text tokens each.

    queries: how many of a window's text tokens, the last, have a query; None for all, in one packed sample. With a
        number each window is a sample of its own, as rows that decode are.
    """

    name: str
    windows: int
    image: int
    text: tuple[int, int]
    queries: int | None = None

    def layout(self, seed: int) -> WindowLayout:
        chance = random.Random(seed)
        lengths = [chance.randint(*self.text) for _ in range(self.windows)]
        if self.queries is not None:
            past = [length - self.queries for length in lengths]
            return WindowLayout.from_insertions(lengths, [[(0, self.image)]] * self.windows, past=past)
        position, insertions = 0, []
        for length in lengths:
            insertions.append((position, self.image))
            position += length
        return WindowLayout.from_insertions([position], [insertions])


SHAPES = (
    BenchShape("64 x (64 + 16)", 64, 64, (16, 16)),
    BenchShape("16 x (256 + 64)", 16, 256, (64, 64)),
    BenchShape("8 x (1024 + 128)", 8, 1024, (128, 128)),
    BenchShape("ragged 16 x (256 + 4..90)", 16, 256, (4, 90)),
)
CUDA_SHAPES = (
    # the paper's packed batch, 2,048 text and 20,480 image tokens (section 4)
    BenchShape("packed 16 x (1280 + 128)", 16, 1280, (128, 128)),
    BenchShape("packed 16 x (1280 + 16..240)", 16, 1280, (16, 240)),
    BenchShape("packed 128 x (160 + 16)", 128, 160, (16, 16)),
    # a frame of 896 px is 1,024 tokens
    BenchShape("decode 1 x (1024 + 16)", 1, 1024, (16, 16), queries=1),
    BenchShape("decode 16 x (1024 + 1..32)", 16, 1024, (1, 32), queries=1),
    BenchShape("decode 256 x (1024 + 1..32)", 256, 1024, (1, 32), queries=1),
)
