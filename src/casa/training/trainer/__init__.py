"""The trainer for one's own data: transformers' Trainer over packs, with runs that are never lost.

stream = PackStream(open_records, maker, PackingSettings())
settings = TrainerSettings(folder="runs/mine", optimisation=OptimisationSettings(steps=1000))
trainer = CasaTrainer(model, stream, settings, processor=processor)
trainer.train(resume_from_checkpoint=True)     # from the newest checkpoint, if there is one
"""

from casa.training.trainer.checkpoints import newest_checkpoint, saved_checkpoints
from casa.training.trainer.ema import Ema
from casa.training.trainer.groups import parameter_groups
from casa.training.trainer.settings import OptimisationSettings, TrainerSettings, WatchSettings
from casa.training.trainer.trainer import CasaTrainer

__all__ = [
    "CasaTrainer",
    "Ema",
    "OptimisationSettings",
    "TrainerSettings",
    "WatchSettings",
    "newest_checkpoint",
    "parameter_groups",
    "saved_checkpoints",
]
