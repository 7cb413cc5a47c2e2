"""Tiny random models and inputs, offline and in float64, for tests: of casa itself and of what is built on it."""

from casa.testing.chats import SPECIAL_TOKENS, TEMPLATES, TOKENIZERS, tiny_chat_processor, tiny_tokenizer
from casa.testing.tiny import (
    BACKBONES,
    TEXT_BACKBONES,
    VLM_BACKBONES,
    VOCABULARY,
    TinySample,
    as_batch,
    as_packed,
    claimed_png,
    noise_frames,
    tiny_backbone,
    tiny_casa,
    tiny_casa_over,
    tiny_checkpoint,
    tiny_encoder,
    tiny_images,
    tiny_processor,
    tiny_speaker,
    tiny_text_model,
)

PATIENCE = 1800.0
"""Seconds after which a test takes something for hung; no verdict hangs on how fast anything is."""

__all__ = [
    "BACKBONES",
    "PATIENCE",
    "SPECIAL_TOKENS",
    "TEMPLATES",
    "TEXT_BACKBONES",
    "TOKENIZERS",
    "VLM_BACKBONES",
    "VOCABULARY",
    "TinySample",
    "as_batch",
    "as_packed",
    "claimed_png",
    "noise_frames",
    "tiny_backbone",
    "tiny_casa",
    "tiny_casa_over",
    "tiny_chat_processor",
    "tiny_checkpoint",
    "tiny_encoder",
    "tiny_images",
    "tiny_processor",
    "tiny_speaker",
    "tiny_text_model",
    "tiny_tokenizer",
]
