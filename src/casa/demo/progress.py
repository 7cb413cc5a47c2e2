"""Progress for people who wait: a bar in a terminal, a plain line every few seconds anywhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

Report = Callable[[str], object]
"""Takes one line of text, as `print` does."""

Advance = Callable[[int], None]
"""Told how many are done so far."""

EVERY = 5.0  # seconds between plain lines


@contextmanager
def shown(label: str, total: int | None, report: Report) -> Iterator[Advance]:
    """Shows the progress of a block of work of `total` steps, None if nobody knows how many.

    Lines that `report` prints meanwhile appear above the bar. The last plain line always gives the final count.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    if console.is_terminal:
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.update(task, completed=done)
        return

    last, final = monotonic(), 0
    of = f" of {total}" if total is not None else ""

    def advance(done: int) -> None:
        nonlocal last, final
        final = done
        if monotonic() - last >= EVERY:
            last = monotonic()
            report(f"{label}: {done}{of}")

    yield advance
    report(f"{label}: {final}{of}, done")
