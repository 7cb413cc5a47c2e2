"""What a run's settings are in transformers' words."""

from typing import Any

from transformers import TrainingArguments

from casa.training.trainer.settings import TrainerSettings


def training_arguments(settings: TrainerSettings, given: dict[str, Any]) -> TrainingArguments:
    """transformers' TrainingArguments for a run. given: further ones, which come first."""
    chosen = settings.optimisation
    values: dict[str, Any] = {
        "output_dir": settings.folder,
        "max_steps": chosen.steps,
        "gradient_accumulation_steps": chosen.accumulate,
        "per_device_train_batch_size": 1,
        "learning_rate": chosen.new_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {
            "num_decay_steps": chosen.decay,
            "decay_type": chosen.decay_shape,
            "min_lr_ratio": chosen.floor,
        },
        "warmup_steps": chosen.warmup,
        "max_grad_norm": chosen.clip,
        # sharded weights are gathered in bf16 instead
        "bf16": chosen.precision == "bfloat16" and chosen.master and settings.sharding == "ddp",
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "logging_steps": settings.log_every,
        # a loss that is no number must be seen, not smoothed over
        "logging_nan_inf_filter": False,
        # the position of the data is saved; nothing is to be skipped
        "ignore_data_skip": True,
        "average_tokens_across_devices": True,
        "remove_unused_columns": False,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": settings.device == "cpu",
    }
    return TrainingArguments(**(values | given))
