"""The processor of an insertion VLM without its placeholders; tokenizer, chat template and picture sizes stay."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from casa.errors import UserError
from casa.models.assembling import image_processor_for
from casa.models.backbones import InsertionVLM, family_of
from casa.models.loading import reading
from casa.models.processor import CasaProcessor

_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_PICTURES = ("preprocessor_config.json", "processor_config.json")
_UNREADABLE = "{} cannot be read; fetch it again."


def processor_of(path: Any, gist_ids: list[int] | None = None) -> CasaProcessor:
    """A CasaProcessor from the folder of an insertion VLM.

    Its template writes one placeholder for a picture, which marks the place and is left out of the text; the
    delimiters around it stay (paper, "Chat template"). Sizes and colours of pictures are the VLM's own; only classes
    that need no torchvision are used. gist_ids: ids of the model's gist tokens, if it has some.
    Raises UserError if the folder holds no VLM that casa knows, or no tokenizer or template.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    family = family_of(config)
    if not issubclass(family, InsertionVLM):
        raise UserError(f"{path} is a text-only model; make its processor with processor_for and an image encoder.")
    with reading(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    images = image_processor_for(config.vision_config)
    images = type(images).from_dict(images.to_dict() | _picture_settings(Path(str(path))))
    before, after = family.delimiters
    template = _template(Path(str(path))) or tokenizer.chat_template
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


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(_UNREADABLE.format(file)) from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it holds anything else."""
    try:
        read = json.loads(_read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(_UNREADABLE.format(file)) from error
    if not isinstance(read, dict):
        raise UserError(_UNREADABLE.format(file))
    return read


def _template(folder: Path) -> str | None:
    for name in _TEMPLATES:
        if (file := folder / name).is_file():
            text = _read_json(file).get("chat_template") if name.endswith(".json") else _read_text(file)
            if not isinstance(text, str):
                raise UserError(_UNREADABLE.format(file))
            return text
    return None


def _picture_settings(folder: Path) -> dict[str, Any]:
    """Colours, and the least and most pixels if the sizes vary, as the VLM's own image processor was set."""
    file = next((folder / name for name in _PICTURES if (folder / name).is_file()), None)
    if file is None:
        return {}
    given = _read_json(file)
    given = given.get("image_processor", given)
    found = {name: given[name] for name in ("image_mean", "image_std", "rescale_factor") if given.get(name)}
    size = given.get("size") or {}
    if given.get("min_pixels") and given.get("max_pixels"):  # as older files have it
        size = {"shortest_edge": given["min_pixels"], "longest_edge": given["max_pixels"]}
    if {"shortest_edge", "longest_edge"} <= set(size):
        found["size"] = dict(size)
    return found
