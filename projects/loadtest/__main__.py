"""`python -m projects.loadtest URL`: streams one after another until captions are late or one is refused.

Writes one JSON object: how many streams kept up, what the server's own admission says of that, and what became of the
streams that were there when one more was refused.
"""

import asyncio
import json
import sys
import urllib.request
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from casa.atomic import write_text
from casa.provenance import provenance
from projects.loadtest.client import StreamLog, noise, watch

WORDS = {"max_new_tokens": 4, "sampling": {"stop_bias": -50.0}}  # of every frame: what it costs hangs on no picture


@dataclass
class Step:
    """What so many streams came to. late: the median lag is more than one frame's time, or a tenth was dropped."""

    streams: int
    lag: float
    dropped: float
    late: bool


def told(log: StreamLog, since: int, drops: int) -> tuple[list[float], int, int]:
    """Of a stream since a moment: lags, frames watched, frames dropped."""
    return log.lags[since:], len(log.lags) - since, log.dropped - drops


async def ramp(arguments: Namespace) -> dict[str, Any]:
    """One stream more every so many seconds."""
    frames = noise(16, arguments.size, arguments.seed)
    stop = asyncio.Event()
    logs: list[StreamLog] = []
    tasks: list[asyncio.Task[StreamLog]] = []
    steps: list[Step] = []
    refused: str | None = None
    while len(logs) < arguments.streams and refused is None and not (steps and steps[-1].late):
        for _ in range(arguments.each):
            logs.append(StreamLog())
            tasks.append(
                asyncio.create_task(
                    watch(
                        arguments.url,
                        frames,
                        fps=arguments.fps,
                        hello=WORDS,
                        token=arguments.token,
                        log=logs[-1],
                        stop=stop,
                    )
                )
            )
        before = [(len(log.lags), log.dropped) for log in logs]
        await asyncio.sleep(arguments.seconds)
        refused = next((log.refused for log in logs if log.refused is not None), None)
        now = [told(log, *at) for log, at in zip(logs, before, strict=True) if log.refused is None]
        lags = [lag for found, _, _ in now for lag in found]
        watched, dropped = sum(count for _, count, _ in now), sum(count for _, _, count in now)
        share, lag = dropped / max(1, watched + dropped), median(lags) if lags else float("inf")
        steps.append(Step(len(now), round(lag, 3), round(share, 3), lag > 1 / arguments.fps or share > 0.1))
        print(f"{len(now)} streams: lag {lag:.2f} s, {100 * share:.0f} % dropped", file=sys.stderr)
    health = await asyncio.to_thread(_health, arguments.url)
    stop.set()
    await asyncio.gather(*tasks)
    kept = [log for log in logs if log.refused is None]
    good = [step.streams for step in steps if not step.late]
    admitted = (health.get("load") or health).get("sustained_fps")
    return {
        "fps": arguments.fps,
        "size": arguments.size,
        "seed": arguments.seed,
        "streams_in_time": max(good, default=0),
        "streams_by_admission": None if admitted is None else admitted / arguments.fps,
        "refused": refused,
        "steps": [vars(step) for step in steps],
        "frames": sum(log.sent for log in kept),
        "told_twice": sum(log.twice for log in kept),
        "lost": sum(log.lost for log in kept),
    }


def _health(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{urlsplit(url).netloc}/health", timeout=30) as answer:
        return json.load(answer)


def main() -> None:
    parser = ArgumentParser(prog="python -m projects.loadtest", description=__doc__)
    parser.add_argument("url", help="ws://host:port/v1/streams")
    parser.add_argument("--streams", type=int, default=64, help="at most so many")
    parser.add_argument("--each", type=int, default=1, help="streams that begin together")
    parser.add_argument("--seconds", type=float, default=10.0, help="between two of them")
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--size", type=int, default=448, help="sides of a frame in px")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--token")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {"loadtest": urlsplit(arguments.url).path, **provenance(), **asyncio.run(ramp(arguments))}
    text = json.dumps(found, indent=2) + "\n"
    if arguments.out is not None:
        write_text(arguments.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
