"""Batches out of samples: their pictures are opened or, under a frozen image encoder, their image tokens are kept.

Shapes: T text tokens, n pictures, P patches and N image tokens of a batch (or of one picture), c channels of a patch,
d_v width of the image encoder's output.
"""

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from transformers import PreTrainedModel

from casa.atomic import DiskCache
from casa.data import BadRecord
from casa.data.pictures import open_one
from casa.models import CasaProcessor
from casa.models.losses import IGNORE_INDEX
from casa.training.samples import PictureGrids, SizedPicture, TrainingSample

Tensors = dict[str, Tensor]


class PackCollator:
    """Makes batches of one row, as CasaForConditionalGeneration takes them; pictures are opened here.

        input_ids     a a a a a b b b      two samples
        position_ids  0 1 2 3 4 0 1 2      restart with every sample: that is how samples are kept apart
        labels        - - - a a - b b      answers only; the first token of a sample is never one

    A batch without a picture gets a blank one, in a sample of one token that nothing is learned from, so that every
    parameter takes part in every step (distributed training waits for all gradients of all ranks).

    Attributes:
        cache: Gives a picture's image tokens in place of its pixels.
    """

    def __init__(self, processor: CasaProcessor, *, fold: int | None = None) -> None:
        self.processor, self.fold = processor, fold
        self.cache: FeatureCache | None = None
        self._grids = PictureGrids(processor.image_processor, fold)

    def prepare(self, sample: TrainingSample) -> list[Tensors]:
        """Opens and prepares a sample's pictures.

        Returns:
            Of each: `pixel_values`, or `image_features` where these are kept, and `image_grid_thw`.

        Raises:
            BadRecord: One cannot be read.
        """
        found = []
        for number, sized in enumerate(sample.pictures, start=1):
            pixels = partial(self._opened, sized, number)
            found.append(pixels() if self.cache is None else self.cache.get(sized, pixels))
        return found

    def _opened(self, sized: SizedPicture, number: int) -> Tensors:
        image = open_one(sized.picture, number)
        try:
            return self._pixels(image, sized.max_tokens)
        except ValueError as error:
            raise BadRecord("unreadable-picture", f"Picture {number} cannot be prepared: {error}") from error

    def _pixels(self, image: Image.Image, max_tokens: int | None) -> Tensors:
        arguments = copy.deepcopy(self._grids.arguments(max_tokens))
        found = self.processor.image_processor(images=[image], return_tensors="pt", **arguments)
        return {name: found[name] for name in ("pixel_values", "image_grid_thw")}

    def __call__(self, samples: Sequence[TrainingSample], prepared: Sequence[list[Tensors]] | None = None) -> Tensors:
        """The batch of these samples.

        Args:
            prepared: What `prepare` gave for each sample; they are prepared now if left out.

        Returns:
            input_ids, position_ids and labels, int64 (1, T); image_positions, int64 (n, 2); image_grid_thw, int64
            (n, 3); pixel_values, float32 (P, c), or (n, 3, H, W) for encoders that see squares, or in their place
            image_features (N, d_v), if they are kept.
        """
        if prepared is None:
            prepared = [self.prepare(sample) for sample in samples]
        pictures = [picture for each in prepared for picture in each]
        ids: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        places: list[tuple[int, int]] = []
        for sample in samples:
            places += [(0, len(ids) + place) for place in sample.places]
            learned = [token if learn else IGNORE_INDEX for token, learn in zip(sample.ids, sample.learn, strict=True)]
            labels += [IGNORE_INDEX, *learned[1:]]
            positions += range(len(sample.ids))
            ids += sample.ids
        if not pictures:
            places.append((0, len(ids)))
            ids.append(ids[-1] if ids else 0)
            positions.append(0)
            labels.append(IGNORE_INDEX)
            blank = self._pixels(Image.new("RGB", (32, 32)), 1)
            pictures = [blank if self.cache is None else self.cache.encoded(blank)]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
            "image_positions": torch.tensor(places),
            **{name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]},
        }


class FeatureCache:
    """Image tokens of a frozen image encoder: a picture that comes again is neither opened nor encoded.

        first time    file -> pixels (P, c) -> encoder -> tokens (N, d_v), kept
        afterwards                              kept   -> tokens (N, d_v)

    Args:
        encode: From pixel_values (P, c) and image_grid_thw (1, 3) to image tokens (N, d_v), in host memory.
        max_bytes: Of all tokens kept in memory; once full, further pictures are encoded each time, or read from the
            folder, where all of them are kept.
        open_folder: Gives the folder; it is called with the first picture.

    Attributes:
        held: Bytes in memory now.
        hits, encodes: How often a picture was there, and how often it was encoded.
    """

    def __init__(
        self,
        encode: Callable[[Tensor, Tensor], Tensor],
        max_bytes: int,
        open_folder: "Callable[[], FeatureFolder] | None" = None,
    ) -> None:
        self._encode, self._max, self._open_folder = encode, max_bytes, open_folder
        self.folder: FeatureFolder | None = None
        self._tokens: dict[tuple, Tensors] = {}
        self.held = self.hits = self.encodes = 0

    def get(self, sized: SizedPicture, pixels: Callable[[], Tensors]) -> Tensors:
        """`image_features` (N, d_v) and `image_grid_thw` (1, 3) of a picture; pixels: opens it, if it must be."""
        try:
            key = _key(sized)
        except OSError:
            # whoever opens it says what is wrong with the file
            return self.encoded(pixels())
        if (held := self._tokens.get(key)) is not None:
            self.hits += 1
            return held
        if self.folder is None and self._open_folder is not None:
            self.folder = self._open_folder()
        made = self.folder.get(key) if self.folder is not None else None
        if made is None:
            made = self.encoded(pixels())
            if self.folder is not None:
                self.folder.keep(key, made)
        size = sum(tensor.nbytes for tensor in made.values())
        if self.held + size <= self._max:
            self._tokens[key] = made
            self.held += size
        return made

    def encoded(self, pixels: Tensors) -> Tensors:
        """The same for pixels that nobody asks for again."""
        self.encodes += 1
        grid = pixels["image_grid_thw"]
        return {"image_features": self._encode(pixels["pixel_values"], grid), "image_grid_thw": grid}


def _key(sized: SizedPicture) -> tuple:
    source = sized.picture.source
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=16).digest(), sized.max_tokens
    # a file that was written anew is another picture
    there = source.stat()
    return os.path.realpath(source), there.st_mtime_ns, there.st_size, sized.max_tokens


class FeatureFolder(DiskCache):
    """Image tokens on disk, for a run that goes on, and for another with the same encoder.

        FOLDER/<encoder>/<key>.safetensors     image_features (N, d_v), image_grid_thw (1, 3)

    Args:
        encoder: What the tokens are made with, as `encoder_digest` gives it.

    Attributes:
        hits: Pictures that were there so far.

    Raises:
        UserError: The folder cannot be made.
    """

    def __init__(self, folder: str | Path, encoder: str) -> None:
        super().__init__(Path(folder) / encoder, ".safetensors", "image tokens", "feature_cache_dir")
        self.hits = 0

    def get(self, key: tuple) -> Tensors | None:
        """What was kept; None if there is nothing, or nothing that can be read."""
        try:
            # read whole: a mapped file for each picture would soon be more than a process may have
            found = load(self.path(key).read_bytes())
        except (OSError, SafetensorError):
            return None
        if found.keys() != {"image_features", "image_grid_thw"}:
            return None
        self.hits += 1
        return found

    def keep(self, key: tuple, tensors: Tensors) -> None:
        """Keeps tensors that are in host memory."""

        def write(file: Path) -> None:
            try:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
            except SafetensorError as error:
                # a full disk, as safetensors says it
                raise OSError(str(error)) from error

        self.put(key, write)


def encoder_digest(encoder: PreTrainedModel, image_processor: Any, *more: object) -> str:
    """Sixteen hexadecimal digits for what image tokens depend on, except the picture.

    Args:
        encoder: Its class, config and weights count.
        more: Whatever else matters, such as the precision.
    """
    digest = hashlib.blake2b(digest_size=8)
    settings = encoder.config.to_json_string(use_diff=False), image_processor.to_json_string()
    digest.update(repr((type(encoder).__name__, *settings, *more)).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # as bytes, since numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
