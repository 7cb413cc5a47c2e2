"""The page encoder: a small residual ConvNet that sees characters, for pages, receipts, charts and screens of any size.

Shapes: n pictures, H x W pixels, cells of 8 x 4 px (rows R = H / 8, columns C = W / 4), d width of a cell's features,
K classes: 0 where no character is, then the characters of the config in order; N image tokens.

It is trained on dense targets (which character stands at each cell), so that its features say what is written where.
A token is a block of cells, side by side; it may hold the words of a text model that begin there, too, which are read
off the cells (`page_reading.py`) and looked up in a table of the text model's embeddings.
Pictures keep their size: they are padded to whole tokens, and made smaller or larger only where they leave the bounds
of the config.
"""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import ImagesKwargs

from casa.errors import UserError
from casa.vision.encoder import EncoderSpec, register_encoder
from casa.vision.page_reading import FOLLOWING, TextRun, read_runs
from casa.vision.page_words import SLOTS, Encode, apart, known_words, words_of_page

CELL = (8, 4)
ASCII = "".join(map(chr, range(32, 127)))
CODE_STEP = 1 / 256  # of the table of words: codes are of length 1, hardly any number is above 0.4
WAVES = 7  # of places, from 32 px up, each twice as long


class PageEncoderConfig(PreTrainedConfig):
    """Configuration of a `PageEncoder`.

    Attributes:
        characters: What it tells apart; its classes are 0, "no character", and these.
        stem_sizes: Widths of the two layers that bring the picture to a quarter of its size.
        hidden_size: d.
        dilations: One residual block each, that wide steps from side to side.
        token_size: Height and width of a token in pixels, whole cells.
        token_parts: What a token is made of: "features" (d per cell), "classes" (K probabilities per cell), "places"
            (where in the picture it stands, in waves of pixels), "words" (codes of the text model's tokens, by the
            slots of `page_words.py`).
        reads: Whether it has what reading needs: middles of characters, and what stands around each.
        vocabulary: Of the text model that "words" are those of: how many it has, and the bytes of its tokenizer,
            packed. Both 0 for an encoder without them (`PageEncoder.learn_words`).
        text_end: Id of the token that ends a text; a line break if None.
        word_sizes: Widths of the codes by slot: a shorter one is the beginning of a longer.
        batch_norm: Whether convolutions are followed by BatchNorm, as they are in training (see `PageEncoder.folded`).
        image_mean, image_std: Per channel.
        min_pixels, max_pixels: Bounds for the area of a picture.
    """

    model_type = "casa_page_encoder"

    characters: str = ASCII
    stem_sizes: tuple[int, int] | list[int] = (32, 64)
    hidden_size: int = 112
    dilations: tuple[int, ...] | list[int] = (1, 2, 1, 2, 1, 2)
    token_size: tuple[int, int] | list[int] = (16, 32)
    token_parts: tuple[str, ...] | list[str] = ("features", "classes")
    reads: bool = False
    vocabulary: tuple[int, int] | list[int] = (0, 0)
    text_end: int | None = None
    word_sizes: tuple[int, ...] | list[int] = (84, 60, 24, 24, 24, 88, 128, 64, 48)
    batch_norm: bool = False
    image_mean: tuple[float, ...] | list[float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] | list[float] = (0.5, 0.5, 0.5)
    min_pixels: int = 64 * 64
    max_pixels: int = 896 * 896

    def __post_init__(self, **kwargs: Any) -> None:
        if any(side < 1 or side % cell for side, cell in zip(self.token_size, CELL, strict=True)):
            raise UserError(f"token_size is {self.token_size}; give multiples of {CELL[0]} rows and {CELL[1]} columns.")
        unknown = [part for part in self.token_parts if part not in PARTS]
        if unknown or not self.token_parts:
            named = ", ".join(map(repr, unknown)) or "empty"
            raise UserError(f"token_parts is or has {named}; the parts are {', '.join(PARTS)}.")
        if "words" in self.token_parts and not (self.reads and self.vocabulary[0]):
            raise UserError("token_parts has 'words', and this encoder has learned none; see PageEncoder.learn_words.")
        super().__post_init__(**kwargs)

    @property
    def classes(self) -> int:
        """K."""
        return 1 + len(self.characters)


PARTS = {
    "features": lambda config: _cells_per_token(config) * config.hidden_size,
    "classes": lambda config: _cells_per_token(config) * config.classes,
    "places": lambda config: 4 * WAVES,
    "words": lambda config: sum(config.word_sizes),
}


def _cells_per_token(config: Any) -> int:
    return config.token_size[0] // CELL[0] * (config.token_size[1] // CELL[1])


def _layer(size: tuple[int, int], kernel: int, batch_norm: bool, **kwargs: Any) -> nn.Sequential:
    conv = nn.Conv2d(*size, kernel, bias=not batch_norm, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(size[1])) if batch_norm else nn.Sequential(conv)


class ResidualBlock(nn.Module):
    """A 3x3 convolution, which may reach further from side to side, and a 1x1 one, added to what came in."""

    def __init__(self, width: int, dilation: int, batch_norm: bool) -> None:
        super().__init__()
        self.look = _layer((width, width), 3, batch_norm, padding=(1, dilation), dilation=(1, dilation))
        self.mix = _layer((width, width), 1, batch_norm)

    def forward(self, cells: Tensor) -> Tensor:
        return torch.relu(cells + self.mix(torch.relu(self.look(cells))))


class PageEncoder(PreTrainedModel):
    """Pictures (n, 3, H, W), sides in whole cells, to features (n, d, R, C) and the classes of their cells."""

    config_class = PageEncoderConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    word_codes: Tensor
    tokenizer: Tensor

    def __init__(self, config: PageEncoderConfig) -> None:
        super().__init__(config)
        first, second = config.stem_sizes
        norm, width = config.batch_norm, config.hidden_size
        self.first = _layer((3, first), 3, norm, stride=2, padding=1)
        self.second = _layer((first, second), 3, norm, stride=2, padding=1)
        self.quarter = ResidualBlock(second, 1, norm)
        self.third = _layer((second, width), 3, norm, stride=(2, 1), padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width, dilation, norm) for dilation in config.dilations)
        self.classifier = nn.Conv2d(width, config.classes, 1)
        if config.reads:
            self.middles = nn.Conv2d(width, 1, 1)
            self.around = nn.Linear(width, (1 + FOLLOWING) * config.classes)
        count, size = config.vocabulary
        codes = torch.zeros(count, max(config.word_sizes), dtype=torch.int8)
        self.register_buffer("word_codes", codes, persistent=count > 0)
        self.register_buffer("tokenizer", torch.zeros(size, dtype=torch.uint8), persistent=size > 0)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, d, R, C): features of cells."""
        cells = torch.relu(self.first(pixel_values))
        cells = self.quarter(torch.relu(self.second(cells)))
        cells = torch.relu(self.third(cells))
        for block in self.blocks:
            cells = block(cells)
        return cells

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """(n, rows * columns, width): the parts of each token side by side, tokens in reading order."""
        cells = self(pixel_values)
        return torch.cat([self.part(name, cells) for name in self.config.token_parts], dim=-1)

    def part(self, name: str, cells: Tensor) -> Tensor:
        """(n, rows * columns, width): one part of the tokens, by its name in `PARTS`, of what `forward` returns."""
        return getattr(self, f"_{name}")(cells)

    def folded(self) -> "PageEncoder":
        """The same encoder with every BatchNorm worked into the convolution before it, as it is in `eval` mode."""
        config = PageEncoderConfig.from_dict(self.config.to_dict() | {"batch_norm": False})
        found: Any = PageEncoder(config)
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, nn.Sequential) and len(module) == 2:
                    whole: Any = nn.utils.fuse_conv_bn_eval(*module.eval())  # type: ignore[arg-type]
                    found.get_submodule(name)[0].load_state_dict(whole.state_dict())
            found.classifier.load_state_dict(self.classifier.state_dict())
            if self.config.reads:
                found.middles.load_state_dict(self.middles.state_dict())
                found.around.load_state_dict(self.around.state_dict())
            found.word_codes, found.tokenizer = self.word_codes.clone(), self.tokenizer.clone()
        return found.to(self.dtype).eval()

    def _features(self, cells: Tensor) -> Tensor:
        high, wide = self._block
        blocks = cells.unflatten(2, (-1, high)).unflatten(4, (-1, wide))  # (n, d, rows, high, columns, wide)
        return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _classes(self, cells: Tensor) -> Tensor:
        return self._features(self.classifier(cells).softmax(dim=1))

    def runs(self, cells: Tensor) -> list[list[TextRun]]:
        """The texts of each page, of what `forward` returns."""
        with torch.no_grad():
            middles, classes = self.middles(cells).float().sigmoid(), self.classifier(cells).float().softmax(1)
            found = []
            for page, middle, kinds in zip(cells, middles[:, 0], classes, strict=True):

                def around(spots: Tensor, page: Tensor = page) -> Tensor:
                    told = self.around(page[:, spots[:, 0], spots[:, 1]].T)
                    return told.float().unflatten(-1, (1 + FOLLOWING, -1)).softmax(-1)

                found.append(read_runs(middle, kinds, around, self.config.characters))
        return found

    def learn_words(self, codes: Tensor, tokenizer: str, end: int | None = None) -> None:
        """Takes over the vocabulary of a text model, so that tokens may have the part "words".

        Args:
            codes: (V, the widest of `word_sizes`), of length 1: what is told of each word, the most telling first.
            tokenizer: The text of the text model's tokenizer.json.
            end: Id of the token that ends an answer; a line break if None.
        """
        packed = torch.frombuffer(bytearray(zlib.compress(tokenizer.encode(), 9)), dtype=torch.uint8)
        self.register_buffer("word_codes", (codes / CODE_STEP).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("tokenizer", packed)
        self.config.vocabulary, self.config.text_end = (len(codes), len(packed)), end

    def _words(self, cells: Tensor) -> Tensor:
        block = self._block
        grid = cells.shape[2] // block[0], cells.shape[3] // block[1]
        encode, known = _encoder_of(self.tokenizer.cpu().numpy().tobytes())
        how = (grid, block, encode, self.config.text_end, known)
        pages = [words_of_page(apart(runs), *how).ids for runs in self.runs(cells)]
        return self.codes_of(torch.from_numpy(np.stack(pages)).to(cells.device).flatten(1, 2), cells.dtype)

    def codes_of(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., sum of `word_sizes`): of each slot the sum of its groups' codes, those of n words over the root of n.

        ids: int32 or int64 (..., `IDS`), -1 where there is no word.
        """
        given = (ids >= 0).to(dtype)[..., None]
        codes = self.word_codes[ids.clamp(min=0)].to(dtype) * CODE_STEP * given
        sizes = [most for slot in SLOTS for most in slot]
        groups = zip(codes.split(sizes, dim=-2), given.split(sizes, dim=-2), strict=True)
        added = iter([code.sum(-2) / some.sum(-2).clamp(min=1) ** 0.5 for code, some in groups])
        told = [
            sum(next(added)[..., :size] for _ in slot) * (codes.shape[-1] / size) ** 0.5
            for slot, size in zip(SLOTS, self.config.word_sizes, strict=True)
        ]
        return torch.cat(told, dim=-1)

    @property
    def _block(self) -> tuple[int, int]:
        """Rows and columns of cells of a token."""
        high, wide = (side // cell for side, cell in zip(self.config.token_size, CELL, strict=True))
        return high, wide

    def _places(self, cells: Tensor) -> Tensor:
        rows, columns = (side // part for side, part in zip(cells.shape[2:], self._block, strict=True))
        found = place_waves(rows, columns, self.config.token_size, cells.device)
        return found.to(cells.dtype).expand(len(cells), -1, -1)


def place_waves(rows: int, columns: int, token_size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """float32 (rows * columns, 4 * WAVES): sines and cosines of where each token's middle stands, in pixels.

    Args:
        token_size: Height and width of a token in pixels.
    """
    waves = []
    for count, side in zip((rows, columns), token_size, strict=True):
        middle = (torch.arange(count, device=device) + 0.5) * side
        angle = middle[:, None] * (2 * torch.pi / 32) / 2.0 ** torch.arange(WAVES, device=device)
        waves.append(torch.cat([angle.sin(), angle.cos()], dim=-1))
    y, x = waves
    return torch.cat([y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)], dim=-1).flatten(0, 1)


@lru_cache(maxsize=2)
def _encoder_of(packed: bytes) -> tuple[Encode, frozenset[str]]:
    tokenizer = Tokenizer.from_str(zlib.decompress(packed).decode())

    def encode(text: str) -> list[tuple[int, tuple[int, int]]]:
        found = tokenizer.encode(text, add_special_tokens=False)
        return list(zip(found.ids, found.offsets, strict=True))

    return encode, known_words(tokenizer.get_vocab())


class PagePicturesKwargs(ImagesKwargs, total=False):
    """What a call may set.

    Attributes:
        token_size: Height and width of a token.
        min_pixels, max_pixels: Bounds for the area of a picture.
    """

    token_size: list[int]
    min_pixels: int
    max_pixels: int


class CasaPageImageProcessor(PilBackend):
    """Pictures at their own size, padded below and at the right with their last pixels, as blocks of one token each.

    `pixel_values` (N, 3 * height * width of a token), in reading order; `image_grid_thw` int64 (n, 3), in tokens.
    """

    valid_kwargs = PagePicturesKwargs
    do_convert_rgb = True
    do_rescale = True
    do_normalize = True
    resample = PILImageResampling.BICUBIC
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    token_size = (16, 32)
    min_pixels = 64 * 64
    max_pixels = 896 * 896
    model_input_names = ("pixel_values", "image_grid_thw")

    def patch_grid(self, height: int, width: int, max_pixels: int | None = None) -> tuple[int, int]:
        """Rows and columns of tokens of a picture of `height` x `width` pixels."""
        return self._sizes(height, width, self.min_pixels, max_pixels or self.max_pixels, self.token_size)[1]

    def at_most(self, patches: int) -> dict[str, int]:
        """The bound under which no picture has more tokens than `patches`."""
        return {"max_pixels": min(patches * self.token_size[0] * self.token_size[1], self.max_pixels)}

    @staticmethod
    def _sizes(height: int, width: int, least: int, most: int, token: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width in pixels that a picture is seen at, and its grid of tokens: proportions are kept."""
        scale = max(1.0, (least / (height * width)) ** 0.5)
        while True:
            sides = max(1, round(height * scale)), max(1, round(width * scale))
            grid = -(-sides[0] // token[0]), -(-sides[1] // token[1])
            area = grid[0] * token[0] * grid[1] * token[1]
            if area <= most or grid == (1, 1) or sides == (1, 1):
                return sides, grid
            scale *= min(0.99, (most / area) ** 0.5)

    def _preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: list[np.ndarray],
        token_size: Any,
        min_pixels: int,
        max_pixels: int,
        resample: Any,
        rescale_factor: float,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        blocks, grids = [], []
        for image in images:
            sides, grid = self._sizes(image.shape[-2], image.shape[-1], min_pixels, max_pixels, token_size)
            if sides != image.shape[-2:]:
                image = self.resize(image, SizeDict(height=sides[0], width=sides[1]), resample=resample)
            lacking = [count * side - own for count, side, own in zip(grid, token_size, sides, strict=True)]
            image = np.pad(image, ((0, 0), (0, lacking[0]), (0, lacking[1])), mode="edge")
            image = self.normalize(self.rescale(image, rescale_factor), image_mean, image_std)
            cut = image.reshape(3, grid[0], token_size[0], grid[1], token_size[1])
            blocks.append(cut.transpose(1, 3, 0, 2, 4).reshape(grid[0] * grid[1], -1).astype(np.float32))
            grids.append((1, *grid))
        data = {"pixel_values": np.concatenate(blocks), "image_grid_thw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data=data, tensor_type=return_tensors)


def image_processor(config: Any, max_pixels: int | None = None) -> CasaPageImageProcessor:
    """The processor with an encoder's own picture settings."""
    settings: dict[str, Any] = {
        "token_size": list(config.token_size),
        "min_pixels": config.min_pixels,
        "max_pixels": max_pixels if max_pixels is not None else config.max_pixels,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    return CasaPageImageProcessor(**settings)


def _flops(encoder: PageEncoder, rows: int, columns: int) -> int:
    """2 * weights of each convolution * the places it is at."""
    high, wide = encoder.config.token_size
    area, total = rows * high * columns * wide, 0
    shares = {"first": 4, "second": 16, "quarter": 16}  # all others: cells
    reading = "words" in encoder.config.token_parts
    unused = () if reading else ("middles", *(() if "classes" in encoder.config.token_parts else ("classifier",)))
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d) and name not in unused:
            total += 2 * module.weight.numel() * area // shares.get(name.partition(".")[0], CELL[0] * CELL[1])
    return total


def _run(encoder: PageEncoder, pixel_values: Tensor, grid: Tensor) -> Tensor:
    """(N, width). Pictures of one size go through together."""
    high, wide = encoder.config.token_size
    shapes = [(rows, columns) for _, rows, columns in grid.tolist()]
    pictures = pixel_values.to(encoder.dtype).split([rows * columns for rows, columns in shapes])
    found: list[Any] = [None] * len(shapes)
    for rows, columns in dict.fromkeys(shapes):
        which = [number for number, shape in enumerate(shapes) if shape == (rows, columns)]
        blocks = torch.stack([pictures[number] for number in which]).view(len(which), rows, columns, 3, high, wide)
        whole = blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(which), 3, rows * high, columns * wide)
        tokens = encoder.tokens(whole.contiguous(memory_format=torch.channels_last))
        for number, own in zip(which, tokens, strict=True):
            found[number] = own
    return torch.cat(found)


register_encoder(
    PageEncoderConfig.model_type,
    EncoderSpec(
        model=PageEncoder,
        pictures="own",
        run=_run,
        width=lambda config: sum(PARTS[part](config) for part in config.token_parts),
        image_processor=image_processor,
        flops=_flops,
    ),
)
AutoImageProcessor.register(
    PageEncoderConfig,
    image_processor_classes={"pil": CasaPageImageProcessor, "torchvision": CasaPageImageProcessor},
    exist_ok=True,
)
