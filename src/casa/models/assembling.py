"""A processor for a text model's tokenizer and an image tower that were not made for each other."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa.models.processor import CasaProcessor

IMAGE_TOKEN = "<image>"
# Minimal turns, as the paper's Helium route uses: no delimiters around images.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def processor_for(tokenizer: PreTrainedTokenizerBase, vision_config: Any, max_pixels: int = 1280 * 28 * 28) -> Any:
    """A CasaProcessor with the patches that the tower expects.

    The tokenizer gets an image token if it has none; it marks places and never reaches the model, so the
    text model's embeddings stay as they are. A chat template that knows only text gets pictures as that token.
    """
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    merged = vision_config.patch_size * vision_config.spatial_merge_size
    images = Qwen2VLImageProcessorPil(
        patch_size=vision_config.patch_size,
        temporal_patch_size=vision_config.temporal_patch_size,
        merge_size=vision_config.spatial_merge_size,
        size={"shortest_edge": merged * merged, "longest_edge": max_pixels},
    )
    template: Any = tokenizer.chat_template or PLAIN_TEMPLATE
    return CasaProcessor(images, tokenizer, chat_template=template, image_token=IMAGE_TOKEN)
