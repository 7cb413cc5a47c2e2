"""A frame beside a neighbour: how long it takes on a quiet machine, and while another process computes.

Every way of choosing threads is a process of its own, since most of them count only before torch is loaded. They take
turns, first while it is quiet, then beside the neighbour, so that whatever else goes on falls on all alike; what is
told is a ratio within one run.
"""

import os
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import islice
from statistics import median

from casa.benchmarks.harness import Benchmark, Figures, handwriting, in_own_process, table, take_turns
from casa.benchmarks.settings import NeighbourSettings
from casa.errors import UserError
from casa.threads import CHOSEN, settle, share_cores, used_seconds

TORCH = "torch as it is"
# name -> (variables, whether the process shares its cores as the `casa` program does)
WAYS: dict[str, tuple[dict[str, str], bool]] = {
    "casa": ({}, True),
    TORCH: ({}, False),
    "passive": ({"OMP_WAIT_POLICY": "PASSIVE"}, False),
    "one thread": ({"OMP_NUM_THREADS": "1"}, False),
}
PICTURES = 16
WARM = 2.0  # s of watching that do not count
QUIET = 0.15  # cores that others may use on a machine that is called quiet
NEIGHBOUR = "while True: pass"


def bench_neighbour(settings: NeighbourSettings, warm: float = WARM) -> Benchmark:
    """Every way in turn, `rounds` times, quiet and busy.

    Raises:
        UserError: The system does not tell what its cores do, or a process fails.
    """
    try:
        used_seconds(os.sched_getaffinity(0))
    except (AttributeError, OSError, ValueError) as error:
        raise UserError("this system does not tell what its cores do; measure on Linux.") from error
    kept = {key: value for key, value in os.environ.items() if not key.startswith(CHOSEN)}
    watch = partial(in_own_process, watch_quiet_and_busy, asdict(settings), warm)
    ways = {name: partial(watch, shares, environment=kept | chosen) for name, (chosen, shares) in WAYS.items()}
    found = neighbour_summary(take_turns(ways, settings.rounds))
    told = {name: getattr(settings, name) for name in ("size", "rounds", "seconds", "seed")}
    return Benchmark("neighbour", told, found, neighbour_table(found), model=settings.model)


def watch_quiet_and_busy(settings: Figures, warm: float, shares: bool) -> Figures:
    """Watches in a process of its own, alone and then beside a process that computes.

    Args:
        settings: Of `NeighbourSettings`, as plain values.
        warm: Seconds before anything counts.
        shares: Whether threads are chosen as the `casa` program does.

    Returns:
        quiet and busy, milliseconds of every frame; others, cores that other processes used in the quiet part.
    """
    chosen = NeighbourSettings(**settings)
    if shares:
        share_cores()
    from casa.models.auto import load_pretrained
    from casa.streaming import StreamingSession

    session = StreamingSession(*load_pretrained(chosen.model, "cpu"), max_text_tokens=128)
    pictures = list(islice(handwriting(chosen.seed, chosen.size), PICTURES))
    cores = os.sched_getaffinity(0)

    def watch(seconds: float) -> list[float]:
        end, taken = time.perf_counter() + seconds, []
        while not taken or time.perf_counter() < end:
            settle()
            begun = time.perf_counter()
            session.step(pictures[session.frames % PICTURES])
            taken.append(round(1000 * (time.perf_counter() - begun), 2))
        return taken

    watch(warm)  # caches are filled
    begun, before = time.monotonic(), used_seconds(cores) - time.process_time()
    found: Figures = {"quiet": watch(chosen.seconds)}
    others = used_seconds(cores) - time.process_time() - before
    found["others"] = max(0.0, others / (time.monotonic() - begun))
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) as neighbour:
        try:
            watch(warm)  # in which threads are chosen anew
            found["busy"] = watch(chosen.seconds)
        finally:
            neighbour.kill()
    return found


def neighbour_summary(turns: dict[str, list[Figures]]) -> Figures:
    """Sums up the turns.

    Args:
        turns: Of each way of choosing threads, what `watch_quiet_and_busy` gave in each round.

    Returns:
        ways, of each quiet_ms and busy_ms (medians over turns of their medians), most_ms of any frame beside the
        neighbour, slower_busy (beside the neighbour, over the same way's quiet) and slower_quiet (over torch as it is,
        both quiet; medians of the rounds); others_quiet, cores that other processes used in the quiet turns; is_quiet,
        whether these were few, so that the figures say something of this machine.
    """

    def ratio(above: list[float], below: list[float]) -> float:
        return round(median(a / b for a, b in zip(above, below, strict=True)), 3)

    quiet, busy = ({way: [median(turn[kind]) for turn in turns[way]] for way in turns} for kind in ("quiet", "busy"))
    ways = {
        way: {
            "quiet_ms": round(median(quiet[way]), 1),
            "busy_ms": round(median(busy[way]), 1),
            "most_ms": max(max(turn["busy"]) for turn in turns[way]),
            "slower_quiet": ratio(quiet[way], quiet[TORCH]),
            "slower_busy": ratio(busy[way], quiet[way]),
        }
        for way in turns
    }
    others = round(median(turn["others"] for found in turns.values() for turn in found), 2)
    return {"others_quiet": others, "is_quiet": others <= QUIET, "ways": ways}


def neighbour_table(found: Figures) -> str:
    """The ways as aligned lines."""
    columns = {"threads": "{way}", "quiet": "{quiet_ms:.0f} ms", "busy": "{busy_ms:.0f} ms", "most": "{most_ms:.0f} ms"}
    columns |= {"busy / quiet": "{slower_busy:.2f}", "quiet / torch": "{slower_quiet:.2f}"}
    shown = table([{"way": way, **row} for way, row in found["ways"].items()], columns)
    if not found["is_quiet"]:
        shown += f"\nothers used {found['others_quiet']:.2f} cores meanwhile: this machine was not quiet."
    return shown
