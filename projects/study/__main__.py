"""Runs a study: `python -m projects.study runs/study --study projects/study/small.yaml --jobs 2`.

Whatever ends it, the same command goes on: finished runs are skipped, an unfinished one continues at its checkpoint.
Every job takes the next run that no other has; a further command on the same folder joins in.
"""

import fcntl
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from casa.errors import UserError
from projects.study.grid import Run, Study, read_study
from projects.study.real import begin_real
from projects.study.run import is_done, train_run
from projects.study.shared import begin


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone has the lock at `path`, which it keeps inside the `with`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def work(study: Study, folder: Path, groups: list[str]) -> int:
    """Trains every run that is not done and that no other process has; returns how many failed."""
    with (folder / "begin.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        beginning = begin_real(study, folder) if study.shared.parts else begin(study, folder)
    failed = 0
    runs = chosen(study, groups)
    for number, run in enumerate(runs, start=1):
        with claimed(folder / "locks" / run.id) as ours:
            if not ours or is_done(folder, run):
                continue
            print(f"{number} of {len(runs)}: {run.id}", flush=True)
            try:
                record = train_run(study, run, beginning, folder)
            except UserError:
                raise
            except Exception:
                # the others go on, and the same command tries this one again
                traceback.print_exc()
                failed += 1
            else:
                print(f"{run.id}: {record['seconds']:.0f} s", flush=True)
    return failed


def chosen(study: Study, groups: list[str]) -> list[Run]:
    """The runs of these groups, or all."""
    known = [group.name for group in study.groups]
    for name in groups:
        if name not in known:
            raise UserError(f"there is no group {name!r}; choose from {', '.join(known)}.")
    return [run for run in study.runs() if not groups or run.group in groups]


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the runs.")],
    study: Annotated[Path, typer.Option(help="The study's YAML file.")],
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    group: Annotated[list[str] | None, typer.Option(help="Only this group; may be given several times.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is to be done.")] = False,
) -> None:
    """Train all runs of a study that are not done yet."""
    try:
        read, groups = read_study(study), group or []
        waiting = [run for run in chosen(read, groups) if not is_done(folder, run)]
        steps = sum(run.budget.steps for run in waiting)
        print(f"{len(waiting)} of {len(chosen(read, groups))} runs to do, {steps:,} steps", flush=True)
        if dry_run:
            print("\n".join(f"{run.group}: {run.id}" for run in waiting))
            return
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "projects.study", str(folder), "--study", str(study)]
        command += [part for name in groups for part in ("--group", name)]
        helpers = [subprocess.Popen(command, env=os.environ) for _ in range(jobs - 1)]
        try:
            failed = work(read, folder, groups)
        except BaseException:
            for helper in helpers:
                helper.terminate()
            raise
        finally:
            # what SIGTERM reached writes its checkpoint first
            ended = [helper.wait() for helper in helpers]
    except UserError as error:
        raise SystemExit(str(error)) from error
    if failed or any(ended):
        raise SystemExit("some runs failed; what they said stands above. The same command tries them again.")


if __name__ == "__main__":
    typer.run(main)
