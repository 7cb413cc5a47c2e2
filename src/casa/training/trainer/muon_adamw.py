"""One torch optimiser of two methods: Muon for the matrices inside blocks, AdamW for all else.

It is an AdamW, so transformers saves, loads and schedules it as one; a group with `muon` is passed over by AdamW, and
its parameters have a `momentum` instead of two moments. Sharded checkpoints know AdamW's moments alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from casa.training.muon import muon_step, split


class MuonAdamW(torch.optim.AdamW):
    """Groups as torch's AdamW takes them; one with `muon: True` holds matrices (r, c) only.

    A group's `parts` are, for each of its parameters, how many matrices stand in it one above the other.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        every = self.param_groups
        self.param_groups = [group for group in every if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group.get("muon"):
                self._orthogonal_step(group)
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        members: list[tuple[Tensor, Tensor, Tensor]] = []
        for parameter, parts in zip(group["params"], group["parts"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros(())  # what an AdamW looks for in any state that it loads
            state["step"] += 1
            members += split(parameter, state["momentum"], parts)
        muon_step(members, float(group["lr"]), group["weight_decay"])
