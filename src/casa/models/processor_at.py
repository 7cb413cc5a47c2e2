"""The processor of a model that `adapt` makes, from the folders of what it is made of."""

from typing import Any

from transformers import AutoTokenizer

from casa.errors import UserError
from casa.models.assembling import processor_for
from casa.models.config import CasaConfig
from casa.models.configs import has_own_tower, read_config
from casa.models.loading import place_of, reading
from casa.models.processor import CasaProcessor
from casa.models.vlm_processor import processor_of


def processor_at(backbone: Any, vision: Any = None, gist: int = 0, remedy: str = "give vision") -> CasaProcessor:
    """backbone: folder of an insertion VLM or model, or of a text-only LLM (or its GGUF file); then vision is that of
    an image encoder, or of a model with one. Either may be the name of a shipped model, or one on a hub.

    gist: learned tokens after an image, whose ids stand behind the vocabulary. remedy: what a user does about a
    missing encoder, in the words of the place where it is missing. No weights are read.
    Raises UserError without an encoder, or without a tokenizer that can be read.
    """
    config = read_config(backbone)
    if isinstance(config, CasaConfig):
        return CasaProcessor.from_pretrained(backbone)
    has_tower = has_own_tower(config)
    words = config.get_text_config().vocab_size
    gist_ids = list(range(words, words + gist)) or None
    if has_tower:
        return processor_of(backbone, gist_ids)
    if vision is None:
        raise UserError(f"a text-only model needs an image encoder; {remedy}.")
    with reading(backbone, "tokenizer"):
        place, told = place_of(backbone)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **told)
        return processor_for(tokenizer, vision, gist_ids=gist_ids)
