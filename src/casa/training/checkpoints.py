"""Checkpoint folders that are whole or not there: written aside, then renamed; the newest few are kept.

    run/.unfinished-checkpoint-200      being written; a run that is killed leaves it, the next one removes it
    run/checkpoint-200                  whole
    run/checkpoint-100                  removed only when checkpoint-200 is whole

The finished model, run/final, is written in the same way. Beside these: the running average of the weights, SIGTERM,
and what all processes of a run must agree on.
"""

import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar, cast

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from casa.errors import UserError
from casa.training.fsdp import reshard

T = TypeVar("T")

FINAL = "final"  # the finished model in a run's folder
EMA_FILE = "ema.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED, _GOING = ".unfinished-", ".going-"
# for what is small: states, the tokenizer, and blocks of the file system
_BESIDE = 16 * 2**20


def saved_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The last of them; None if there is none yet."""
    return next(reversed(saved_checkpoints(folder)), None)


def unfinished(folder: Path, name: str) -> Path:
    """Where a checkpoint (or the finished model) of that name is written before it is whole."""
    return folder / (_UNFINISHED + name)


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder is on, or will be."""
    there = folder.absolute()
    while not there.is_dir():
        there = there.parent
    return shutil.disk_usage(there).free


def check_room(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Refuses to begin what will not fit, while everything on the disk is still as it was.

    Args:
        needed: Bytes.
        what: Is to be written: the beginning of the sentence, such as "The checkpoints of this run need".
        remedy: Its end.

    Raises:
        UserError: There is less room.
    """
    free = free_bytes(folder)
    if free < needed + _BESIDE:
        raise UserError(
            f"{what} {size_in_words(needed + _BESIDE)}, and {folder} has {size_in_words(free)} free: {remedy}."
        )


@contextmanager
def reporting_full_disks(folder: Path, name: str) -> Iterator[None]:
    """Turns a disk that fills up while `name` is written into a sentence, and takes what is unfinished of it away."""
    try:
        yield
    except Exception as error:
        # libraries wrap the operating system's error in their own, or only quote it
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            cause = cause.__cause__ or cause.__context__
        if cause is None and "No space left" not in str(error) and "unexpected pos" not in str(error):
            raise
        shutil.rmtree(unfinished(folder, name), ignore_errors=True)
        raise UserError(f"The disk of {folder} was full before {name} was whole: {how_to_resume(folder)}.") from error


def publish(folder: Path, name: str) -> None:
    """Makes an unfinished folder a whole one, in the place of one that had its name until then.

    Its files are on the disk before its name is.
    """
    written, target = unfinished(folder, name), folder / name
    for path in (*written.rglob("*"), written):
        _sync(path)
    before = _set_aside(target) if target.exists() else None
    os.rename(written, target)
    _sync(folder)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def keep_newest(folder: Path, count: int) -> None:
    """Removes all but the newest checkpoints."""
    for path in saved_checkpoints(folder)[:-count]:
        shutil.rmtree(_set_aside(path), ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Removes what runs that were killed have left half-written or half-removed."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((_UNFINISHED, _GOING)) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def how_to_resume(folder: Path) -> str:
    """What to do about a full disk."""
    last = newest_checkpoint(folder)
    return f"free some space, then resume ({f'{last.name} is kept' if last is not None else 'there is none yet'})"


def _set_aside(path: Path) -> Path:
    """Gives a folder another name before it is removed: killed half-way, it must not look whole."""
    going = path.with_name(_GOING + path.name)
    shutil.rmtree(going, ignore_errors=True)
    os.rename(path, going)
    return going


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_in_words(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


class Ema:
    """A running average of the trained weights, which is often better than the last ones.

    average <- decay * average + (1 - decay) * weights, after every step; in float32 at least. The first steps weigh
    more (the decay grows from 0 to its value), so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps, self._model = decay, 0, model
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            self.average[name] = parameter.detach().to(wide, copy=True)

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
        """Takes back what `state_dict` gave."""
        self.steps = int(state["steps"])
        for name, average in self.average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        reshard(self._model)
        for name, parameter in self._named.items():
            parameter.copy_(values[name])


class StopSignal:
    """SIGTERM, which schedulers send before they take a machine away: noted, and acted on at the end of a step."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM is noted instead of ending the process. Only a main thread can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it holds on any process; all of them must ask, as for what follows."""
    return bool(cast(Tensor, reduce(torch.tensor(int(flag), device=device), "sum")))


def mean_over_ranks(value: float, device: torch.device) -> float:
    """The mean of the processes' values."""
    kind = torch.float64 if device.type == "cpu" else torch.float32
    return float(cast(Tensor, reduce(torch.tensor(value, dtype=kind, device=device), "mean")))


def of_all_ranks(value: T) -> list[T]:
    """Every process's value, in the order of their ranks. For what is small: it is pickled."""
    return gather_object([value])
