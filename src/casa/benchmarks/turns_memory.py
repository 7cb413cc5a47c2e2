"""Peak memory of the turns, of each method by itself in a process of its own: side by side they would share one peak.

On CUDA it is what torch allocated there at most; on a CPU the most that the process held. Both above what the loaded
model and its first turn leave: loading may have held more than all turns do.
"""

from typing import Any

from casa.analysis.streaming_cost import insertion_twin
from casa.benchmarks.apart import measured_apart, told
from casa.benchmarks.stream import handwriting
from casa.benchmarks.turns import Turns
from casa.memory import max_memory_allocated, memory_allocated, reset_peak_memory
from casa.models.auto import load_pretrained

METHODS = ("casa", "insertion")


def turns_peaks(model: str, device: str, turns: int, tokens: int, size: int, seed: int = 0) -> dict[str, int]:
    """Bytes above the loaded model, per method, over `turns` frames of `size` x `size` px with `tokens` tokens each.

    model: a checkpoint's folder, or casa-tiny. Raises UserError if such a process fails, of memory perhaps.
    """
    return {
        method: measured_apart(__name__, [str(model), device, method, turns, tokens, size, seed], method)
        for method in METHODS
    }


def child() -> None:
    """What the process of its own does: prints its bytes."""
    model, device, method, turns, tokens, size, seed = told()
    loaded, processor = load_pretrained(model, device)
    taken = loaded if method == "casa" else insertion_twin(loaded)
    frames = handwriting(seed, size)
    # what is made at the first time only (kernels, glyphs) is no part of the turns
    Turns(taken, processor, tokens).take(next(frames))
    taker = Turns(taken, processor, tokens)
    reset_peak_memory(loaded.device)
    before = memory_allocated(loaded.device)
    for _ in range(turns):
        taker.take(next(frames))
    print(max_memory_allocated(loaded.device) - before)


def with_peaks(summary: dict[str, Any], peaks: dict[str, int]) -> dict[str, Any]:
    """The summary of the turns, each method's peak in its row."""
    return {name: row | {"peak_bytes": peaks[name]} if name in peaks else row for name, row in summary.items()}
