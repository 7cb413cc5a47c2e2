"""Pictures to pixels: an image processor for every image encoder, with PIL and NumPy only.

Shapes: n pictures, P patches of all pictures, p side of a patch.
"""

import os
import re
import warnings
from typing import Any

import numpy as np
from huggingface_hub import is_offline_mode
from transformers import BatchFeature, PreTrainedConfig
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)

# from here, because transformers 5.17 hides it at the top when torchvision is missing
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorKwargs,
    Siglip2ImageProcessorPil,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from casa.errors import UserError
from casa.models.loading import find_file, read_config, read_json, reading, resolve
from casa.vision import spec_of, tower_config_of

OUTPUTS = ["pixel_values", "image_grid_thw"]


class SquareKwargs(ImagesKwargs, total=False):
    """As for other image processors; patch_size: p, in pixels."""

    patch_size: int


class CasaSquareImageProcessor(SiglipImageProcessorPil):
    """Every picture as one square of `size`, whatever its proportions: `pixel_values` (n, 3, size, size)."""

    valid_kwargs = SquareKwargs  # type: ignore[assignment]
    patch_size = 16
    model_input_names = OUTPUTS

    def _preprocess(self, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
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

    def _preprocess(self, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
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
    if hasattr(image_processor, "patch_grid"):  # an encoder's own, which knows these words (casa.vision's EncoderSpec)
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


MOST_TOKENS = 1280  # per picture of a Qwen tower, as in Qwen2.5-VL
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # on a hub
# of a processor file, what every kind of image processor has
_COLOURS = ("image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize")


def image_processor_for(vision: Any, max_pixels: int | None = None, **hub: Any) -> Any:
    """An image processor that gives an encoder its `pixel_values` and `image_grid_thw`; PIL and NumPy only.

    Qwen towers: native resolution, sides rounded to whole tokens, at most `max_pixels` (1280 tokens if left out).
    SigLIP2 naflex: own proportions, at most `max_pixels` (as many patches as the tower has places if left out). SigLIP,
    SmolVLM, Idefics3: one square per picture, proportions not kept. SmolVLM's own models cut a large picture into
    tiles; here each tile would be an image with a window of its own, so a picture is one tile. Encoders with an image
    processor of their own bring it, with their own settings.

    Args:
        vision: The folder of an encoder, the name of a shipped one or one on a hub, or of a whole model with an encoder
            in it; its own processor file then rules: colours, filter and bounds on sizes. Or the encoder's config, or
            itself; one that was read from somewhere has the file there, if that needs no fetching, and one that was
            made has those usual for its kind.
        hub: Revision, subfolder and what else transformers' `from_pretrained` says of the place.

    Raises:
        UserError: The encoder is not known, or `max_pixels` is given where the size is fixed.
    """
    if isinstance(vision, (str, os.PathLike)):
        config, source = read_config(vision, **hub), vision
    else:
        config = getattr(vision, "config", vision)
        source = getattr(config, "_name_or_path", None)
        hub = {"revision": getattr(config, "_commit_hash", None), "local_files_only": True} | hub
        if source and not os.path.isdir(source) and not _NAME.fullmatch(str(source)):
            source = None  # a folder that is gone
    images = _by_family(tower_config_of(config))
    if source:
        images = _with_own(images, source, **hub)
    for name, value in bounds(images, max_pixels=max_pixels).items():
        setattr(images, name, value)
    return images


def _by_family(config: Any) -> Any:
    """With what casa knows of the encoder's kin."""
    family = spec_of(config)
    if family.image_processor is not None:
        return family.image_processor(config, None)
    patch = config.patch_size
    settings: dict[str, Any] = {
        "patch_size": patch,
        "resample": PILImageResampling[family.resample.upper()],
        "image_mean": list(OPENAI_CLIP_MEAN if family.clip_colours else IMAGENET_STANDARD_MEAN),
        "image_std": list(OPENAI_CLIP_STD if family.clip_colours else IMAGENET_STANDARD_STD),
    }
    if family.pictures == "patches":
        merged = patch * config.spatial_merge_size
        return Qwen2VLImageProcessorPil(
            temporal_patch_size=config.temporal_patch_size,
            merge_size=config.spatial_merge_size,
            size={"shortest_edge": merged * merged, "longest_edge": MOST_TOKENS * merged * merged},
            **settings,
        )
    if family.pictures == "flexible":
        return CasaFlexibleImageProcessor(max_num_patches=config.num_patches, **settings)
    return CasaSquareImageProcessor(size={"height": config.image_size, "width": config.image_size}, **settings)


def _with_own(images: Any, vision: Any, **hub: Any) -> Any:
    """The same with what the encoder's own processor file says, as far as this kind of image processor has it too.

    What the encoder's shape fixes (patches, squares) is its config's to say.
    """
    with reading(vision, "picture settings"):
        own = _own_settings(vision, **hub)
        found = {name: own[name] for name in _COLOURS if own.get(name) is not None}
        if isinstance(images, CasaFlexibleImageProcessor):
            found |= {name: own[name] for name in ("max_num_patches",) if own.get(name) is not None}
        elif not isinstance(images, CasaSquareImageProcessor):
            found |= _own_bounds(images, own)
        return type(images).from_dict(images.to_dict() | found)


def _own_bounds(images: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Least and most pixels, in the words of this image processor, however the file puts them."""
    size: Any = own.get("size") if isinstance(own.get("size"), dict) else {}
    given = [
        next((held[name] for held, name in ((own, old), (size, old), (size, new)) if held.get(name) is not None), None)
        for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    ]
    # one edge alone is a length in px, as other kinds of image processors have it
    return bounds(images, *given) if None not in given or "size" not in own else {}


def _own_settings(vision: Any, **hub: Any) -> dict[str, Any]:
    """The image processor's part of the files beside an encoder, in transformers' own order; {} without one."""
    joined, apart = (find_file(vision, name, **hub) for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME))
    if joined is not None and isinstance(inner := read_json(joined).get("image_processor"), dict):
        return inner
    if apart is not None:
        return read_json(apart)
    if (is_offline_mode() or hub.get("local_files_only")) and not os.path.isdir(resolve(vision)):
        warnings.warn(
            f"the cache holds no picture settings of {vision}; those usual for its kind are taken.", stacklevel=4
        )
    return {}
