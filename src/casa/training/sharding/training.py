"""The few places where transformers' Trainer has to act otherwise, most of them if FSDP2 has spread the weights.

transformers and accelerate would wrap the model in DDP (on a CPU even if asked for FSDP), save it whole and load it
whole. Everything else, the loop, the schedule, accumulation and the mean over all answer tokens, is theirs: FSDP2
averages gradients over processes exactly as DDP does.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from casa.training.sharding.shards import has_shards, read_moments, read_weights, write_shards
from casa.training.sharding.wrapping import put_apart

_SCHEDULER = "scheduler.pt"
_OPTIMIZER = "optimizer.pt"


class ShardedTraining:
    """Stands before transformers' Trainer. settings: of the run. Under "ddp" only moments are read otherwise."""

    settings: Any
    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    ema: Any

    @property
    def sharded(self) -> bool:
        return self.settings.sharding == "fsdp"

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.sharded:
            # accelerate's way to leave a model without DDP around it
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _clip_grad_norm(self, model: Any) -> Any:
        return _whole(super()._clip_grad_norm(model))  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return _whole(super()._get_grad_norm(model, grad_norm))  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers. Of a sharded model every process must call; a checkpoint gets its config alone, and its
        weights in shards."""
        if not self.sharded:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        weights = None if _internal_call else _gathered(self.model, self.args.should_save)
        if not self.args.should_save:
            return
        if weights is not None:
            self.model.save_pretrained(folder, state_dict=weights)
            return
        self.model.config.architectures = [type(self.model).__name__.removeprefix("FSDP")]
        self.model.config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        write_shards(Path(output_dir), self.model, self.optimizer, self.ema)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.sharded:
            read_moments(Path(checkpoint), self.model, self.optimizer)
        else:
            # through the host: transformers 5.17 reads onto the device by a name that torch does not know for a CPU
            moments = torch.load(Path(checkpoint) / _OPTIMIZER, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(moments)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))
        # rates are the schedule's business, and were saved with it
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def read_shards(self, checkpoint: Path) -> None:
        """Weights and averages of a sharded checkpoint."""
        read_weights(checkpoint, self.model, self.ema)


def check_kind(checkpoint: Path, sharded: bool) -> str | None:
    """Why a run of this kind cannot go on from a checkpoint, or None."""
    if has_shards(checkpoint) == sharded:
        return None
    was, other = ("ddp", "fsdp") if sharded else ("fsdp", "ddp")
    return f"{checkpoint} was saved with sharding: {was}, not {other}: resume with that, or start from its export."


def _gathered(model: Any, keep: bool) -> dict[str, torch.Tensor]:
    """Whole weights in host memory, on the process that keeps them; one by one, so that no other ever holds all."""
    found = {}
    put_apart(model)
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            found[name] = whole.cpu()
    return found


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
