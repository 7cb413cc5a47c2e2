"""Transformers classes: config, model, processor, and the fusing of a backbone."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from casa.models.adapt import adapt
from casa.models.assembling import image_processor_for, processor_for
from casa.models.cache import CasaCache
from casa.models.config import CasaConfig
from casa.models.freezing import freeze_backbone
from casa.models.fusion_config import FusionConfig
from casa.models.model import CasaForConditionalGeneration
from casa.models.processor import CasaProcessor
from casa.models.vlm_processor import processor_of

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
    "adapt",
    "freeze_backbone",
    "image_processor_for",
    "processor_for",
    "processor_of",
]
