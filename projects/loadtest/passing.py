"""`python -m projects.loadtest.passing`: what an ingress spends on a frame (ms of a core) and on a stream (bytes).

The replica is a stand-in that answers every frame with a usage event and computes nothing; clients and it have
processes of their own, so the ingress' own time is what its process has used.
"""

import asyncio
import json
import resource
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from websockets.asyncio.server import ServerConnection, serve

from casa.atomic import write_text
from casa.provenance import provenance
from casa.serving import Limits
from casa.serving.ingress import create_ingress
from casa.serving.replicas import Replicas, Report
from casa.serving.server import Server
from projects.loadtest.client import StreamLog, noise, watch


async def replica() -> None:
    """Answers as a replica does; prints its port first."""

    async def handle(socket: ServerConnection) -> None:
        hello = json.loads(await socket.recv())
        await socket.send(json.dumps({"type": "ready", "frame": 0, "fps": hello["fps"]}))
        number = 0
        async for message in socket:
            if isinstance(message, str):
                number = json.loads(message).get("number", number)
                continue
            event = {"type": "usage", "frame": number, "time": 0.0, "lag": 0.0, "dropped": 0, "complete": True}
            await socket.send(json.dumps(event | dict.fromkeys(("watched", "latency", "cache_bytes"), 0)))

    async with serve(handle, "127.0.0.1", 0, max_size=2**23, compression=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def clients(url: str, streams: int, fps: float, seconds: float, size: int) -> list[StreamLog]:
    frames = noise(4, size)
    frames = [frames[number % 4] for number in range(round(fps * seconds))]
    return await asyncio.gather(*(watch(url, frames, fps=fps) for _ in range(streams)))


def measure(streams: int, fps: float, seconds: float, size: int) -> dict[str, Any]:
    """An ingress in this process, between a replica and clients in others."""
    me = [sys.executable, "-m", "projects.loadtest.passing"]
    with subprocess.Popen([*me, "--replica"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        address = f"127.0.0.1:{int(other.stdout.readline())}"
        limits = Limits(connections=streams + 8)
        app = create_ingress(Replicas(lambda: [Report("one", address, 1e9)]), "secret", limits=limits)
        server = Server(app, port=0)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.is_running:
            time.sleep(0.05)
        before, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        url = f"ws://127.0.0.1:{server.port}/v1/streams"
        given = [str(value) for value in (streams, fps, seconds, size)]
        done = subprocess.run([*me, "--clients", url, *given], capture_output=True, text=True, check=True)
        used, most = time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        server.stop()
        thread.join()
        assert other.stdin is not None
        other.stdin.close()
    told = json.loads(done.stdout)
    return {
        "frames": told["frames"],
        "lost": told["lost"],
        "core_ms_a_frame": round(1000 * used / told["frames"], 3),
        "kib_a_stream": round((most - held) / streams),
    }


def main() -> None:
    parser = ArgumentParser(prog="python -m projects.loadtest.passing", description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--replica", action="store_true", help="be the stand-in")
    parser.add_argument("--clients", nargs=5, help="be the clients: url, streams, fps, seconds, size")
    arguments = parser.parse_args()
    if arguments.replica:
        asyncio.run(replica())
        return
    if arguments.clients:
        url, streams, fps, seconds, size = arguments.clients
        logs = asyncio.run(clients(url, int(streams), float(fps), float(seconds), int(size)))
        refused = [log.refused for log in logs if log.refused]
        assert not refused, refused[0]
        print(json.dumps({"frames": sum(len(log.watched) for log in logs), "lost": sum(log.lost for log in logs)}))
        return
    asked = {name: getattr(arguments, name) for name in ("streams", "fps", "seconds", "size")}
    found = {"passing": "casa.serving.ingress", "seed": 0, **asked, **provenance(), **measure(**asked)}
    text = json.dumps(found, indent=2) + "\n"
    if arguments.out is not None:
        write_text(arguments.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
