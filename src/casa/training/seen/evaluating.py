"""Scores while a run goes on: a held-out loss, and whatever the caller measures. Training stays as it would be."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from transformers import TrainerCallback

from casa.training.packs import PackStream
from casa.training.seen.measures import Measures
from casa.training.trainer import CasaTrainer
from casa.training.trainer.ranks import any_rank, wait_for_all

Evaluate = Callable[[Any, Any], dict[str, float]]
"""From a model and its processor to scores by name."""


class Evaluation(TrainerCallback):
    """Every `every` steps and at the end (0: never), on the first process, with averaged weights if there are any.

    held_out: packs whose answers' mean loss is logged as `eval_loss`; read from their beginning each time, `packs` of
    them. evaluate: gives further scores, logged as `eval_NAME`. Random numbers, modes and gradients are left as they
    were. Give `trainer` before training begins. scores: the last ones, by name. An end is the last step, or that of
    the data; where SIGTERM breaks a run off, there is no time to measure: what has begun is finished, nothing more is
    begun, and scores that are not all there are not noted.
    """

    trainer: CasaTrainer

    def __init__(
        self,
        every: int,
        measures: Measures,
        held_out: Callable[[], PackStream] | None = None,
        packs: int = 8,
        evaluate: Evaluate | None = None,
    ) -> None:
        self._every, self._measures = every, measures
        self._held_out, self._packs, self._evaluate = held_out, packs, evaluate
        self.scores: dict[str, float] = {}
        self._measured = 0  # the step of these scores

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What a checkpoint's log says of its own step need not be measured again."""
        for entry in state.log_history:
            found = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
            if self._every and found and entry["step"] == state.global_step:
                self.scores, self._measured = found, state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._every and (state.global_step % self._every == 0 or state.global_step >= state.max_steps):
            self._note(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._every and self._measured != state.global_step:
            self._note(state, control)

    def _note(self, state: Any, control: Any) -> None:
        if self.trainer.stopped:
            return
        self._measured = state.global_step
        scores: dict[str, float] | None = None
        with self._measures.paused():
            # weights that are spread over processes are gathered by all of them, for the same inputs
            if state.is_world_process_zero or self.trainer.sharded:
                scores = self.measure()
            wait_for_all()
        # a signal that came meanwhile must not wait for another step
        self.trainer.heed_stop(control)
        if scores is None:
            return
        self.scores = scores
        if state.is_world_process_zero:
            # an entry in the log counts as the one that this step may be about to make
            wanted = control.should_log
            self.trainer.log({f"eval_{name}": value for name, value in scores.items()})
            control.should_log = wanted

    def measure(self) -> dict[str, float] | None:
        """Scores of the model as it is now; None if SIGTERM came before all of them were begun."""
        trainer = self.trainer
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        was_training = model.training
        found: dict[str, float] = {}
        with ExitStack() as around:
            around.enter_context(torch.random.fork_rng())
            around.enter_context(torch.no_grad())
            around.enter_context(trainer.accelerator.autocast())
            if trainer.ema is not None:
                around.enter_context(trainer.ema.in_place())
            model.eval()
            try:
                if self._held_out is not None:
                    found["loss"] = self._loss(model, self._held_out())
                if self._evaluate is not None:
                    if self._asked_to_stop():
                        return None
                    found |= self._evaluate(model, trainer.processor)
            finally:
                model.train(was_training)
        return found

    def _asked_to_stop(self) -> bool:
        asked = self.trainer.stopping.asked
        # where all processes measure, they stop together
        return any_rank(asked, self.trainer.args.device) if self.trainer.sharded else asked

    def _loss(self, model: Any, stream: PackStream) -> float:
        """The mean over answer tokens, which are not the same number in every pack."""
        total, count = 0.0, 0
        for batch in islice(stream, self._packs):
            inputs = {name: tensor.to(self.trainer.args.device) for name, tensor in batch.inputs.items()}
            learned = batch.facts["learned"]
            total += float(model(**inputs, use_cache=False).loss) * learned
            count += learned
        return total / count if count else float("nan")
