"""A processor for a text model's tokenizer and an image tower that were not made for each other."""

import os
import re
import warnings
from typing import Any

from huggingface_hub import is_offline_mode
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from casa.models.configs import read_config
from casa.models.loading import find_file, read_json, reading
from casa.models.picture_processing import CasaFlexibleImageProcessor, CasaSquareImageProcessor, bounds
from casa.models.processor import IMAGE_TOKEN, CasaProcessor
from casa.models.shipped import resolve
from casa.vision import family_of, tower_config_of

# Minimal turns, as the paper's Helium route uses: no delimiters around images. An answer ends with the token that ends
# it when a model says it, so that the answers of a chat look alike and each can be learned with its end.
PLAIN_TEMPLATE = (
    # a line break behind {% %} would be taken away
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
MOST_TOKENS = 1280  # per picture of a Qwen tower, as in Qwen2.5-VL
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # on a hub
# of a processor file, what every kind of image processor has
_COLOURS = ("image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize")


def processor_for(
    tokenizer: PreTrainedTokenizerBase,
    vision: Any,
    max_pixels: int | None = None,
    gist_ids: list[int] | None = None,
    **hub: Any,
) -> Any:
    """A CasaProcessor with the pixels that the tower expects; `image_processor_for` makes them, and reads `vision`.

    The tokenizer gets an image token if it has none, beside the special tokens it has; it marks places and never
    reaches the model, so the text model's embeddings stay as they are. A chat template that knows only text gets
    pictures as that token. gist_ids: ids of the model's gist tokens, if it has some.
    """
    images = image_processor_for(vision, max_pixels, **hub)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    template: Any = tokenizer.chat_template or PLAIN_TEMPLATE
    return CasaProcessor(images, tokenizer, chat_template=template, image_token=IMAGE_TOKEN, gist_ids=gist_ids)


def image_processor_for(vision: Any, max_pixels: int | None = None, **hub: Any) -> Any:
    """An image processor that gives an encoder its `pixel_values` and `image_grid_thw`; PIL and NumPy only.

    vision: the folder of an encoder, the name of a shipped one or one on a hub, or of a whole model with an encoder in
    it; its own processor file then rules: colours, filter and bounds on sizes. Or the encoder's config, or itself; one
    that was read from somewhere has the file there, if that needs no fetching, and one that was made has those usual
    for its kind. hub: revision, subfolder and what else transformers' `from_pretrained` says of the place.

    Qwen towers: native resolution, sides rounded to whole tokens, at most `max_pixels` (1280 tokens if left out).
    SigLIP2 naflex: own proportions, at most `max_pixels` (as many patches as the tower has places if left out).
    SigLIP, SmolVLM, Idefics3: one square per picture, proportions not kept. SmolVLM's own models cut a large
    picture into tiles; here each tile would be an image with a window of its own, so a picture is one tile.
    Encoders with an image processor of their own bring it, with their own settings.
    Raises UserError for an encoder that is not known, or for `max_pixels` where the size is fixed.
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
    family = family_of(config)
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
