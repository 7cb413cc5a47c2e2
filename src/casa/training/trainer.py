"""CasaTrainer: transformers' Trainer over packed batches, with runs that stop and go on without losing a step.

    trainer = CasaTrainer(model, PackedDataset(open_records, maker, PackingSettings()), settings, "runs/mine")
    trainer.train(resume_from_checkpoint=True)     # from the newest checkpoint, if there is one

What it adds to transformers': groups of parameters, the loss in chunks, data that resume at the very batch, checkpoints
that are whole or not there, an end at SIGTERM, FSDP2, and a look at the loss before weights are spoilt.
"""

import json
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import wait_for_everyone
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.threads import settle
from casa.training import checkpoints, fsdp
from casa.training.callbacks import SpikeDetector, Throughput, save_for_inspection
from casa.training.checkpoints import EMA_FILE, Ema, StopSignal, any_rank, mean_over_ranks
from casa.training.collator import FeatureCache, FeatureFolder, encoder_digest
from casa.training.config import TrainerSettings
from casa.training.optimizer import (
    MuonAdamW,
    below_lora,
    checkpoint_bytes,
    choose_trained,
    parameter_groups,
    set_precision,
)
from casa.training.packed_dataset import DataPosition, PackedBatch, PackedDataset, packed_dataloader

_DATA = "data_{rank}.json"
_LOSSES = "recent_losses.json"
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"


class CasaTrainer(Trainer):
    """Trains a model on packs.

    The model is changed: requires_grad and precision are set as the settings say.

    Args:
        model: A CasaForConditionalGeneration, or one that peft has put LoRA into (with trainable="as given").
        folder: For checkpoints and logs.
        processor: Saved with every checkpoint, so that each is a whole model.
        arguments: Further TrainingArguments, such as run_name.

    Attributes:
        stopped: Whether SIGTERM ended the run.
        batches: Those of the step at hand, as they came.
        position: Where the training loop stands in the data, and what it has taken of them.
        learning_rates: Of each group of parameters, in the last step.
    """

    # of several kinds in transformers' eyes
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any,
        dataset: PackedDataset,
        settings: TrainerSettings,
        folder: str | Path,
        *,
        processor: CasaProcessor | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **arguments: Any,
    ) -> None:
        optimisation = settings.optimisation
        choose_trained(model, optimisation)
        set_precision(model, optimisation)
        self.settings, self.dataset, self.processor = settings, dataset, processor
        self.folder = Path(folder)
        self.sharded = settings.sharding == "fsdp"
        self.stop_signal = StopSignal()
        self.stopped = False
        self.last_loss: float | None = None
        self.batches: list[PackedBatch] = []
        self.position = dataset.position
        self.learning_rates: dict[str, float] = {}
        self.throughput = Throughput()
        self._spikes = SpikeDetector(settings.spike_detection)
        self._complete: Path | None = None  # the checkpoint that was last written, or begun from
        self._reading: Any = None  # the loader's iterator, and with it the processes that read
        self._losses: list[Tensor] = []
        keeps_cache = getattr(model.config, "use_cache", None)
        chosen = TrainingArguments(**(_arguments(settings, self.folder) | arguments))
        if self.sharded:
            # asking for the device starts what processes talk through
            bf16 = optimisation.precision == "bfloat16" and optimisation.master_weights
            fsdp.shard_model(model, chosen.device, torch.bfloat16 if bf16 else None)
        super().__init__(
            model=model, args=chosen, train_dataset=dataset, callbacks=[_StepCallback(self), *callbacks]
        )  # fmt: skip
        # transformers switches the cache off for good, and would save that with the model
        model.config.use_cache = keeps_cache
        if self.args.n_gpu > 1:
            raise UserError("Several accelerators need a process each: start with torchrun.")
        dataset.rank, dataset.world = self.args.process_index, self.args.world_size
        below_lora(model).loss_chunk = optimisation.loss_chunk
        if optimisation.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        self.ema = Ema(model, optimisation.ema_decay) if optimisation.ema_decay is not None else None
        if settings.dataloader.feature_cache_gb:
            cache_features(self)

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> Any:
        """Trains to the last step, or until SIGTERM; returns transformers' TrainOutput.

        Args:
            resume_from_checkpoint: True goes on from the newest checkpoint, if there is one; or the folder of one.

        Raises:
            UserError: A loss is no number or jumps, or a disk is full.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoints.newest_checkpoint(self.folder)
        if self.args.should_save:
            checkpoints.clear_unfinished(self.folder)
        wait_for_everyone()
        self._complete = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._complete is not None:
            self._load_position(self._complete)
        try:
            with self.stop_signal.listening():
                begun = str(self._complete) if self._complete is not None else None
                return super().train(begun, trial, ignore_keys_for_eval)
        finally:
            # whoever keeps the error of a run keeps its readers; they heed no SIGTERM, so the program would never end
            end = getattr(self._reading, "_shutdown_workers", None)
            self._reading = None
            if end is not None:
                end()

    def heed_stop(self, control: TrainerControl) -> None:
        """Ends the run behind the step at hand, with a checkpoint, if SIGTERM has reached any process; all must ask."""
        if any_rank(self.stop_signal.received, self.args.device):
            self.stopped = control.should_save = control.should_training_stop = True

    # data

    def get_train_dataloader(self) -> DataLoader:
        # each process reads its own shard: accelerate would have one read for all
        begun = self.dataset.position = self.position
        loading = self.settings.dataloader
        readers = max(1, loading.num_workers)
        self.position = DataPosition(readers, begun.turn, dict(begun.positions), begun.taken.copy())
        pinned = self.args.device.type == "cuda"
        return packed_dataloader(self.dataset, loading.num_workers, loading.prefetch_factor, pinned)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """The batches of one step. If a process has no more for a whole step, the run ends on all of them."""
        if self.state.global_step >= self.state.max_steps:
            # a run that was killed between its last checkpoint and its end; transformers would do one step more
            self.batches = []
            self.control.should_training_stop = True
            return [], None
        self._reading = epoch_iterator
        try:
            self.batches = list(islice(epoch_iterator, num_batches))
        except UserError as error:
            # a reader in a process of its own sends its traceback along
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from error
        if any_rank(len(self.batches) < num_batches, self.args.device):
            self.batches = []
            self.control.should_training_stop = True
            self.control.should_save = self.state.global_step > 0
            return [], None
        for batch in self.batches:
            self.position.take(batch)
        inputs = [batch.inputs for batch in self.batches]
        return inputs, self._get_num_items_in_batch(inputs, device)

    # optimisation

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.sharded:
            # accelerate's way to leave a model without DDP around it
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            chosen = self.settings.optimisation
            groups = parameter_groups(self.model if model is None else model, chosen)
            method = MuonAdamW if chosen.muon_lr else torch.optim.AdamW
            self.optimizer = method(groups, betas=(chosen.beta1, chosen.beta2), fused=True)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        settle()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        if len(self._losses) == len(self.batches):
            total = float(torch.stack(self._losses).sum())
            self._losses = []
            self.last_loss = mean_over_ranks(total, self.args.device)
            self._stop_at(self._spikes.fault(self.last_loss))
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        return fsdp.full_tensor(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Asked before every change of the weights, whether gradients are clipped or not."""
        groups = self.optimizer.param_groups
        self.learning_rates = {group["name"].removesuffix(", no decay"): float(group["lr"]) for group in groups}
        norm = fsdp.full_tensor(super()._get_grad_norm(model, grad_norm))
        if norm is not None and not bool(torch.isfinite(torch.as_tensor(norm)).all()):
            self._stop_at("the gradient is no number")
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of the log: of a step also with what `Throughput` tells, and the learning rate of every group.

        These are `lr_new`, `lr_existing`, `lr_muon`, or `lr_` and a pattern of `lr_overrides`.
        """
        if "loss" in logs:
            logs |= {f"lr_{name}": lr for name, lr in self.learning_rates.items()}
            logs |= self.throughput.figures(self.dataset, self.args)
        super().log(logs, start_time)

    def _stop_at(self, fault: str | None) -> None:
        """Stops before the weights change, and leaves the step's batches to be looked at."""
        if fault is None:
            return
        step, recent = self.state.global_step + 1, list(self._spikes.recent)
        rank, loss = self.args.process_index, repr(self.last_loss)
        place = save_for_inspection(self.folder, step, rank, self.batches, fault=fault, loss=loss, recent=recent)
        last = checkpoints.newest_checkpoint(self.folder)
        resume = f"resume from {last.name}" if last is not None else "start again"
        raise UserError(
            f"At step {step} {fault}; its batches are in {place}. Look at them, then {resume}, with a lower learning "
            "rate or without those records."
        )

    # checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside, makes it whole, and then lets the oldest go."""
        step = self.state.global_step
        name = f"checkpoint-{step}"
        if self._complete == self.folder / name:
            # the data end where a checkpoint was made: it is whole, and perhaps the only one
            return
        self.store_flos()
        fault: UserError | None = None
        try:
            if self.args.should_save:
                needed = checkpoint_bytes(self.model, self.settings.optimisation)
                what, remedy = f"The checkpoint of step {step} needs", checkpoints.how_to_resume(self.folder)
                checkpoints.check_room(self.folder, needed, what, remedy)
        except UserError as error:
            fault = error
        if any_rank(fault is not None, self.args.device):
            raise fault or UserError("The disk of the first process is full: free some space, then resume.")
        written = checkpoints.unfinished(self.folder, name)
        with checkpoints.reporting_full_disks(self.folder, name):
            written.mkdir(parents=True, exist_ok=True)
            self._write_state(written)
        wait_for_everyone()
        if self.args.should_save:
            checkpoints.publish(self.folder, name)
            checkpoints.keep_newest(self.folder, self.settings.saving.keep)
        wait_for_everyone()
        self._complete = self.folder / name

    def _write_state(self, written: Path) -> None:
        name = str(written)
        self.save_model(name, _internal_call=True)
        self._save_optimizer_and_scheduler(name)
        self._save_rng_state(name)
        position = json.dumps(self.position.to_dict())
        (written / _DATA.format(rank=self.args.process_index)).write_text(position, encoding="utf-8")
        if not self.args.should_save:
            return
        if self.processor is not None:
            self.processor.save_pretrained(name)
        (written / _LOSSES).write_text(json.dumps(list(self._spikes.recent)), encoding="utf-8")
        if self.ema is not None and not self.sharded:
            owned = {key: value.detach().cpu().contiguous() for key, value in self.ema.state_dict().items()}
            save_file(owned, written / EMA_FILE)
        kept: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                kept[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(written / "trainer_state.json"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers. Of a sharded model every process must call; a checkpoint gets its config alone, and its
        weights in shards."""
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir if output_dir is not None else str(self.args.output_dir)
        model = self.model
        weights = None if _internal_call else fsdp.gathered(model, bool(self.args.should_save))
        if not self.args.should_save:
            return
        if weights is not None:
            model.save_pretrained(folder, state_dict=weights)
            return
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        fsdp.write_shards(Path(output_dir), self.model, self.optimizer, self.ema)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.sharded:
            fsdp.read_moments(Path(checkpoint), self.model, self.optimizer)
        else:
            # through the host: transformers 5.17 reads onto the device by a name that torch does not know for a CPU
            moments = torch.load(Path(checkpoint) / _OPTIMIZER, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(moments)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))
        self._take_settings_rates()

    def _take_settings_rates(self) -> None:
        """Learning rates of a run that goes on are the settings': a checkpoint brings those of its own time back."""
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        wanted = {group["name"]: group["lr"] for group in parameter_groups(self.model, self.settings.optimisation)}
        schedule.base_lrs = [wanted[group["name"]] for group in self.optimizer.param_groups]
        heights = [height(schedule.last_epoch) for height in schedule.lr_lambdas]
        for group, lr, height in zip(self.optimizer.param_groups, schedule.base_lrs, heights, strict=True):
            group["initial_lr"], group["lr"] = lr, lr * height

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights by the model's own names, whatever a family calls them in files."""
        target = self.model if model is None else model
        if self.sharded:
            fsdp.read_weights(Path(resume_from_checkpoint), self.model, self.ema)
        elif not isinstance(target, CasaForConditionalGeneration):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            # wide enough for every parameter, so that each comes back as it was
            widest = max((p.dtype for p in target.parameters()), key=lambda dtype: torch.finfo(dtype).bits)
            widest = widest if widest == torch.float64 else torch.float32
            with torch.random.fork_rng(devices=[]):
                found = CasaForConditionalGeneration.from_pretrained(resume_from_checkpoint, dtype=widest)
            target.load_state_dict(found.state_dict())

    def _load_position(self, checkpoint: Path) -> None:
        self.position = saved_position(checkpoint, self.args.process_index, self.args.world_size, self.sharded)
        self._spikes.recent.extend(json.loads((checkpoint / _LOSSES).read_text(encoding="utf-8")))
        if self.ema is not None and (averages := checkpoint / EMA_FILE).is_file():
            self.ema.load_state_dict(load_file(averages))


def _arguments(settings: TrainerSettings, folder: Path) -> dict[str, Any]:
    """The settings in transformers' words."""
    chosen = settings.optimisation
    return {
        "output_dir": str(folder),
        "max_steps": chosen.steps,
        "gradient_accumulation_steps": chosen.gradient_accumulation_steps,
        "per_device_train_batch_size": 1,
        "learning_rate": chosen.new_lr,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {
            "num_decay_steps": chosen.decay_steps,
            "decay_type": chosen.decay_type,
            "min_lr_ratio": chosen.min_lr_ratio,
        },
        "warmup_steps": chosen.warmup_steps,
        "max_grad_norm": chosen.max_grad_norm,
        # sharded weights are gathered in bf16 instead
        "bf16": chosen.precision == "bfloat16" and chosen.master_weights and settings.sharding == "ddp",
        "save_strategy": "steps",
        "save_steps": settings.saving.every,
        "logging_steps": settings.logging.every,
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


def saved_position(checkpoint: Path, rank: int, world: int, sharded: bool) -> DataPosition:
    """Where a process stood in the data when a checkpoint was saved.

    Raises:
        UserError: It was saved by another number of processes, or with the other kind of sharding.
    """
    if fsdp.has_shards(checkpoint) != sharded:
        was, other = ("ddp", "fsdp") if sharded else ("fsdp", "ddp")
        raise UserError(
            f"{checkpoint} was saved with sharding: {was}, not {other}: resume with that, or start from its export."
        )
    saved = checkpoint / _DATA.format(rank=rank)
    if not saved.is_file() or (checkpoint / _DATA.format(rank=world)).is_file():
        raise UserError(f"{checkpoint} was not saved by {world} processes with this data: resume with as many.")
    return DataPosition.from_dict(json.loads(saved.read_text(encoding="utf-8")))


def cache_features(trainer: CasaTrainer) -> FeatureCache:
    """Has the trainer's dataset keep the image tokens of a frozen image encoder; what is computed stays the same.

    Raises:
        UserError: The encoder is trained, or spread over ranks.
    """
    model = below_lora(trainer.model)
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        raise UserError(
            "feature_cache_gb is for a frozen image tower, and this one is trained: freeze it, or keep none."
        )
    if trainer.sharded:
        raise UserError("feature_cache_gb cannot be used with sharding: fsdp, since ranks would wait for one another.")
    collator, loading = trainer.dataset.collator, trainer.settings.dataloader

    @torch.no_grad()
    def encode(pixel_values: Tensor, grid: Tensor) -> Tensor:
        device = trainer.args.device
        model.encoder.eval()  # what is kept must not be one draw of a dropout
        with trainer.accelerator.autocast():
            return model.encode_images(pixel_values.to(device), grid.to(device)).cpu()

    def open_folder() -> FeatureFolder:
        # with the first picture: only then has a run that goes on the weights of its checkpoint
        how = trainer.args.device.type, trainer.accelerator.mixed_precision, collator.fold
        digest = encoder_digest(model.encoder, collator.processor.image_processor, *how)
        return FeatureFolder(str(loading.feature_cache_dir), digest)

    folder = open_folder if loading.feature_cache_dir is not None else None
    collator.cache = FeatureCache(encode, round(loading.feature_cache_gb * 1e9), folder)
    return collator.cache


class _StepCallback(TrainerCallback):
    """What happens at the beginning, and at the end of each step."""

    def __init__(self, trainer: CasaTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a checkpoint's state brings the intervals of the run that wrote it; this run's are those of its settings
        state.compute_steps(args, state.max_steps)
        self._trainer.throughput.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.throughput.add(trainer.batches)
        if trainer.ema is not None:
            trainer.ema.update()
        trainer.heed_stop(control)
