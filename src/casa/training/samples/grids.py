"""What a picture will cost before it is decoded: its size from the header, the patches that its processor will make.

    header 1000 x 700 px  ->  resized 1008 x 700  ->  50 x 72 patches  ->  25 x 36 = 900 tokens

The rules are transformers' own, chosen by the kind of image processor, or told by the processor of an encoder that
brings one (`casa.vision.Family`); a test holds them equal to what the processors give.
"""

import io
import os
from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from casa.data.bad import BadRecord
from casa.data.record import Picture
from casa.errors import UserError
from casa.media import pictures as media
from casa.models.image_processing_casa import CasaFlexibleImageProcessor, CasaSquareImageProcessor, bounds
from casa.vision import family_of


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height in px, upright, from the file's header. Raises BadRecord if there is no readable header."""
    source = io.BytesIO(picture.source) if isinstance(picture.source, bytes) else picture.source
    try:
        return media.picture_size(source)
    except UserError as error:
        gone = not isinstance(picture.source, bytes) and not os.path.lexists(picture.source)
        raise BadRecord("missing-picture" if gone else "unreadable-picture", str(error)) from error


def fold_of(config: Any) -> int:
    """Patches per side of one image token, for the config of a casa model: the tower's merge times the connector's."""
    connector = getattr(config.text_config, "scale_factor", 1) if config.vision_config is None else 1
    return family_of(config.encoder_config).merge(config.encoder_config) * connector


class PictureGrids:
    """Patches and image tokens of pictures, for one image processor.

    fold: patches per side of one image token (`fold_of`); the processor's merge size if left out.
    Raises UserError for an image processor whose sizes casa does not know.
    """

    def __init__(self, image_processor: Any, fold: int | None = None) -> None:
        self._processor = image_processor
        self.fold = fold if fold is not None else getattr(image_processor, "merge_size", 1)
        kinds = (Qwen2VLImageProcessorPil, CasaFlexibleImageProcessor, CasaSquareImageProcessor)
        self._tells = hasattr(image_processor, "patch_grid")
        if not (self._tells or isinstance(image_processor, kinds)):
            raise UserError(
                f"casa cannot tell the size that {type(image_processor).__name__} gives a picture; make the processor "
                "with casa's processor_for or processor_of."
            )

    @property
    def shrinks(self) -> bool:
        """Whether a picture can be given fewer tokens."""
        return not isinstance(self._processor, CasaSquareImageProcessor)

    def grid(self, width: int, height: int, most_tokens: int | None = None) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that size in px. Raises BadRecord for one too elongated."""
        processor, kwargs = self._processor, self.arguments(most_tokens)
        if self._tells:
            return processor.patch_grid(height, width, **kwargs)
        patch = processor.patch_size
        if isinstance(processor, Qwen2VLImageProcessorPil):
            size = kwargs.get("size", processor.size)
            factor = patch * processor.merge_size
            try:
                rows, columns = smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
            except (ValueError, ZeroDivisionError) as error:
                raise BadRecord(
                    "unreadable-picture", f"A picture of {width} x {height} px is too elongated."
                ) from error
        elif isinstance(processor, CasaFlexibleImageProcessor):
            most = kwargs.get("max_num_patches", processor.max_num_patches)
            rows, columns = get_image_size_for_max_num_patches(height, width, patch, most)
        else:
            rows, columns = processor.size["height"], processor.size["width"]
        return rows // patch, columns // patch

    def tokens(self, grid: tuple[int, int]) -> int:
        return (grid[0] // self.fold) * (grid[1] // self.fold)

    def arguments(self, most_tokens: int | None) -> dict[str, Any]:
        """What the image processor must be told so that a picture has at most so many tokens."""
        if most_tokens is None or not self.shrinks:
            return {}
        processor, patches = self._processor, most_tokens * self.fold**2
        if self._tells:
            return processor.at_most(patches)
        patch = processor.patch_size**2
        flexible = isinstance(processor, CasaFlexibleImageProcessor)
        own = processor.max_num_patches * patch if flexible else processor.size["longest_edge"]
        return bounds(processor, max_pixels=min(patches * patch, own))
