"""What a model is, from its config alone: its family, its tower, and its shape on the meta device."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from casa.errors import UserError
from casa.models.adapt import adapt
from casa.models.backbones import InsertionVLM, family_of
from casa.models.config import CasaConfig
from casa.models.fusion_config import FusionConfig
from casa.models.loading import UNREADABLE, check_folder, place_of, sentence_of
from casa.models.model import CasaForConditionalGeneration, new_backbone
from casa.vision import new_encoder


def read_config(path: Any, **hub: Any) -> Any:
    """The transformers config in a folder, a JSON file or a hub's. Raises UserError for one that cannot be read.

    hub: revision, subfolder and what else transformers' `from_pretrained` says of the place.
    """
    path, told = place_of(path)
    hub |= told
    if not told and not Path(str(path)).is_file():
        check_folder(path, subfolder=hub.get("subfolder") or "")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
    except UNREADABLE as error:
        raise UserError(f"the config of {path} cannot be read: {sentence_of(error)}") from error
    return config


def has_own_tower(config: Any) -> bool:
    """Whether a backbone's config is one of an insertion VLM, or of a model of casa's own.

    Raises UserError for a family that casa does not know.
    """
    return isinstance(config, CasaConfig) or issubclass(family_of(config), InsertionVLM)


def skeleton(config: Any, fusion: FusionConfig, tower_config: Any = None) -> CasaForConditionalGeneration:
    """The fused model on the meta device, from configs alone: names, shapes, and what `adapt` leaves to training.

    config: of a text-only model, which needs a tower_config, or of an insertion VLM or model. Raises UserError as
    `adapt` does.
    """
    with torch.device("meta"):
        # building a model writes into its config
        config = copy.deepcopy(config)
        own = isinstance(config, CasaConfig)
        backbone = CasaForConditionalGeneration(config) if own else new_backbone(config)
        tower = None if tower_config is None else new_encoder(copy.deepcopy(tower_config))
        return adapt(backbone, fusion, tower)
