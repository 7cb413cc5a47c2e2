"""The image encoders casa knows, by the `model_type` of their transformers config. One file per kin.

`register_encoder` adds one from anywhere (docs/adding-an-encoder.md).
"""

from transformers import AutoConfig, AutoModel

from casa.vision.encoders.family import Family
from casa.vision.encoders.page import PAGE_ENCODERS
from casa.vision.encoders.qwen_vl import QWEN_TOWERS
from casa.vision.encoders.siglip import NAFLEX_TOWERS, SIGLIP_TOWERS
from casa.vision.encoders.smolvlm import SMOLVLM_TOWERS

FAMILIES: dict[str, Family] = QWEN_TOWERS | SIGLIP_TOWERS | NAFLEX_TOWERS | SMOLVLM_TOWERS


def register_encoder(model_type: str, family: Family) -> None:
    """Makes an image encoder known to `adapt`, and its folders to everything that loads models.

    model_type: that of its config's class. An encoder of one's own is made known to transformers' AutoConfig and
    AutoModel as well. Its image processor, where it has one, is registered by its own module, with AutoImageProcessor.
    """
    FAMILIES[model_type] = family
    if not isinstance(family.model, str):
        AutoConfig.register(model_type, family.model.config_class, exist_ok=True)
        AutoModel.register(family.model.config_class, family.model, exist_ok=True)


for _model_type, _family in PAGE_ENCODERS.items():
    register_encoder(_model_type, _family)

__all__ = ["FAMILIES", "Family", "register_encoder"]
