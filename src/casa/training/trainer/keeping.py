"""What a run with a frozen image tower does once only: its tower's work on a picture that comes again."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from casa.errors import UserError
from casa.training.packs.feature_folder import FeatureFolder, tower_name
from casa.training.packs.kept import KeptFeatures
from casa.training.trainer.groups import below_lora


def keep_features(trainer: Any, gigabytes: float, folder: str | None = None) -> KeptFeatures:
    """Has the trainer's stream keep image tokens, of so many GB at most in memory; what it computes stays the same.

    trainer: a CasaTrainer before its first step. folder: where they are kept for other runs too.
    Raises UserError for a tower that is trained, or spread over ranks.
    """
    model = below_lora(trainer.model)
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        raise UserError("keep_gigabytes is for a frozen image tower, and this one is trained: freeze it, or keep none.")
    if trainer.sharded:
        raise UserError("keep_gigabytes cannot be used with sharding: fsdp, since ranks would wait for one another.")

    @torch.no_grad()
    def encode(pixel_values: Tensor, grid: Tensor) -> Tensor:
        device = trainer.args.device
        model.encoder.eval()  # what is kept must not be one draw of a dropout
        with trainer.accelerator.autocast():
            return model.encode_images(pixel_values.to(device), grid.to(device)).cpu()

    there = None if folder is None else partial(_opened, trainer, folder)
    kept = trainer.stream.collator.kept = KeptFeatures(encode, round(gigabytes * 1e9), there)
    return kept


def _opened(trainer: Any, folder: str) -> FeatureFolder:
    """To be called with the first picture: only then has a run that goes on the weights of its checkpoint."""
    collator = trainer.stream.collator
    how = trainer.args.device.type, trainer.accelerator.mixed_precision, collator.fold
    tower = tower_name(below_lora(trainer.model).encoder, collator.processor.image_processor, *how)
    return FeatureFolder(folder, tower)
