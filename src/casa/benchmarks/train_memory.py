"""Memory of a training step of CASA beside insertion: the same model, the same packed batch, image tokens growing.

    step    the peak: of the process on a CPU, of what torch had allocated on CUDA; less what was held before the step
            (the weights, and all that was imported, or is set up by the first step of all, which is a small one). A
            fresh process for each case, since a peak is one per process.
    kept    of that, what the forward pass keeps for the backward one, counted: the same on every machine and device.

A step also holds the gradients of all that is trained and AdamW's moments, of which CASA has more: its own layers'.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from casa.benchmarks.apart import measured_apart, told
from casa.benchmarks.train_models import Case, fresh_model, packed_batch
from casa.errors import UserError
from casa.memory import max_memory_allocated, memory_allocated, peak_resident_bytes, reset_peak_memory
from casa.models import CasaForConditionalGeneration

STEPS = 2  # the second has moments, and meets what the first has left


def measure_step(case: Case) -> dict[str, Any]:
    """Bytes of a training step in this process: `before` it, at its `peak`, and the `step`'s own, the difference; and
    those that are `kept` for the backward pass."""
    device = torch.device(case.device)
    model = fresh_model(case.method, case.shape, case.device, seed=case.seed)
    if case.frozen_tower:
        model.encoder.requires_grad_(False)
    if case.checkpoint_blocks:
        model.gradient_checkpointing_enable()
    batch = packed_batch(case, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    # threads, code and work space of torch's kernels: 50 MiB on a CPU, whatever the step
    warming = packed_batch(replace(case, image_tokens=16 * case.samples, text_tokens=16 * case.samples), model)
    model(**warming, use_cache=False).loss.backward()
    optimiser.zero_grad()
    before = memory_allocated(device)
    reset_peak_memory(device)  # making the model may have held more than a step does
    loss = float("nan")
    for _ in range(STEPS):
        output = model(**batch, use_cache=False)
        output.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        loss = float(output.loss.detach())
    peak = max_memory_allocated(device)
    kept = kept_bytes(model, batch)
    return {"before": before, "peak": peak, "step": peak - before, "kept": kept, "loss": loss}


def kept_bytes(model: CasaForConditionalGeneration, batch: dict[str, Tensor]) -> int:
    """What the forward pass of a batch with labels keeps for the backward one, parameters left out.

    A storage that several operations keep counts once, as a whole.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        # an operation that was handed its own result back would keep itself for ever
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # until the end of the block all of it is held, so no address is used twice
        output = model(**batch, use_cache=False)
    del output
    return sum(kept.values())


def bench_train_memory(
    case: Case, image_tokens: Sequence[int], methods: Sequence[str] = ("casa", "insertion")
) -> dict[str, Any]:
    """Every method at every number of image tokens, each in a process of its own.

    case: the rest of the settings. methods: names of `METHODS`. Raises UserError for a name that is none, if a process
    fails, of memory perhaps, or for fewer than two numbers of image tokens.
    """
    if len(set(image_tokens)) < 2:
        raise UserError("give two or more numbers of image tokens, to see how memory grows.")
    cases = [
        replace(case, method=method, image_tokens=count)
        for count in sorted(set(image_tokens))
        for method in dict.fromkeys(methods)
    ]
    if case.device == "cpu" and not peak_resident_bytes():
        raise UserError("this system does not tell how much memory a process has held; measure on Linux.")
    rows = [{"method": each.method, "image_tokens": each.image_tokens, **_apart(each)} for each in cases]
    return {"case": asdict(case), "rows": rows, **_compared(rows)}


def _compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per method, bytes that each further image token takes at the peak and of what is kept; and, at every number of
    image tokens, how many times as much insertion takes as each of the others."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    growth = {size: {method: _growth(found, size) for method, found in by_method.items()} for size in ("peak", "kept")}
    compared: dict[str, Any] = {
        "bytes_per_image_token": {size: {m: round(value) for m, value in each.items()} for size, each in growth.items()}
    }
    inserted = by_method.pop("insertion", None)
    if inserted is not None:
        compared["insertion_over"] = {method: _over(inserted, found, growth) for method, found in by_method.items()}
    return compared


def _growth(found: list[dict[str, Any]], size: str) -> float:
    """From the fewest image tokens to the most."""
    first, last = found[0], found[-1]
    return (last[size] - first[size]) / (last["image_tokens"] - first["image_tokens"])


def _over(inserted: list[dict[str, Any]], found: list[dict[str, Any]], growth: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(inserted, found, strict=True))
    ratios: dict[str, Any] = {
        size: {str(row["image_tokens"]): round(other[size] / row[size], 2) for other, row in pairs}
        for size in ("step", "kept")
    }
    method = found[0]["method"]
    for size, each in growth.items():
        ratios[f"growth of {size}"] = round(each["insertion"] / each[method], 2) if each[method] > 0 else None
    return ratios


def memory_table(found: dict[str, Any]) -> str:
    """The cases as aligned lines."""
    sizes = {"before": "before", "peak": "peak", "step": "of the step", "kept": "kept for backward"}
    lines = [f"{'image tokens':>12}{'method':>17}" + "".join(f"{title:>19}" for title in sizes.values())]
    for row in found["rows"]:
        shown = "".join(f"{f'{row[key] / 2**20:,.1f} MiB':>19}" for key in sizes)
        lines.append(f"{row['image_tokens']:12,}{row['method']:>17}{shown}")
    growth = found["bytes_per_image_token"]
    for method, peak in growth["peak"].items():
        kept = growth["kept"][method]
        lines.append(f"{method}: {peak / 1024:,.1f} KiB more for each image token, {kept / 1024:,.1f} KiB of them kept")
    return "\n".join(lines)


def _apart(case: Case) -> dict[str, Any]:
    return measured_apart(__name__, asdict(case), f"{case.method} with {case.image_tokens} image tokens")


def child() -> None:
    """What the process of its own does."""
    print(json.dumps(measure_step(Case(**told()))))
