"""A running average of the trained weights, which is often better than the last ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from casa.training.sharding.wrapping import put_apart


class Ema:
    """average <- decay * average + (1 - decay) * weights, after every step; in float32 at least.

    The first steps weigh more (the decay grows from 0 to its value), so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps, self._model = decay, 0, model
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: _wide(parameter) for name, parameter in self._named.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights in as they are after a step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, parameter in self._named.items():
            average = self.average[name]
            average.lerp_(parameter.detach().to(average.device, average.dtype), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the average for its weights: to evaluate it, or to save it."""
        kept = {name: parameter.detach().clone() for name, parameter in self._named.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, and `steps`, as flat tensors."""
        return {**self.average, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        for name, average in self.average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        put_apart(self._model)
        for name, parameter in self._named.items():
            parameter.copy_(values[name])


def _wide(parameter: Tensor) -> Tensor:
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return parameter.detach().to(wide, copy=True)
