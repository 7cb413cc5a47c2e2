"""The processor of an insertion VLM without its placeholders; tokenizer, chat template and picture sizes stay."""

from typing import Any

from transformers import AutoTokenizer

from casa.errors import UserError
from casa.models.assembling import image_processor_for
from casa.models.backbones import InsertionVLM, family_of
from casa.models.configs import read_config
from casa.models.loading import find_file, read_json, read_text, reading
from casa.models.processor import CasaProcessor
from casa.models.shipped import resolve

_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def processor_of(path: Any, gist_ids: list[int] | None = None, **hub: Any) -> CasaProcessor:
    """A CasaProcessor of an insertion VLM, from its folder or its name on a hub.

    Its template writes one placeholder for a picture, which marks the place and is left out of the text; the
    delimiters around it stay (paper, "Chat template"). Sizes and colours of pictures are the VLM's own; only classes
    that need no torchvision are used. gist_ids: ids of the model's gist tokens, if it has some. hub: revision,
    subfolder and what else transformers' `from_pretrained` says of the place.
    Raises UserError if there is no VLM that casa knows, or no tokenizer or template.
    """
    family = family_of(read_config(path, **hub))
    if not issubclass(family, InsertionVLM):
        raise UserError(f"{path} is a text-only model; make its processor with processor_for and an image encoder.")
    with reading(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(resolve(path), trust_remote_code=False, **hub)
        template = _template(path, **hub) or tokenizer.chat_template
    images = image_processor_for(path, **hub)
    before, after = family.delimiters
    if template is None:
        raise UserError(f"{path} has no chat template; save one as {_TEMPLATES[0]} beside its tokenizer.")
    if not family.template_delimits:
        template = template.replace(family.placeholder, before + family.placeholder + after)
    with reading(path, "chat template"):
        return CasaProcessor(
            images,
            tokenizer,
            chat_template=template,
            image_token=family.placeholder,
            frame_prefix=before,
            frame_suffix=after,
            gist_ids=gist_ids,
        )


def _template(path: Any, **hub: Any) -> str | None:
    for name in _TEMPLATES:
        if (file := find_file(path, name, **hub)) is not None:
            text = read_json(file).get("chat_template") if name.endswith(".json") else read_text(file)
            if not isinstance(text, str):
                raise UserError(f"{file} cannot be read; fetch it again.")
            return text
    return None
