"""A frame beside a neighbour: how long it takes on a quiet machine, and while another process computes.

Every way of choosing threads is a process of its own, since most of them count only before torch is loaded. All of them
are there from the start and wait; in every round each has a turn while it is quiet, and one beside the neighbour. So
whatever else goes on falls on all alike, and what is told is a ratio within one run.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

from casa.benchmarks.apart import told
from casa.errors import UserError
from casa.threads import CHOSEN, settle, share_cores, used_seconds

# name -> (variables, whether the process shares its cores as the `casa` program does)
WAYS: dict[str, tuple[dict[str, str], bool]] = {
    "casa": ({}, True),
    "torch as it is": ({}, False),
    "passive": ({"OMP_WAIT_POLICY": "PASSIVE"}, False),
    "one thread": ({"OMP_NUM_THREADS": "1"}, False),
}
PICTURES = 16
QUIET = 0.15  # cores that others may use on a machine that is called quiet
NEIGHBOUR = "while True: pass"


@dataclass(frozen=True)
class Turn:
    """What one way did in one turn. others: cores that other processes used meanwhile, the neighbour among them."""

    way: str
    busy: bool
    milliseconds: list[float]
    others: float


def bench_neighbour(
    model: str, size: int = 336, rounds: int = 5, seconds: float = 3.0, seed: int = 0, warm: float = 2.0
) -> list[Turn]:
    """Every way in turn, quiet and busy, `rounds` times. seconds: of each turn, after `warm` more that do not count.

    Raises UserError where the system does not tell what its cores do, or a process cannot start.
    """
    if rounds < 1 or not seconds > 0:
        raise UserError("rounds is 1 or more, and seconds above 0.")
    try:
        cores = os.sched_getaffinity(0)
        used_seconds(cores)
    except (AttributeError, OSError, ValueError) as error:
        raise UserError("this system does not tell what its cores do; measure on Linux.") from error
    given = {"model": model, "size": size, "seed": seed, "warm": warm}
    found = []
    with ExitStack() as stack:
        watchers = {name: stack.enter_context(_watcher(name, given)) for name in WAYS}
        for number in range(rounds):
            # in another order each time, so that nobody always follows the same one
            names = [*WAYS][number % len(WAYS) :] + [*WAYS][: number % len(WAYS)]
            for busy in (False, True):
                with _neighbour() if busy else ExitStack():
                    for name in names:
                        found.append(_turn(name, busy, watchers[name], seconds, cores))
    return found


def _turn(name: str, busy: bool, watcher: "subprocess.Popen[str]", seconds: float, cores: set[int]) -> Turn:
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    begun, before = time.monotonic(), used_seconds(cores)
    watcher.stdin.write(f"{seconds}\n")
    watcher.stdin.flush()
    answer = json.loads(watcher.stdout.readline() or "null")
    if answer is None:
        raise UserError(f"the process that watches as {name!r} has ended; is there enough memory for {len(WAYS)}?")
    others = used_seconds(cores) - before - answer["own"]
    return Turn(name, busy, answer["milliseconds"], max(0.0, others / (time.monotonic() - begun)))


@contextmanager
def _watcher(name: str, given: dict[str, Any]) -> Iterator["subprocess.Popen[str]"]:
    variables, shares = WAYS[name]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(CHOSEN)}
    command = [sys.executable, "-c", f"from {__name__} import child; child()", json.dumps(given | {"shares": shares})]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=kept | variables, **pipes) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise UserError(f"the process that watches as {name!r} could not start.")
            yield process
        finally:
            process.kill()


@contextmanager
def _neighbour() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) as process:
        try:
            yield
        finally:
            process.kill()


def child() -> None:
    """Watches frames whenever a line says for how many seconds; answers in JSON."""
    given = told()
    if given["shares"]:
        share_cores()
    from casa.benchmarks.stream import handwriting
    from casa.models.auto import load_pretrained
    from casa.streaming import StreamingSession

    model, processor = load_pretrained(given["model"], "cpu")
    session = StreamingSession(model, processor, max_text_tokens=128)
    pictures = list(islice(handwriting(given["seed"], given["size"]), PICTURES))

    def watch(seconds: float) -> list[float]:
        end, taken = time.perf_counter() + seconds, []
        while not taken or time.perf_counter() < end:
            settle()
            begun = time.perf_counter()
            session.step(pictures[session.frames % PICTURES])
            taken.append(round(1000 * (time.perf_counter() - begun), 2))
        return taken

    watch(given["warm"])
    print("ready", flush=True)
    for line in sys.stdin:
        own = time.process_time()
        watch(given["warm"])  # in which threads are chosen anew, and caches filled
        taken = watch(float(line))
        print(json.dumps({"milliseconds": taken, "own": time.process_time() - own}), flush=True)


def neighbour_summary(turns: list[Turn]) -> dict[str, Any]:
    """By way: quiet_ms, busy_ms (medians over turns of their medians), most_ms of any frame beside the neighbour.

    slower_busy: beside the neighbour, over the same way's quiet. slower_quiet: over torch as it is, both quiet; medians
    of the rounds. others_quiet: cores that other processes used in the quiet turns. is_quiet: that these were few, so
    that the figures say something of this machine.
    """

    def medians(way: str, busy: bool) -> list[float]:
        return [median(turn.milliseconds) for turn in turns if (turn.way, turn.busy) == (way, busy)]

    def ratio(above: list[float], below: list[float]) -> float:
        return round(median(a / b for a, b in zip(above, below, strict=True)), 3)

    ways = {}
    for way in WAYS:
        quiet, busy = medians(way, False), medians(way, True)
        ways[way] = {
            "quiet_ms": round(median(quiet), 1),
            "busy_ms": round(median(busy), 1),
            "most_ms": max(max(turn.milliseconds) for turn in turns if turn.busy and turn.way == way),
            "slower_quiet": ratio(quiet, medians("torch as it is", False)),
            "slower_busy": ratio(busy, quiet),
        }
    others = round(median(turn.others for turn in turns if not turn.busy), 2)
    return {"others_quiet": others, "is_quiet": others <= QUIET, "ways": ways}


def neighbour_table(found: dict[str, Any]) -> str:
    """The ways as aligned lines."""
    lines = [f"{'threads':16}{'quiet':>10}{'busy':>10}{'most':>11}{'busy / quiet':>14}{'quiet / torch':>15}"]
    for way, row in found["ways"].items():
        lines.append(
            f"{way:16}{row['quiet_ms']:7.0f} ms{row['busy_ms']:7.0f} ms{row['most_ms']:8.0f} ms"
            f"{row['slower_busy']:14.2f}{row['slower_quiet']:15.2f}"
        )
    if not found["is_quiet"]:
        lines.append(f"others used {found['others_quiet']:.2f} cores meanwhile: this machine was not quiet.")
    return "\n".join(lines)
