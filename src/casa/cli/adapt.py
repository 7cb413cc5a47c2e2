"""`casa adapt`: gives a language model eyes, ready to be trained; or says what that would cost, from configs alone."""

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from casa.cli.options import DTYPES, console, numbers
from casa.errors import UserError

DRY = "With --dry-run: "


def adapt(
    backbone: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a language model (or its .gguf file), a vision-language model, or casa's insertion model."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the new model; of a dry run, a .json file for its figures.")
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="Folder of an image encoder, or of a model with one; for text-only backbones.")
    ] = None,
    every: Annotated[int | None, typer.Option(help="A layer in every n-th block.")] = None,
    compressor: Annotated[
        list[str] | None,
        typer.Option(help="Fewer image tokens: pool:2, pixel_shuffle:2, q_former:32. Dry runs compare several."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any field of FusionConfig, such as method=insertion; repeatable."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; the checkpoint's if left out.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "2GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what every method costs; make no model.")] = False,
    shape: Annotated[str | None, typer.Option(help=f"{DRY}a published model's shape instead of a folder.")] = None,
    image_size: Annotated[str, typer.Option(help=f"{DRY}a frame's side, or HEIGHTxWIDTH, in pixels.")] = "896",
    frames: Annotated[str, typer.Option(help=f"{DRY}after how many frames to look, with commas.")] = "1,256",
    text_per_frame: Annotated[int, typer.Option(help=f"{DRY}text tokens of a turn.")] = 18,
    json: Annotated[bool, typer.Option("--json", help=f"{DRY}print one JSON object.")] = False,
) -> None:
    """Join a language model and an image tower; the new layers start as copies of self-attention.

    Example: casa adapt ./my-llama --vision ./my-tower --out ./my-casa

    Example: casa adapt --dry-run --shape qwen2_5-vl-3b
    """
    choices: dict[str, object] = {} if every is None else {"every": every}
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of: {', '.join(DTYPES)}.")
    choices |= _settings(set_ or (), choices)
    if dry_run:
        size = numbers(image_size, "--image-size", "x")
        if len(size) > 2:
            raise UserError(f"--image-size {image_size!r} is not a side or HEIGHTxWIDTH.")
        if out is not None and (out.suffix != ".json" or out.is_dir()):
            raise UserError(f"a dry run makes no model; --out {out} must name a .json file for its figures.")
        scene = {"image_size": [size[0], size[-1]], "frames": numbers(frames, "--frames")}
        scene |= {"text_per_frame": text_per_frame, "dtype": dtype or "bfloat16"}
        _estimate(backbone, shape, vision, choices, compressor or [], scene, json, out)
        return
    if shape is not None or json:
        raise UserError("--shape and --json are for --dry-run; add it, or leave them out.")
    if backbone is None or out is None:
        raise UserError("adapt takes a model's folder and one for the result: casa adapt ./my-llama --out ./my-casa")
    if len(compressor or ()) > 1:
        raise UserError("a model has one compressor; give --compressor once.")
    if compressor:
        choices["compressor"] = compressor[0]
    _convert(backbone, out, vision, choices, dtype, max_shard_size)


def _convert(
    backbone: str, out: Path, vision: str | None, choices: dict[str, object], dtype: str | None, max_shard_size: str
) -> None:
    import torch

    from casa.models import CasaConfig, FusionConfig
    from casa.models.adapt import ADDED
    from casa.models.auto import auto_processor
    from casa.models.convert import check_new, convert
    from casa.models.loading import quietly, read_config
    from casa.settings import build

    check_new(out)
    fusion: FusionConfig = build(FusionConfig, choices, what="the fusion")
    with quietly(reports=False):
        # first, so that a folder without a tokenizer is refused before gigabytes are copied
        processor = auto_processor(backbone, vision, fusion.gist, "add --vision with its folder")
        model = convert(
            backbone,
            out,
            fusion,
            vision,
            None if dtype is None else getattr(torch, dtype),
            max_shard_size=max_shard_size,
            beside=processor.save_pretrained,
        )
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    # an insertion model of casa's own brings its projector along
    added = ("casa_layers",) if isinstance(read_config(backbone), CasaConfig) else ADDED
    new = sum(count for name, count in sizes.items() if name.split(".")[0] in added)
    layers = list(model.fused_blocks)
    print(f"{out}: {sum(sizes.values()):,} parameters, {new:,} of them new; blocks with a fusion layer: {layers}")


def _estimate(
    backbone: str | None,
    shape: str | None,
    vision: str | None,
    choices: dict[str, object],
    compressors: list[str],
    scene: dict[str, Any],
    json: bool,
    out: Path | None,
) -> None:
    import torch

    from casa.analysis.budget import Scene, budgets, tables, variants
    from casa.analysis.published_models import SHAPES, shapes_of
    from casa.atomic import write_text
    from casa.models import FusionConfig
    from casa.provenance import provenance
    from casa.settings import build

    name = backbone if backbone is not None else shape
    if name is None or (backbone is not None and shape is not None):
        raise UserError(f"a dry run takes a model's folder, its config.json, or one --shape of: {', '.join(SHAPES)}.")
    size, text, dtype = scene["image_size"], scene["text_per_frame"], scene["dtype"]
    watched = Scene(size[0], size[1], tuple(scene["frames"]), text, dtype=getattr(torch, dtype))
    yours = build(FusionConfig, choices, what="the fusion") if choices else None
    config, tower = shapes_of(name, vision, published=shape is not None)
    found = budgets(config, tower, variants(compressors, yours), watched)
    record = {"dry_run": name, "scene": scene, **provenance(), "methods": [budget.to_dict() for budget in found]}
    if out is not None:
        write_text(out, json_module.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if json:
        print(json_module.dumps(record, ensure_ascii=False))
        return
    shown = console()
    shown.print(f"{name}: frames of {size[0]} x {size[1]} px, {text} text tokens each, {dtype}\n")
    shown.print(tables(found))


def _settings(pairs: Sequence[str], others: dict[str, object]) -> dict[str, object]:
    """The KEY=VALUE pairs of --set, as YAML reads the values."""
    import yaml

    found: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise UserError(f"--set {pair!r} is no setting; write it as in --set every=4.")
        if key in found or key in others:
            raise UserError(f"{key} is given twice; leave one out.")
        if key == "layers":
            found[key] = tuple(numbers(text.strip("[]()"), "--set layers"))
            continue
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            found[key] = text
    return found
