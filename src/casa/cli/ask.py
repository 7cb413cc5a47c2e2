"""`casa ask`: one question about one picture, or several. `casa demo`: the shipped model on the shipped film."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from casa.cli.options import Device, ImageCache, Json, Temperature, TopK, TopP, Weights, writable
from casa.errors import UserError


def ask(
    words: Annotated[
        list[str], typer.Argument(metavar="[MODEL] PICTURE... QUESTION", help="MODEL is casa-tiny if left out.")
    ],
    device: Device = "auto",
    weights: Weights = "own",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws; another each time if left out.")] = None,
    image_cache: ImageCache = "off",
    json: Json = False,
) -> None:
    """Answer a question about a picture, or about several in their order; prints the bare answer.

    Example: casa ask casa-tiny page.png "Read line 2."

    Example: casa ask ./my-casa before.png after.png "What has changed?" --temperature 0.7 --seed 1
    """
    name, pictures, question = sort_words(words)
    from casa.media import open_picture
    from casa.pipeline import load
    from casa.streaming import Sampling

    # what is wrong with them is said before a model is read
    Sampling(temperature, top_k, top_p)
    images = [open_picture(picture) for picture in pictures]
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    eyes = load(name, device=device, weights=weights, image_cache=image_cache)
    answer = eyes.ask(images, question, max_new_tokens=max_new_tokens, **drawn)
    print(json_module.dumps({"question": question, "answer": answer}, ensure_ascii=False) if json else answer)


def sort_words(words: list[str], verb: str = "ask") -> tuple[str, list[str], str]:
    """The model, the pictures and the question. A model is a name or a folder: a file that comes first is none."""
    if len(words) < 2:
        raise UserError(f'{verb} takes a picture and a question: casa {verb} casa-tiny page.png "Read line 2."')
    *named, question = words
    if len(named) > 1 and not _is_picture(named[0]):
        return named[0], named[1:], question
    return "casa-tiny", named, question


def _is_picture(name: str) -> bool:
    from PIL import Image

    # by its ending if it is not there, so that a slip in its name is told as one
    endings = {*Image.registered_extensions(), ".heic", ".heif"}
    return Path(name).is_file() or Path(name).suffix.lower() in endings


def demo(
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("demo"),
    video: Annotated[Path | None, typer.Option(help="Your own video; the shipped film if left out.")] = None,
    model: Annotated[str, typer.Option(help="A checkpoint's folder, or casa-tiny.")] = "casa-tiny",
    record: Annotated[
        Path | None, typer.Option(help="Write the figures to this .json file too.", callback=writable)
    ] = None,
) -> None:
    """Watch a video as if live, ask about one frame, and write captions, captioned video and plots.

    Example: casa demo --out demo --video my.mp4
    """
    from casa.atomic import write_text
    from casa.demo import run_demo
    from casa.provenance import provenance

    found = run_demo(model, video=video, out=out)
    if record is not None:
        shown = {"demo": str(video or "the shipped film"), "model": model, "seed": found.seed}
        facts = {**shown, **provenance(model=model), **found.figures()}
        write_text(record, json_module.dumps(facts, indent=2) + "\n")
