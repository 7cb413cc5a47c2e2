"""A processor for a text model's tokenizer and an image tower that were not made for each other."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa.errors import UserError
from casa.models.picture_processing import CasaFlexibleImageProcessor, CasaSquareImageProcessor
from casa.models.processor import CasaProcessor
from casa.vision import family_of

IMAGE_TOKEN = "<image>"
# Minimal turns, as the paper's Helium route uses: no delimiters around images.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
MOST_TOKENS = 1280  # per picture of a Qwen tower, as in Qwen2.5-VL


def processor_for(
    tokenizer: PreTrainedTokenizerBase,
    vision_config: Any,
    max_pixels: int | None = None,
    gist_ids: list[int] | None = None,
) -> Any:
    """A CasaProcessor with the pixels that the tower expects; `image_processor_for` makes them.

    The tokenizer gets an image token if it has none; it marks places and never reaches the model, so the
    text model's embeddings stay as they are. A chat template that knows only text gets pictures as that token.
    gist_ids: ids of the model's gist tokens, if it has some.
    """
    images = image_processor_for(vision_config, max_pixels)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    template: Any = tokenizer.chat_template or PLAIN_TEMPLATE
    return CasaProcessor(images, tokenizer, chat_template=template, image_token=IMAGE_TOKEN, gist_ids=gist_ids)


def image_processor_for(vision_config: Any, max_pixels: int | None = None) -> Any:
    """An image processor that gives an encoder its `pixel_values` and `image_grid_thw`; PIL and NumPy only.

    Qwen towers: native resolution, sides rounded to whole tokens, at most `max_pixels` (1280 tokens if left out).
    SigLIP2 naflex: own proportions, at most `max_pixels` (as many patches as the tower has places if left out).
    SigLIP, SmolVLM, Idefics3: one square per picture, proportions not kept. SmolVLM's own models cut a large
    picture into tiles; here each tile would be an image with a window of its own, so a picture is one tile.
    Encoders with an image processor of their own bring it, with their own settings.
    Raises UserError for an encoder that is not known, or for `max_pixels` where the size is fixed.
    """
    family = family_of(vision_config)
    if family.image_processor is not None:
        return family.image_processor(vision_config, max_pixels)
    patch = vision_config.patch_size
    settings: dict[str, Any] = {
        "patch_size": patch,
        "resample": PILImageResampling[family.resample.upper()],
        "image_mean": list(OPENAI_CLIP_MEAN if family.clip_colours else IMAGENET_STANDARD_MEAN),
        "image_std": list(OPENAI_CLIP_STD if family.clip_colours else IMAGENET_STANDARD_STD),
    }
    if family.pictures == "patches":
        merged = patch * vision_config.spatial_merge_size
        most = max_pixels if max_pixels is not None else MOST_TOKENS * merged * merged
        return Qwen2VLImageProcessorPil(
            temporal_patch_size=vision_config.temporal_patch_size,
            merge_size=vision_config.spatial_merge_size,
            size={"shortest_edge": merged * merged, "longest_edge": most},
            **settings,
        )
    if family.pictures == "flexible":
        most = max_pixels // patch**2 if max_pixels is not None else vision_config.num_patches
        if most < 1:
            raise UserError(f"max_pixels is {max_pixels}, less than one patch; give {patch**2} or more.")
        return CasaFlexibleImageProcessor(max_num_patches=most, **settings)
    if max_pixels is not None:
        raise UserError(f"{vision_config.model_type!r} sees squares of one size; leave out max_pixels.")
    side = vision_config.image_size
    return CasaSquareImageProcessor(size={"height": side, "width": side}, **settings)
