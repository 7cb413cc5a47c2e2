"""The loop that every stage runs: batches in, steps done, progress told, state saved so that it can go on.

A run that was interrupted goes on at the step of its last saved state and gives the same result as one that was
not: batches and everything random depend on the seed and the step alone.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from casa.threads import settle
from casa.training.checkpoints import load_state, save_state
from casa.training.muon import is_inner
from casa.training.optimisation import Group, Optimiser, Schedule
from casa.training.recipe import Optimisation

EVERY = 20  # steps between reports
SAVE_SECONDS = 120.0  # between saved states
_POINTS = 200  # of a loss curve, at most


@dataclass(frozen=True)
class Progress:
    """stage: its name. step: steps done, of `steps`. loss: mean since the last report. rate: steps per second."""

    stage: str
    step: int
    steps: int
    loss: float
    rate: float

    def __str__(self) -> str:
        left = (self.steps - self.step) / self.rate / 60
        return f"{self.stage}: step {self.step} of {self.steps}, loss {self.loss:.4f}, {left:.0f} min left"


Report = Callable[[Progress], None]

# monitor(stage, step, model): looks at a model while it is trained, and must leave it as it was
Monitor = Callable[[str, int, nn.Module], None]


@dataclass
class Loop:
    """One stage's steps over named parameters.

    folder: where the running state is kept.
    watch: called with the number of steps done, at each saved state.
    """

    stage: str
    folder: Path
    parameters: Mapping[str, nn.Parameter]
    settings: Optimisation
    report: Report | None = None
    watch: Callable[[int], Any] | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        chosen = self.settings
        # matrices inside blocks and CASA layers; embeddings, heads and the projector stay with AdamW
        inner = {n: p for n, p in self.parameters.items() if is_inner(n, p)} if chosen.muon else {}
        outer = {n: p for n, p in self.parameters.items() if n not in inner}
        groups = [Group(chosen.rate, outer)]
        if inner:
            groups.append(Group(chosen.muon, inner, muon=True))
        schedule = Schedule(chosen.steps, chosen.warmup, chosen.decay)
        self._optimiser = Optimiser(groups, schedule, weight_decay=chosen.weight_decay, clip=chosen.clip)

    def resume(self) -> int:
        """Takes over the last saved state, if any; the step to go on with."""
        found = load_state(self.folder)
        if found is None:
            return 0
        tensors, facts = found
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight:{name}"])
        moments = {k.removeprefix("moment:"): v for k, v in tensors.items() if k.startswith("moment:")}
        self._optimiser.load_state(moments)
        self.curve = [(int(step), float(loss)) for step, loss in facts["curve"]]
        self.seconds = float(facts["seconds"])
        return int(facts["step"])

    def run(self, start: int, batches: Iterable[Any], loss_of: Callable[[Any, int], Tensor]) -> dict[str, Any]:
        """Steps `start` to the end, one per batch. loss_of(batch, step) gives the scalar loss. Returns facts."""
        steps = self.settings.steps
        began = saved = reported = time.monotonic()
        before, losses = self.seconds, []
        for step, batch in zip(range(start, steps), batches, strict=False):
            settle()
            loss = loss_of(batch, step)
            loss.backward()
            self._optimiser.step(step)
            losses.append(float(loss.detach()))
            now = time.monotonic()
            self.seconds = before + now - began
            if (step + 1) % EVERY == 0 or step + 1 == steps:
                mean = sum(losses) / len(losses)
                if (step + 1) % max(EVERY, steps // _POINTS) < EVERY or step + 1 == steps:
                    self.curve.append((step + 1, round(mean, 5)))
                if self.report is not None:
                    rate = len(losses) / max(now - reported, 1e-9)
                    self.report(Progress(self.stage, step + 1, steps, mean, rate))
                losses, reported = [], now
                # only here, so that a resumed run reports the same means
                if now - saved >= SAVE_SECONDS:
                    self.save(step + 1)
                    if self.watch is not None:
                        self.watch(step + 1)
                    saved = now
        return {"steps": steps, "seconds": round(self.seconds, 1), "curve": self.curve}

    def save(self, step: int) -> None:
        """Saves weights, moments and the step to go on with."""
        tensors = {f"weight:{name}": parameter for name, parameter in self.parameters.items()}
        tensors |= {f"moment:{name}": value for name, value in self._optimiser.state().items()}
        facts = {"step": step, "seconds": self.seconds, "curve": self.curve}
        save_state(self.folder, tensors, facts)
