"""Rates of a run that is gone on with are the recipe's: a checkpoint brings those of its own time back."""

from typing import Any

from transformers import TrainerCallback

from casa.training.trainer import OptimisationSettings, parameter_groups


class RecipeRates(TrainerCallback):
    """Gives the optimiser the settings' rates when training begins, at the height that the schedule has there."""

    def __init__(self, settings: OptimisationSettings) -> None:
        self._settings = settings

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        wrapped = kwargs["lr_scheduler"]
        schedule = getattr(wrapped, "scheduler", wrapped)
        wanted = {group["name"]: group["lr"] for group in parameter_groups(kwargs["model"], self._settings)}
        schedule.base_lrs = [wanted[group["name"]] for group in groups]
        heights = [height(schedule.last_epoch) for height in schedule.lr_lambdas]
        for group, rate, height in zip(groups, schedule.base_lrs, heights, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * height
