"""The model and the processor that a recipe names: made ready for the trainer, or as an outline without weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from casa.errors import UserError
from casa.models import CasaConfig, CasaForConditionalGeneration, CasaProcessor, FusionConfig, adapt
from casa.models.adapt import has_own_tower, skeleton
from casa.models.auto import auto_processor
from casa.models.generation import stop_ids
from casa.models.image_processing_casa import bounds
from casa.models.loading import UNREADABLE, check_folder, place_of, quietly, read_config, resolve, sentence_of
from casa.training.own.lora import with_lora
from casa.training.own.recipe import ModelSettings, RunRecipe
from casa.training.trainer.groups import choose_trained, set_precision
from casa.vision import tower_config_of

# published models whose shapes casa.analysis has, by their names on the hub
PUBLISHED = {
    "kyutai/helium-1-2b": "helium-2b",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5-vl-3b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5-vl-7b",
}
_BESIDE = ["*.json", "*.jinja", "*.txt", "*.model"]  # what a model's folder holds besides weights
_WEIGHTS = ["*.safetensors"]
_NO_ENCODER = "set model.vision to the folder of one"


@dataclass
class Loaded:
    """model: a CasaForConditionalGeneration, or a PeftModel around one. stop: the id that ends an answer."""

    model: Any
    processor: CasaProcessor
    stop: int | None


def load_model(recipe: RunRecipe) -> Loaded:
    """Reads the weights, fuses what is to be fused, and puts adapters in. What is new is drawn by the recipe's seed.

    Raises UserError for what is not there, cannot be read, or does not fit together.
    """
    settings = recipe.model
    processor = load_processor(settings)
    torch.manual_seed(recipe.seed)
    with quietly():
        if settings.checkpoint is not None:
            folder = _fetched(settings.checkpoint, weights=True)
            model = CasaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
        else:
            folder = _fetched(settings.backbone, weights=True)
            vision = None if settings.vision is None else _fetched(settings.vision, weights=True)
            model = adapt(str(folder), settings.fusion, None if vision is None else str(vision))
    for part in (model.config, model.config.text_config, model.config.vision_config):
        if part is not None:
            part._name_or_path = ""  # where this machine keeps its models is nobody's business
    # parameters only: buffers of rotary positions are as wide as they must be
    kept = torch.float32 if recipe.optimisation.precision == "float32" else getattr(torch, settings.dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kept)
    stop = next(iter(stop_ids(model)), None)
    prepared = model if settings.lora is None else with_lora(model, settings.lora)
    return Loaded(prepared, processor, stop)


def outline(recipe: RunRecipe) -> Any:
    """The same model on the meta device: names and shapes, what is trained, and in which precision it is kept.

    Of the published models in `PUBLISHED`, nothing is fetched. Raises UserError like `load_model`.
    """
    settings = recipe.model
    if settings.checkpoint is not None:
        config = CasaConfig.from_pretrained(_fetched(settings.checkpoint))
        with torch.device("meta"):
            model = CasaForConditionalGeneration(config)
    else:
        config = _config(settings.backbone)
        tower = None if settings.vision is None else tower_config_of(_config(settings.vision))
        if tower is None and not has_own_tower(config):
            raise UserError(f"a text-only model needs an image encoder; {_NO_ENCODER}.")
        model = skeleton(config, settings.fusion or FusionConfig(), tower)
    for parameter in model.parameters():
        # as it is read, until the precision is set
        parameter.data = parameter.data.to(torch.float32)
    prepared = model if settings.lora is None else with_lora(model, settings.lora)
    choose_trained(prepared, recipe.optimisation)
    set_precision(prepared, recipe.optimisation)
    return prepared


def load_processor(settings: ModelSettings) -> CasaProcessor:
    """The processor beside the model; nothing else of it is fetched. Raises UserError where there is none."""
    gist = 0 if settings.fusion is None else settings.fusion.gist
    if settings.processor is not None:
        processor = CasaProcessor.from_pretrained(settings.processor)
    elif settings.checkpoint is not None:
        processor = CasaProcessor.from_pretrained(_fetched(settings.checkpoint))
    else:
        vision = None if settings.vision is None else _fetched(settings.vision)
        processor = auto_processor(_fetched(settings.backbone), vision, gist, _NO_ENCODER)
    if settings.checkpoint is None and len(processor.gist_ids) != gist:
        raise UserError(
            f"the processor writes {len(processor.gist_ids)} gist tokens behind a picture, and model.fusion.gist is "
            f"{gist}; give the same, or leave model.processor out."
        )
    if settings.max_pixels is not None:
        for name, value in bounds(processor.image_processor, max_pixels=settings.max_pixels).items():
            setattr(processor.image_processor, name, value)
    return processor


def _config(name: Any) -> Any:
    from casa.analysis.shapes import published_config

    if name in PUBLISHED and not Path(name).is_dir():
        return published_config(PUBLISHED[name])
    return read_config(_fetched(name))


def _fetched(name: Any, weights: bool = False) -> Path:
    """The folder of a model; a hub's is fetched, its weights only if they are wanted."""
    found = resolve(name)
    path = Path(str(found))
    if place_of(name)[1]:
        return path
    check_folder(found)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=_BESIDE + (_WEIGHTS if weights else [])))
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be fetched from the hub: {sentence_of(error)}") from error
