"""Checkpoint folders that are whole or not there: written aside, then renamed; the newest few are kept.

run/.unfinished-checkpoint-200      being written; a run that is killed leaves it, the next one removes it
run/checkpoint-200                  whole
run/checkpoint-100                  removed only when checkpoint-200 is whole

The finished model, run/final, is written in the same way.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from casa.errors import UserError

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished-"
_GOING = ".going-"
# for what is small: states, the tokenizer, and blocks of the file system
_BESIDE = 16 * 2**20


def saved_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(saved_checkpoints(folder)), None)


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step}"


def unfinished(folder: Path, name: str) -> Path:
    """Where a checkpoint (or the finished model) of that name is written before it is whole."""
    return folder / (_UNFINISHED + name)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def check_room(folder: Path, step: int, needed: int) -> None:
    """Raises UserError if `needed` bytes will not fit, while everything on the disk is still as it was."""
    free = free_bytes(folder)
    if free < needed + _BESIDE:
        raise UserError(
            f"The checkpoint of step {step} needs {_size(needed + _BESIDE)}, and {folder} has {_size(free)} free: "
            f"free some space, then resume ({_kept(folder)})."
        )


def check_room_at_start(folder: Path, needed: int, each: int) -> None:
    """Raises UserError if a run's checkpoints, of `each` bytes, and its result, all `needed` bytes, will not fit."""
    there = folder.absolute()
    while not there.is_dir():
        there = there.parent
    if (free := free_bytes(there)) < needed + _BESIDE:
        raise UserError(
            f"The checkpoints of this run ({_size(each)} each) and its model need {_size(needed + _BESIDE)}, and "
            f"{folder} has {_size(free)} free: free some space, keep fewer, or train elsewhere."
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
        raise UserError(
            f"The disk of {folder} was full before {name} was whole: free some space, then resume ({_kept(folder)})."
        ) from error


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
        _remove(path)


def clear_unfinished(folder: Path) -> None:
    """Removes what runs that were killed have left half-written or half-removed."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((_UNFINISHED, _GOING)) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def _kept(folder: Path) -> str:
    last = newest_checkpoint(folder)
    return f"{last.name} is kept" if last is not None else "there is none yet"


def _remove(path: Path) -> None:
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def _set_aside(path: Path) -> Path:
    """Gives a folder another name before it is removed: killed half-way, it must not look whole."""
    going = path.with_name(_GOING + path.name)
    shutil.rmtree(going, ignore_errors=True)
    os.rename(path, going)
    return going


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
