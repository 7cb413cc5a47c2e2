"""Transformers classes: config, model, processor, and the fusing of a backbone."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from casa.models.adapt import adapt, freeze_backbone
from casa.models.auto import processor_for, processor_of
from casa.models.cache import CasaCache
from casa.models.configuration_casa import CasaConfig, FusionConfig
from casa.models.image_cache import ImageCache
from casa.models.image_processing_casa import image_processor_for
from casa.models.modeling_casa import CasaForConditionalGeneration
from casa.models.processing_casa import CasaProcessor

AutoConfig.register("casa", CasaConfig, exist_ok=True)
AutoModelForImageTextToText.register(CasaConfig, CasaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(CasaConfig, CasaProcessor, exist_ok=True)
# pipelines look here, by name, and report an error for a class that they do not find
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[CasaConfig.model_type] = CasaForConditionalGeneration.__name__

__all__ = [
    "CasaCache",
    "CasaConfig",
    "CasaForConditionalGeneration",
    "CasaProcessor",
    "FusionConfig",
    "ImageCache",
    "adapt",
    "freeze_backbone",
    "image_processor_for",
    "processor_for",
    "processor_of",
]
