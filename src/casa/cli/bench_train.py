"""`casa bench train`: what training takes, and what packing saves."""

from typing import Annotated, Any

import typer

from casa.cli.bench_options import Device, Json, Out, report
from casa.errors import UserError

PARTS = ("memory", "throughput", "packing")


def train(
    parts: Annotated[str, typer.Option(help=f"What to measure, with commas: {', '.join(PARTS)}.")] = ",".join(PARTS),
    shape: Annotated[str, typer.Option(help="tiny, or a published shape such as helium-2b or qwen2_5-vl-3b.")] = "tiny",
    image_tokens: Annotated[
        str, typer.Option(help="Image tokens of the packed row whose memory is measured, with commas.")
    ] = "256,1024,4096",
    methods: Annotated[
        str,
        typer.Option(
            help="Whose memory, with commas: casa, before, replace, update_images, cross_attention, insertion."
        ),
    ] = "casa,insertion",
    text_tokens: Annotated[int, typer.Option(help="Text tokens of that row.")] = 256,
    samples: Annotated[int, typer.Option(help="Samples of that row, one picture each.")] = 4,
    checkpoint_blocks: Annotated[
        bool, typer.Option("--checkpoint-blocks", help="Run blocks again in the backward pass.")
    ] = False,
    frozen_tower: Annotated[bool, typer.Option("--frozen-tower", help="Train all but the image encoder.")] = False,
    drawn: Annotated[int, typer.Option(help="Samples to go through packed and padded.")] = 64,
    rounds: Annotated[int, typer.Option(help="Passes over them; medians are printed.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of weights, samples and lengths.")] = 0,
    device: Device = "auto",
    json: Json = False,
    out: Out = None,
) -> None:
    """Memory of a training step beside insertion, samples a second packed and padded, how full packs are.

    Example: casa bench train --out train.json

    Example: casa bench train --parts memory --shape helium-2b --text-tokens 2048 --image-tokens 5120,20480
    """
    from casa.models.auto import pick_device
    from casa.provenance import provenance

    chosen = [part.strip() for part in parts.split(",")]
    if unknown := [part for part in chosen if part not in PARTS]:
        raise UserError(f"--parts has {unknown[0]!r}; the parts are: {', '.join(PARTS)}.")
    where = str(pick_device(device))
    record: dict[str, Any] = {"bench": "train", "seed": seed, **provenance(where)}
    tables = []
    if "memory" in chosen:
        from casa.benchmarks.train_memory import bench_train_memory, memory_table
        from casa.benchmarks.train_models import Case

        counts = _numbers(image_tokens)
        names = [name.strip() for name in methods.split(",")]
        case = Case(names[0], counts[0], text_tokens, samples, shape, where, checkpoint_blocks, frozen_tower, seed)
        record["memory"] = bench_train_memory(case, counts, names)
        tables.append(memory_table(record["memory"]))
    if "throughput" in chosen:
        from casa.benchmarks.train_throughput import bench_throughput, throughput_table

        record["throughput"] = bench_throughput(drawn, rounds, shape=shape, device=where, seed=seed)
        tables.append(throughput_table(record["throughput"]))
    if "packing" in chosen:
        from casa.benchmarks.train_packing import bench_packing, packing_table

        record["packing"] = bench_packing(seed=seed)
        tables.append(packing_table(record["packing"]))
    report(record, "\n\n".join(tables), json, out)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--image-tokens {text!r} is not made of whole numbers.") from None
