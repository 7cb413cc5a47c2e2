"""Peak memory of the turns, of each method by itself in a process of its own: side by side they would share one peak.

On CUDA it is what torch allocated there at most; on a CPU the most that the process held. Both above what the loaded
model takes.
"""

import json
import subprocess
import sys
from typing import Any

import torch

from casa.analysis.streaming_cost import insertion_twin
from casa.benchmarks.host_memory import peak_bytes, resident_bytes
from casa.benchmarks.stream import handwriting
from casa.benchmarks.turns import Turns
from casa.errors import UserError
from casa.models.at_hand import load_at_hand

METHODS = ("casa", "insertion")


def turns_peaks(model: str, device: str, turns: int, tokens: int, size: int, seed: int = 0) -> dict[str, int]:
    """Bytes above the loaded model, per method, over `turns` frames of `size` x `size` px with `tokens` tokens each.

    model: a checkpoint's folder, or casa-tiny. Raises UserError if such a process fails, of memory perhaps.
    """
    found = {}
    for method in METHODS:
        given = json.dumps([str(model), device, method, turns, tokens, size, seed])
        command = [sys.executable, "-c", "from casa.benchmarks.turns_memory import child; child()", given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"{method} in a process of its own failed: {done.stderr.strip()[-300:]}")
        found[method] = int(done.stdout)
    return found


def child() -> None:
    """What the process of its own does: prints its bytes."""
    model, device, method, turns, tokens, size, seed = json.loads(sys.argv[1])
    loaded, processor = load_at_hand(model, device)
    taker = Turns(loaded if method == "casa" else insertion_twin(loaded), processor, tokens)
    frames = handwriting(seed, size)
    first = next(frames)
    before = _held(loaded.device)
    taker.take(first)
    for _ in range(turns - 1):
        taker.take(next(frames))
    print(_peak(loaded.device) - before)


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


def with_peaks(summary: dict[str, Any], peaks: dict[str, int]) -> dict[str, Any]:
    """The summary of the turns, each method's peak in its row."""
    return {name: row | {"peak_bytes": peaks[name]} if name in peaks else row for name, row in summary.items()}
