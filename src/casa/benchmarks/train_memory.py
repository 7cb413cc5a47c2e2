"""Peak memory of a training step of CASA beside insertion: the same model, the same packed batch, image tokens growing.

Each case is a fresh process, since a peak is one per process. On a CPU it is the most that the process held (on CUDA,
that torch had allocated), less what it held before the step: the weights, and on both all that was imported.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from casa.benchmarks.apart import measured_apart, told
from casa.benchmarks.host_memory import forget_peak, held_bytes, most_bytes, peak_bytes
from casa.benchmarks.train_models import METHODS, Case, fresh_model, packed_batch
from casa.errors import UserError

STEPS = 2  # the second has moments, and meets what the first has left


def measure_step(case: Case) -> dict[str, Any]:
    """Bytes of a training step in this process: `before` it, at its `peak`, and the `step`'s own, the difference."""
    device = torch.device(case.device)
    model = fresh_model(case.method, case.shape, case.device, seed=case.seed)
    if case.frozen_tower:
        model.encoder.requires_grad_(False)
    if case.checkpoint_blocks:
        model.gradient_checkpointing_enable()
    batch = packed_batch(case, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    before = held_bytes(device)
    forget_peak(device)  # making the model may have held more than a step does
    loss = float("nan")
    for _ in range(STEPS):
        output = model(**batch, use_cache=False)
        output.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        loss = float(output.loss.detach())
    peak = most_bytes(device)
    return {"before": before, "peak": peak, "step": peak - before, "loss": loss}


def bench_train_memory(case: Case, image_tokens: Sequence[int]) -> dict[str, Any]:
    """Every method at every number of image tokens, each in a process of its own.

    case: the rest of the settings. Raises UserError if a process fails, of memory perhaps, or for fewer than two
    numbers of image tokens.
    """
    if len(set(image_tokens)) < 2:
        raise UserError("give two or more numbers of image tokens, to see how memory grows.")
    cases = [
        replace(case, method=method, image_tokens=count) for count in sorted(set(image_tokens)) for method in METHODS
    ]
    if case.device == "cpu" and not peak_bytes():
        raise UserError("this system does not tell how much memory a process has held; measure on Linux.")
    rows = [{"method": each.method, "image_tokens": each.image_tokens, **_apart(each)} for each in cases]
    return {"case": asdict(case), "rows": rows, **_compared(rows)}


def _compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per method, bytes that each further image token takes; and insertion's peak over CASA's at every number."""
    by_method = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    growth = {}
    for method, found in by_method.items():
        first, last = found[0], found[-1]
        growth[method] = (last["peak"] - first["peak"]) / (last["image_tokens"] - first["image_tokens"])
    pairs = list(zip(by_method["casa"], by_method["insertion"], strict=True))
    return {
        "bytes_per_image_token": {method: round(value) for method, value in growth.items()},
        "insertion_over_casa": {
            "step": {str(casa["image_tokens"]): round(other["step"] / casa["step"], 2) for casa, other in pairs},
            "growth": round(growth["insertion"] / growth["casa"], 2) if growth["casa"] > 0 else None,
        },
    }


def memory_table(found: dict[str, Any]) -> str:
    """The cases as aligned lines."""
    lines = [f"{'image tokens':>12}{'method':>12}{'before':>12}{'peak':>12}{'of the step':>14}"]
    for row in found["rows"]:
        sizes = (f"{row[key] / 2**20:,.0f} MiB" for key in ("before", "peak", "step"))
        before, peak, step = sizes
        lines.append(f"{row['image_tokens']:12,}{row['method']:>12}{before:>12}{peak:>12}{step:>14}")
    for method, count in found["bytes_per_image_token"].items():
        lines.append(f"{method}: {count / 1024:,.1f} KiB more for each image token")
    return "\n".join(lines)


def _apart(case: Case) -> dict[str, Any]:
    return measured_apart(__name__, asdict(case), f"{case.method} with {case.image_tokens} image tokens")


def child() -> None:
    """What the process of its own does."""
    print(json.dumps(measure_step(Case(**told()))))
