"""`python -m projects.loadtest.single`: what the server of one machine takes to begin, and to answer, beside others.

    here       this code, with Ray installed
    no ray     this code, where no Ray can be found
    COMMIT     that commit's code (--before), such as the last one without replicas

Each way is a `casa serve` of its own; they take turns. No library of Ray may be in a server's memory.
"""

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from casa.atomic import write_text
from casa.provenance import provenance
from projects.loadtest.client import noise, watch

SOURCE = Path(__file__).parents[2] / "src"
RUN = "import sys; {hide}sys.argv = ['casa', 'serve', '{model}', '--port', '0']; from casa.cli.main import run; run()"
HIDE = "sys.modules['ray'] = None; "  # as `import` finds it where a package is not installed


@contextmanager
def server(source: Path, hide: bool, model: str) -> Iterator[tuple[str, int, float]]:
    """A running one: its address, its process, and when it was begun."""
    begun = time.perf_counter()
    run = RUN.format(hide=HIDE if hide else "", model=model)
    environment = {**os.environ, "PYTHONPATH": str(source)}
    with subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://(\S+?)/", process.stdout.readline())
            assert found is not None, "the server has not begun"
            yield found[1], process.pid, begun
        finally:
            process.terminate()


def first_token(address: str, picture: bytes) -> float:
    """Seconds from a chat about a picture to the first words of its answer."""
    shown = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(picture).decode()}}
    content = [shown, {"type": "text", "text": "Read line 1."}]
    body = {"model": "casa-tiny", "messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": 4}
    asked = urllib.request.Request(
        f"http://{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begun = time.perf_counter()
    with urllib.request.urlopen(asked, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return time.perf_counter() - begun
    raise AssertionError("there was no answer")


def measure(source: Path, hide: bool, arguments: Any, number: int) -> dict[str, float]:
    """One server's figures, in seconds."""
    pictures = noise(2 * arguments.answers + 1, arguments.size, 1000 * number + arguments.seed)
    with server(source, hide, arguments.model) as (address, process, begun):
        urllib.request.urlopen(f"http://{address}/", timeout=120).close()
        found = {"page": time.perf_counter() - begun}
        first_token(address, pictures.pop())
        found["first_answer"] = time.perf_counter() - begun
        frames, chats = pictures[: arguments.answers], pictures[arguments.answers :]
        found["token"] = median(first_token(address, picture) for picture in chats)
        log = asyncio.run(watch(f"ws://{address}/v1/streams", frames, fps=1.0, hello={"max_new_tokens": 4}))
        found["caption"] = median(log.lags)
        maps = Path(f"/proc/{process}/maps").read_text(encoding="utf-8")
        assert "_raylet" not in maps, "Ray is in the memory of a server of one machine"
    return found


def main() -> None:
    parser = ArgumentParser(prog="python -m projects.loadtest.single", description=__doc__)
    parser.add_argument("--model", default="casa-tiny")
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=8, help="chats, and frames, of each round")
    parser.add_argument("--size", type=int, default=224, help="sides of a picture in px")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ways = {"here": (SOURCE, False), "no ray": (SOURCE, True)}
        if arguments.before:
            packed = subprocess.run(
                ["git", "-C", str(SOURCE.parent), "archive", arguments.before, "src"],
                stdout=subprocess.PIPE,
                check=True,
            )
            subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
            ways[arguments.before] = (Path(folder) / "src", False)
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for number in range(arguments.rounds):
            for way, (source, hide) in ways.items():
                rounds[way].append(measure(source, hide, arguments, number))
                print(f"{way}: {rounds[way][-1]}", file=sys.stderr)
    found = {
        way: {name: round(median(one[name] for one in those), 3) for name in those[0]} for way, those in rounds.items()
    }
    asked = {name: getattr(arguments, name) for name in ("model", "rounds", "answers", "size", "seed")}
    facts = {"single": "casa serve", **asked, **provenance(model=asked["model"])}
    text = json.dumps({**facts, "seconds": found}, indent=2) + "\n"
    if arguments.out is not None:
        write_text(arguments.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
