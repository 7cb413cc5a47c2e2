"""`python -m projects.loadtest URL`: streams one after another until captions are late, or some more are refused.

Writes one JSON object: how many streams kept up, what the server's own admission says of that, and how late those were
that had been let in, before others were refused and while they were.
"""

import asyncio
import json
import sys
import urllib.request
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
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
    """What so many streams came to in some seconds.

    lag: median, and worst: the 95th percentile, in seconds. dropped: share of the frames. late: the median lag is more
    than one frame's time, or a tenth was dropped. by_admission: streams that the server says it sustains. refused: why
    another one was not let in.
    """

    streams: int
    lag: float
    worst: float
    dropped: float
    late: bool
    by_admission: float | None
    refused: str | None


class Ramp:
    """Streams that are begun one after another, and what they come to."""

    def __init__(self, arguments: Namespace) -> None:
        self._asked, self._frames = arguments, noise(16, arguments.size, arguments.seed)
        self._stop, self._tasks = asyncio.Event(), []
        self.logs: list[StreamLog] = []
        self.steps: list[Step] = []

    async def run(self) -> None:
        """Ends once captions are late, all streams are there, or so many were refused."""
        asked = self._asked
        while not (self.steps and self.steps[-1].late) and len(self._kept()) < asked.streams:
            await self._step()
            if sum(step.refused is not None for step in self.steps) >= asked.refusals:
                break
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _step(self) -> None:
        asked, old = self._asked, self._kept()
        new = [StreamLog() for _ in range(asked.each)]
        how = {"fps": asked.fps, "hello": WORDS, "token": asked.token, "stop": self._stop}
        self._tasks += [asyncio.create_task(watch(asked.url, self._frames, log=log, **how)) for log in new]
        self.logs += new
        before = [(log, len(log.lags), log.dropped) for log in (*old, *new)]
        await asyncio.sleep(asked.seconds)
        refused = next((log.refused for log in new if log.refused is not None), None)
        now = [(log.lags[since:], log.dropped - drops) for log, since, drops in before if log.refused is None]
        lags, dropped = sorted(lag for found, _ in now for lag in found), sum(drops for _, drops in now)
        lag, share = median(lags) if lags else float("inf"), dropped / max(1, len(lags) + dropped)
        worst = lags[int(0.95 * len(lags))] if lags else lag
        late = lag > 1 / asked.fps or share > 0.1
        sustained = await asyncio.to_thread(_sustained, asked.url)
        able = None if sustained is None else round(sustained / asked.fps, 2)
        self.steps.append(Step(len(now), round(lag, 3), round(worst, 3), round(share, 3), late, able, refused))
        told = "" if refused is None else "; one more was refused"
        print(
            f"{len(now)} streams: lag {lag:.2f} s, {100 * share:.0f} % dropped, {able} by admission{told}",
            file=sys.stderr,
        )

    def _kept(self) -> list[StreamLog]:
        return [log for log in self.logs if log.refused is None]

    def found(self) -> dict[str, Any]:
        """All figures."""
        good = [step for step in self.steps if not step.late]
        refusing = [step for step in self.steps if step.refused is not None]
        before = (
            self.steps[self.steps.index(refusing[0]) - 1] if refusing and refusing[0] is not self.steps[0] else None
        )
        names = ("streams", "lag", "worst", "dropped")
        kept = self._kept()
        return {
            **{name: getattr(self._asked, name) for name in ("fps", "size", "seed")},
            "streams_in_time": max((step.streams for step in good), default=0),
            "streams_by_admission": self.steps[-1].by_admission,
            "refused": refusing[0].refused if refusing else None,
            "old_ones": before
            and {
                "before": {name: getattr(before, name) for name in names},
                "while_refused": {name: median(getattr(step, name) for step in refusing) for name in names},
            },
            "steps": [asdict(step) for step in self.steps],
            "frames": sum(log.sent for log in kept),
            "told_twice": sum(log.twice for log in kept),
            "lost": sum(log.lost for log in kept),
        }


def _sustained(url: str) -> float | None:
    """Frames a second, as the server or the ingress says."""
    with urllib.request.urlopen(f"http://{urlsplit(url).netloc}/health", timeout=30) as answer:
        health = json.load(answer)
    return (health.get("load") or health).get("sustained_fps")


async def _measured(arguments: Namespace) -> dict[str, Any]:
    ramp = Ramp(arguments)
    await ramp.run()
    return ramp.found()


def main() -> None:
    parser = ArgumentParser(prog="python -m projects.loadtest", description=__doc__)
    parser.add_argument("url", help="ws://host:port/v1/streams")
    parser.add_argument("--streams", type=int, default=64, help="at most so many")
    parser.add_argument("--each", type=int, default=1, help="streams that begin together")
    parser.add_argument("--refusals", type=int, default=4, help="that end it")
    parser.add_argument("--seconds", type=float, default=10.0, help="between two of them")
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--size", type=int, default=448, help="sides of a frame in px")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--token")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {"loadtest": urlsplit(arguments.url).path, **provenance(), **asyncio.run(_measured(arguments))}
    text = json.dumps(found, indent=2) + "\n"
    if arguments.out is not None:
        write_text(arguments.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
