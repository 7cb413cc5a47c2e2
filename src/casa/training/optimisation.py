"""AdamW with warm-up, a constant stretch and a decay; the paper's schedule (section 4).

    rate      ______________
             /              \\
            /                \\
        ___/                  \\___
        warm-up   constant    decay   -> steps

State is saved as flat tensors, so that checkpoints are safetensors and hold no code.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from casa.training.muon import Muon


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor by step. steps: the whole run. warmup: steps. decay: share of the run at its end."""

    steps: int
    warmup: int
    decay: float

    def factor(self, step: int) -> float:
        """0 < factor <= 1 of step 0, 1, ..., steps - 1."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        falling = 1.0 if self.decay <= 0 else (self.steps - step) / max(1.0, self.decay * self.steps)
        return max(1e-3, min(rising, falling, 1.0))


@dataclass(frozen=True)
class Group:
    """Parameters by name with one learning rate. muon: update them with Muon (matrices only)."""

    rate: float
    named: Mapping[str, nn.Parameter]
    muon: bool = False


class Optimiser:
    """AdamW, and Muon where asked, over groups of named parameters.

    A parameter in no group is not trained. Weight decay is for matrices only. clip: largest gradient norm,
    over all groups.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        schedule: Schedule,
        *,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        clip: float = 1.0,
    ) -> None:
        self.schedule, self.clip = schedule, clip
        self._adamw_named: dict[str, nn.Parameter] = {}
        self._muons: list[Muon] = []
        described = []
        for group in groups:
            if group.muon:
                self._muons.append(Muon(group.named, group.rate, weight_decay))
                continue
            for decays in (True, False):
                chosen = {n: p for n, p in group.named.items() if (p.ndim > 1) == decays}
                if chosen:
                    decay = weight_decay if decays else 0.0
                    described.append({"params": [*chosen.values()], "rate": group.rate, "weight_decay": decay})
                    self._adamw_named |= chosen
        self._adamw = torch.optim.AdamW(described, betas=betas, fused=True)
        self._all = [*self._adamw_named.values(), *(p for muon in self._muons for p in muon.named.values())]

    def step(self, number: int) -> float:
        """Updates the parameters with step `number`'s rates, clears their gradients; the norm before clipping."""
        factor = self.schedule.factor(number)
        for group in self._adamw.param_groups:
            group["lr"] = group["rate"] * factor
        norm = nn.utils.clip_grad_norm_(self._all, self.clip)
        self._adamw.step()
        for muon in self._muons:
            muon.step(factor)
        for parameter in self._all:
            parameter.grad = None
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name, for a checkpoint."""
        flat = {}
        for name, parameter in self._adamw_named.items():
            for key, value in self._adamw.state.get(parameter, {}).items():
                flat[f"{key}/{name}"] = value.detach().clone()
        for muon in self._muons:
            flat |= {f"momentum/{name}": buffer.clone() for name, buffer in muon.buffers.items()}
        return flat

    def load_state(self, flat: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in flat.items():
            kind, name = key.split("/", 1)
            by_name.setdefault(name, {})[kind] = value.clone()
        for name, parameter in self._adamw_named.items():
            if name in by_name:
                self._adamw.state[parameter] = by_name[name]
        for muon in self._muons:
            for name in muon.buffers:
                if name in by_name:
                    muon.buffers[name] = by_name[name]["momentum"]
