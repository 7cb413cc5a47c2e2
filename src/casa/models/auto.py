"""A model and its processor by folder, hub id or shipped name, and processors for models that `adapt` makes."""

from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from casa.errors import UserError
from casa.models.adapt import has_own_tower
from casa.models.backbones import InsertionVLM, family_of
from casa.models.configuration_casa import CasaConfig
from casa.models.image_processing_casa import image_processor_for
from casa.models.int8 import WEIGHTS, to_int8
from casa.models.loading import find_file, place_of, quietly, read_config, read_json, read_text, reading, resolve
from casa.models.modeling_casa import CasaForConditionalGeneration
from casa.models.processing_casa import IMAGE_TOKEN, CasaProcessor
from casa.settings import near


def load_pretrained(
    name: Any, device: str = "auto", weights: str = "own"
) -> tuple[CasaForConditionalGeneration, CasaProcessor]:
    """Model (in evaluation mode) and processor; transformers' progress bars and reports are left out meanwhile.

    Args:
        weights: "own", as they were saved, or "int8" (`casa.models.int8`).

    Raises:
        UserError: The model is not there, or this machine does not have the device.
    """
    chosen = pick_device(device)
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}; {near(weights, WEIGHTS, 'choose one of')}", field="weights")
    with quietly(reports=False):
        model = CasaForConditionalGeneration.from_pretrained(name)
        processor = CasaProcessor.from_pretrained(name)
    model = model.to(torch.device(chosen)).eval()
    return (to_int8(model) if weights == "int8" else model), processor


def pick_device(device: str) -> str:
    """ "auto" is the CUDA device if there is one. Raises UserError for a device that is unknown or not there."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if there else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {device!r} is not known; use auto, cpu, cuda or mps.")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("this machine has no MPS device (Apple's GPU); use auto or cpu.")
    if wanted.type == "cuda" and not there:
        raise UserError("this machine has no CUDA device; use auto or cpu.")
    if wanted.type == "cuda" and (wanted.index or 0) >= there:
        raise UserError(f"this machine has no {device}, only {', '.join(f'cuda:{i}' for i in range(there))}.")
    return device


# Minimal turns, as the paper's Helium route uses: no delimiters around images. An answer ends with the token that ends
# it when a model says it, so that the answers of a chat look alike and each can be learned with its end.
PLAIN_TEMPLATE = (
    # a line break behind {% %} would be taken away
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


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


def auto_processor(backbone: Any, vision: Any = None, gist: int = 0, remedy: str = "give vision") -> CasaProcessor:
    """The processor of a backbone with an image encoder; no weights are read.

    Args:
        backbone: Folder of an insertion VLM or model, or of a text-only LLM (or its GGUF file); then vision is that of
            an image encoder, or of a model with one. Either may be the name of a shipped model, or one on a hub.
        gist: Learned tokens after an image, whose ids stand behind the vocabulary.
        remedy: What a user does about a missing encoder, in the words of the place where it is missing.

    Raises:
        UserError: There is no encoder, or no tokenizer that can be read.
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
