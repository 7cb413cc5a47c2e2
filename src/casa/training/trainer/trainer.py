"""CasaTrainer: transformers' Trainer over a stream of packs, with runs that stop and go on without losing a step.

What it adds to transformers': groups of parameters, the loss in chunks, data that resume at the very batch, checkpoints
that are whole or not there, an end at SIGTERM, and a watch over the loss that speaks before weights are spoilt.
"""

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration
from casa.threads import settle
from casa.training.packs import Batch, PackStream, StreamPosition, open_loader
from casa.training.sharding import ShardedTraining, shard_model
from casa.training.sharding.export import EMA_FILE
from casa.training.sharding.training import check_kind
from casa.training.trainer import checkpoints, ranks
from casa.training.trainer.arguments import training_arguments
from casa.training.trainer.ema import Ema
from casa.training.trainer.groups import (
    below_lora,
    choose_trained,
    parameter_groups,
    set_precision,
    written_weights,
)
from casa.training.trainer.inspection import save_for_inspection
from casa.training.trainer.keeping import keep_features
from casa.training.trainer.muon_adamw import MuonAdamW
from casa.training.trainer.settings import TrainerSettings
from casa.training.trainer.signals import StopAsked
from casa.training.trainer.watch import LossWatch

_DATA = "data_{rank}.json"
_WATCH = "watch.json"


class CasaTrainer(ShardedTraining, Trainer):
    """Trains a model on packs.

    model: a CasaForConditionalGeneration, or one that peft has put LoRA into (with trained="as given"). It is changed:
    requires_grad and precision are set as the settings say.
    processor: saved with every checkpoint, so that each is a whole model. arguments: further TrainingArguments, such as
    report_to. After `train`, `stopped` says whether SIGTERM ended it.
    """

    def __init__(
        self,
        model: Any,
        stream: PackStream,
        settings: TrainerSettings,
        *,
        processor: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **arguments: Any,
    ) -> None:
        optimisation = settings.optimisation
        choose_trained(model, optimisation)
        set_precision(model, optimisation)
        self.settings, self.stream, self.processor = settings, stream, processor
        self.folder = Path(settings.folder)
        self.stopping = StopAsked()
        self.stopped = False
        self.last_loss: float | None = None
        self.batches: list[Batch] = []
        """Those of the step at hand, as they came."""
        self.position = stream.position
        """Where the training loop stands in the data, and what it has taken of them."""
        self.rates: dict[str, float] = {}
        """Of each group of parameters, in the last step."""
        self._whole: Path | None = None  # the checkpoint that was last written, or begun from
        self._watch = LossWatch(settings.watch)
        self._reading: Any = None  # the loader's iterator, and with it the processes that read
        self._losses: list[Tensor] = []
        keeps_cache = getattr(model.config, "use_cache", None)
        chosen = training_arguments(settings, arguments)
        if self.sharded:
            # asking for the device starts what processes talk through
            bf16 = optimisation.precision == "bfloat16" and optimisation.master
            shard_model(model, chosen.device, torch.bfloat16 if bf16 else None)
        super().__init__(
            model=model,
            args=chosen,
            train_dataset=stream,
            callbacks=[_Steps(self), *(callbacks or [])],
        )
        # transformers switches the cache off for good, and would save that with the model
        model.config.use_cache = keeps_cache
        if self.args.n_gpu > 1:
            raise UserError("Several accelerators need a process each: start with torchrun --nproc-per-node.")
        stream.rank, stream.world = self.args.process_index, self.args.world_size
        below_lora(model).loss_chunk = optimisation.loss_chunk
        if optimisation.checkpoint_blocks:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        self.ema = Ema(model, optimisation.ema) if optimisation.ema is not None else None
        if settings.keep_gigabytes:
            keep_features(self, settings.keep_gigabytes, settings.keep_folder)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Trains to the last step, or until SIGTERM; returns transformers' TrainOutput.

        resume_from_checkpoint: True goes on from the newest checkpoint, if there is one; or the folder of one.
        Raises UserError for a loss that is no number or jumps, and for a disk that is full.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoints.newest_checkpoint(self.folder)
        if self.args.should_save:
            checkpoints.clear_unfinished(self.folder)
        ranks.wait_for_all()
        self._whole = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._whole is not None:
            self._load_position(self._whole)
        try:
            with self.stopping.listening():
                return super().train(resume_from_checkpoint=str(self._whole) if self._whole else None, **kwargs)
        finally:
            # whoever keeps the error of a run keeps its readers; they heed no SIGTERM, so the program would never end
            end = getattr(self._reading, "_shutdown_workers", None)
            self._reading = None
            if end is not None:
                end()

    def heed_stop(self, control: Any) -> None:
        """Ends the run behind the step at hand, with a checkpoint, if SIGTERM has reached any process; all must ask."""
        if ranks.any_rank(self.stopping.asked, self.args.device):
            self.stopped = control.should_save = control.should_training_stop = True

    # data

    def get_train_dataloader(self) -> DataLoader:
        # each process reads its own shard: accelerate would have one read for all
        begun = self.stream.position = self.position
        readers = max(1, self.settings.workers)
        self.position = StreamPosition(readers, begun.turn, dict(begun.positions), begun.taken.copy())
        pinned = self.args.device.type == "cuda"
        return open_loader(self.stream, self.settings.workers, self.settings.ahead, pinned)

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
        if ranks.any_rank(len(self.batches) < num_batches, self.args.device):
            self.batches = []
            self.control.should_training_stop = True
            self.control.should_save = self.state.global_step > 0
            return [], None
        for batch in self.batches:
            self.position.take(batch)
        inputs = [batch.inputs for batch in self.batches]
        return inputs, self._get_num_items_in_batch(inputs, device)

    # optimisation

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            chosen = self.settings.optimisation
            target: Any = self.model if model is None else model
            groups = parameter_groups(target, chosen)
            method = MuonAdamW if chosen.muon else torch.optim.AdamW
            self.optimizer = method(groups, betas=(chosen.beta1, chosen.beta2), fused=True)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        settle()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        if len(self._losses) == len(self.batches):
            total = float(torch.stack(self._losses).sum())
            self._losses = []
            self.last_loss = ranks.mean_over_ranks(total, self.args.device)
            self._stop_at(self._watch.fault(self.last_loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Asked before every change of the weights, whether gradients are clipped or not."""
        self.rates = {
            group["name"].removesuffix(", no decay"): float(group["lr"]) for group in self.optimizer.param_groups
        }
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        if norm is not None and not bool(torch.isfinite(torch.as_tensor(norm)).all()):
            self._stop_at("the gradient is no number")
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of the log: of a step also with the rate of every group, `rate_new`, `rate_existing`, `rate_muon` or
        `rate_` and a pattern of `rates`."""
        if "loss" in logs:
            logs |= {f"rate_{name}": rate for name, rate in self.rates.items()}
        super().log(logs, start_time)

    def _stop_at(self, fault: str | None) -> None:
        """Stops before the weights change, and leaves the step's batches to be looked at."""
        if fault is None:
            return
        step = self.state.global_step + 1
        place = save_for_inspection(
            self.folder, step, self.args.process_index, self.batches, fault, self.last_loss, list(self._watch.recent)
        )
        last = checkpoints.newest_checkpoint(self.folder)
        resume = f"resume from {last.name}" if last is not None else "start again"
        raise UserError(
            f"At step {step} {fault}; its batches are in {place}. Look at them, then {resume}, with a lower rate or "
            "without those records."
        )

    # checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside, makes it whole, and then lets the oldest go."""
        step = self.state.global_step
        name = checkpoints.checkpoint_name(step)
        if self._whole == self.folder / name:
            # the data end where a checkpoint was made: it is whole, and perhaps the only one
            return
        self.store_flos()
        fault: UserError | None = None
        if self.args.should_save:
            try:
                checkpoints.check_room(self.folder, step, self._bytes_needed())
            except UserError as error:
                fault = error
        if ranks.any_rank(fault is not None, self.args.device):
            raise fault or UserError("The disk of the first process is full: free some space, then resume.")
        written = checkpoints.unfinished(self.folder, name)
        with checkpoints.reporting_full_disks(self.folder, name):
            written.mkdir(parents=True, exist_ok=True)
            self._write_state(written)
        ranks.wait_for_all()
        if self.args.should_save:
            checkpoints.publish(self.folder, name)
            checkpoints.keep_newest(self.folder, self.settings.keep)
        ranks.wait_for_all()
        self._whole = self.folder / name

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
        (written / _WATCH).write_text(json.dumps(list(self._watch.recent)), encoding="utf-8")
        if self.ema is not None and not self.sharded:
            owned = {key: value.detach().cpu().contiguous() for key, value in self.ema.state_dict().items()}
            save_file(owned, written / EMA_FILE)
        kept: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                kept[type(callback).__name__] = callback.state()
        self.state.save_to_json(os.path.join(name, "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights by the model's own names, whatever a family calls them in files."""
        if self.sharded:
            self.read_shards(Path(resume_from_checkpoint))
            return
        target = self.model if model is None else model
        if not isinstance(target, CasaForConditionalGeneration):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # wide enough for every parameter, so that each comes back as it was
        widest = max((p.dtype for p in target.parameters()), key=lambda dtype: torch.finfo(dtype).bits)
        widest = widest if widest == torch.float64 else torch.float32
        with torch.random.fork_rng(devices=[]):
            found = CasaForConditionalGeneration.from_pretrained(resume_from_checkpoint, dtype=widest)
        target.load_state_dict(found.state_dict())

    def _load_position(self, checkpoint: Path) -> None:
        self.position = saved_position(checkpoint, self.args.process_index, self.args.world_size, self.sharded)
        self._watch.recent.extend(json.loads((checkpoint / _WATCH).read_text(encoding="utf-8")))
        if self.ema is not None and (averages := checkpoint / EMA_FILE).is_file():
            self.ema.load_state_dict(load_file(averages))

    def _bytes_needed(self) -> int:
        tensors = [*written_weights(self.model).values()]
        tensors += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        tensors += [*self.ema.average.values()] if self.ema is not None else []
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saved_position(checkpoint: Path, rank: int, world: int, sharded: bool) -> StreamPosition:
    """Where a process stood in the data when a checkpoint was saved.

    Raises UserError if it was saved by another number of processes, or with the other kind of sharding.
    """
    saved = checkpoint / _DATA.format(rank=rank)
    if (fault := check_kind(checkpoint, sharded)) is not None:
        raise UserError(fault)
    if not saved.is_file() or (checkpoint / _DATA.format(rank=world)).is_file():
        raise UserError(f"{checkpoint} was not saved by {world} processes with this data: resume with as many.")
    return StreamPosition.from_dict(json.loads(saved.read_text(encoding="utf-8")))


class _Steps(TrainerCallback):
    """What happens at the beginning, and at the end of each step."""

    def __init__(self, trainer: CasaTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # a checkpoint's state brings the intervals of the run that wrote it; this run's are those of its settings
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer.ema is not None:
            trainer.ema.update()
        trainer.heed_stop(control)
