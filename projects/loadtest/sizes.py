"""`python -m projects.loadtest.sizes`: how many live streams a GPU carries, and what that many ask of the rest.

Worked out and not measured: operations and bytes are those of `casa adapt --dry-run`, the GPU's are its data sheet's,
of which a share is taken. What an ingress spends on a frame is measured (`projects.loadtest.passing`).
"""

import json
import math
from argparse import ArgumentParser
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from casa.analysis.budget import Scene, budgets
from casa.analysis.published_models import SHAPES, shapes_of
from casa.atomic import write_text
from casa.models import FusionConfig
from casa.provenance import provenance


@dataclass(frozen=True)
class Machine:
    """A GPU as its data sheet has it (H100 SXM: dense bf16, HBM3), and what of it is taken for granted.

    share: of its operations that encoders and prompts reach. spare: bytes that are neither weights nor streams.
    """

    flops: float = 989e12
    bytes_a_second: float = 3.35e12
    memory: float = 80e9
    share: float = 0.35
    spare: float = 10e9


@dataclass(frozen=True)
class Stream:
    """One live stream. tokens: said of a frame on average, its delimiters among them. text: the bound on its text."""

    fps: float = 2.0
    side: int = 448
    tokens: int = 6
    text: int = 1024
    frame_file: int = 40_000  # bytes of a JPEG
    save_seconds: float = 10.0


@dataclass(frozen=True)
class Cell:
    """What one Ray cluster is kept below, so that its registry and Ray Serve's controller keep up."""

    replicas: int = 500
    reports: float = 2.0  # a second, of each


def per_gpu(shape: str, machine: Machine, stream: Stream) -> dict[str, Any]:
    """Streams that one GPU carries, by operations and by memory; the smaller counts."""
    scene = Scene(
        stream.side, stream.side, frames=(math.ceil(stream.text / stream.tokens),), text_per_frame=stream.tokens
    )
    config, tower = shapes_of(shape, None, published=True)
    (budget,) = budgets(config, tower, {"CASA ⊕": FusionConfig()}, scene)
    moment = budget.moments[-1]
    state = stream.text * (budget.text_token_bytes + budget.window_token_bytes) + budget.frame_bytes
    room = machine.memory - machine.spare - budget.weight_bytes
    # image encoder and projection are bound by operations, words by reading weights and states
    frame = moment.frame_flops / (machine.share * machine.flops)
    words = stream.tokens * (moment.token_flops / (machine.share * machine.flops) + state / machine.bytes_a_second)
    # a step reads the weights once for each token, however many streams are in it
    weights = stream.fps * stream.tokens * budget.weight_bytes / machine.bytes_a_second
    by_time = (1 - weights) / (stream.fps * (frame + words))
    by_memory = room / state
    return {
        "shape": shape,
        "image_tokens": budget.frame_tokens,
        "weights_gb": round(budget.weight_bytes / 1e9, 1),
        "state_mb": round(state / 1e6, 1),
        "frame_tflop": round(moment.frame_flops / 1e12, 2),
        "frame_ms": round(1000 * frame, 2),
        "words_ms": round(1000 * words, 2),
        "streams_by_time": int(by_time),
        "streams_by_memory": int(by_memory),
        "streams": int(min(by_time, by_memory)),
        "saved_mb_a_second": round(min(by_time, by_memory) * state / stream.save_seconds / 1e6),
    }


def size(streams: int, each: int, stream: Stream, ingress_ms: float, cell: Cell) -> dict[str, Any]:
    """What so many streams need. ingress_ms: of a core, for a frame and its events."""
    gpus = math.ceil(streams / each)
    frames = streams * stream.fps
    return {
        "streams": streams,
        "gpus": gpus,
        "frames_a_second": frames,
        "ingress_cores": math.ceil(frames * ingress_ms / 1000 / 0.7),
        "ingress_gbit_a_second": round(8 * frames * stream.frame_file / 1e9, 2),
        "reports_a_second": round(min(gpus, cell.replicas) * cell.reports),
        "cells": math.ceil(gpus / cell.replicas),
    }


def main() -> None:
    parser = ArgumentParser(prog="python -m projects.loadtest.sizes", description=__doc__)
    parser.add_argument("--shapes", default="qwen2_5-vl-3b,qwen2_5-vl-7b,helium-2b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--passing", type=Path, required=True, help="the record of projects.loadtest.passing")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    machine, stream, cell = Machine(), Stream(), Cell()
    ingress_ms = json.loads(arguments.passing.read_text(encoding="utf-8"))["core_ms_a_frame"]
    gpus = [per_gpu(shape, machine, stream) for shape in arguments.shapes.split(",")]
    each = gpus[0]["streams"]
    counts = (each, 10 * each, 10_000, 100_000, 1_000_000)
    found = {
        "sizes": arguments.shapes,
        "seed": 0,
        **provenance(),
        "machine": asdict(machine),
        "stream": asdict(stream),
        "cell": asdict(cell),
        "ingress_ms_a_frame": ingress_ms,
        "per_gpu": gpus,
        "sizes_of_the_first": [size(count, each, stream, ingress_ms, cell) for count in counts],
    }
    text = json.dumps(found, indent=2) + "\n"
    if arguments.out is not None:
        write_text(arguments.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
