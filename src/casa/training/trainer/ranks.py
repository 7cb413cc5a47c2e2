"""What all processes of a run must agree on. With one process, everything is as it says."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it holds on any process; every process must ask."""
    if alone():
        return flag
    held = torch.tensor(int(flag), device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return bool(held)


def mean_over_ranks(value: float, device: torch.device) -> float:
    """The mean of the processes' values; every process must ask."""
    if alone():
        return value
    held = torch.tensor(value, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    dist.all_reduce(held)
    return float(held) / dist.get_world_size()


def of_all_ranks(value: T) -> list[T]:
    """Every process's value, in the order of their ranks; every process must ask. For what is small: it is pickled."""
    if alone():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def wait_for_all() -> None:
    if not alone():
        dist.barrier()
