"""Pictures to pixels for encoders whose own image processor does not say how many patches a picture has.

Shapes: n pictures, P patches of all pictures, p side of a patch.

Thin wrappers around transformers' PIL processors (no torchvision): they add `image_grid_thw`, int64 (n, 3),
(1, rows, columns) in patches, and are registered so that a saved processor finds them again by name.
"""

from typing import Any

import numpy as np
from transformers import BatchFeature, PreTrainedConfig

# from here, because transformers 5.17 hides it at the top when torchvision is missing
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorKwargs,
    Siglip2ImageProcessorPil,
)
from transformers.processing_utils import ImagesKwargs

from casa.errors import UserError

OUTPUTS = ["pixel_values", "image_grid_thw"]


class SquareKwargs(ImagesKwargs, total=False):
    """As for other image processors; patch_size: p, in pixels."""

    patch_size: int


class CasaSquareImageProcessor(SiglipImageProcessorPil):
    """Every picture as one square of `size`, whatever its proportions: `pixel_values` (n, 3, size, size)."""

    valid_kwargs = SquareKwargs  # type: ignore[assignment]
    patch_size = 16
    model_input_names = OUTPUTS

    def _preprocess(self, *args: Any, **kwargs: Any) -> BatchFeature:
        patch_size, return_tensors = kwargs.pop("patch_size"), kwargs.pop("return_tensors")
        found = super()._preprocess(*args, return_tensors=None, **kwargs)
        squares = found["pixel_values"]
        grids = [(1, square.shape[-2] // patch_size, square.shape[-1] // patch_size) for square in squares]
        data = {"pixel_values": np.stack(squares), "image_grid_thw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data=data, tensor_type=return_tensors)


class CasaFlexibleImageProcessor(Siglip2ImageProcessorPil):
    """Pictures in their own proportions, in at most `max_num_patches` patches: `pixel_values` (P, 3 * p * p)."""

    valid_kwargs = Siglip2ImageProcessorKwargs
    do_convert_rgb = True
    model_input_names = OUTPUTS

    def _preprocess(self, *args: Any, **kwargs: Any) -> BatchFeature:
        return_tensors = kwargs.pop("return_tensors")
        found = super()._preprocess(*args, return_tensors=None, **kwargs)
        shapes = found["spatial_shapes"]
        real = [patches[: h * w] for patches, (h, w) in zip(found["pixel_values"], shapes, strict=True)]
        grids = [(1, h, w) for h, w in shapes]
        data = {"pixel_values": np.concatenate(real), "image_grid_thw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data=data, tensor_type=return_tensors)


def bounds(image_processor: Any, min_pixels: int | None = None, max_pixels: int | None = None) -> dict[str, Any]:
    """What keeps a picture between so many pixels, in the words of one kind of image processor; what is left out stays.

    Raises UserError where the size of a picture is fixed, or for bounds that nothing fits into.
    """
    if min_pixels is None and max_pixels is None:
        return {}
    if hasattr(image_processor, "patch_grid"):  # an encoder's own, which knows these words (casa.vision's Family)
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        return {name: value for name, value in given.items() if value is not None}
    if isinstance(image_processor, Qwen2VLImageProcessorPil):
        most = image_processor.size["longest_edge"] if max_pixels is None else max_pixels
        least = min(image_processor.size["shortest_edge"], most) if min_pixels is None else min_pixels
        if not 1 <= least <= most:
            raise UserError(f"no picture has from {least} to {most} pixels; give other min_pixels or max_pixels.")
        return {"size": {"shortest_edge": least, "longest_edge": most}}
    if not isinstance(image_processor, CasaFlexibleImageProcessor):
        left = "max_pixels" if min_pixels is None else "min_pixels"
        raise UserError(f"this image encoder sees squares of one size; leave out {left}.")
    if min_pixels is not None or max_pixels is None:
        raise UserError("this image encoder is given as many patches as it may have; leave out min_pixels.")
    patch = image_processor.patch_size**2
    if max_pixels < patch:
        raise UserError(f"max_pixels is {max_pixels}, less than one patch; give {patch} or more.")
    return {"max_num_patches": max_pixels // patch}


# transformers keeps image processors by config; these two belong to no model of their own
class SquarePicturesConfig(PreTrainedConfig):
    model_type = "casa_square_pictures"


class FlexiblePicturesConfig(PreTrainedConfig):
    model_type = "casa_flexible_pictures"


for _config, _processor in (
    (SquarePicturesConfig, CasaSquareImageProcessor),
    (FlexiblePicturesConfig, CasaFlexibleImageProcessor),
):
    # under both names: with torchvision installed, transformers asks for that kind first
    AutoImageProcessor.register(
        _config, image_processor_classes={"pil": _processor, "torchvision": _processor}, exist_ok=True
    )
