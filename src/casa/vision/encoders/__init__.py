"""The image encoders casa knows, by the `model_type` of their transformers config. One file per kin.

To add one: write a `Family` in a file here, put it into the table, and say in `pictures` how its pixels come.
"""

from casa.vision.encoders.family import Family
from casa.vision.encoders.page import PAGE_ENCODERS
from casa.vision.encoders.qwen_vl import QWEN_TOWERS
from casa.vision.encoders.siglip import NAFLEX_TOWERS, SIGLIP_TOWERS
from casa.vision.encoders.smolvlm import SMOLVLM_TOWERS

FAMILIES: dict[str, Family] = QWEN_TOWERS | SIGLIP_TOWERS | NAFLEX_TOWERS | SMOLVLM_TOWERS | PAGE_ENCODERS

__all__ = ["FAMILIES", "Family"]
