"""`casa ask`: one question about one picture, or several."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from casa.cli.options import Temperature, TopK, TopP
from casa.errors import UserError


def ask(
    words: Annotated[
        list[str], typer.Argument(metavar="[MODEL] PICTURE... QUESTION", help="MODEL is casa-tiny if left out.")
    ],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws; another each time if left out.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a question about a picture, or about several in their order; prints the bare answer.

    Example: casa ask casa-tiny page.png "Read line 2."

    Example: casa ask ./my-casa before.png after.png "What has changed?" --temperature 0.7 --seed 1
    """
    name, pictures, question = _sorted(words)
    from casa.evaluation.answering import answerer
    from casa.media import open_picture
    from casa.streaming import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    images = [open_picture(picture) for picture in pictures]
    from casa.models.auto import load_pretrained

    model, processor = load_pretrained(name, device)
    answer = answerer(model, processor, max_new_tokens, sampling, seed)([images], [question])[0]
    print(json_module.dumps({"question": question, "answer": answer}, ensure_ascii=False) if json else answer)


def _sorted(words: list[str]) -> tuple[str, list[str], str]:
    """The model, the pictures and the question. A model is a name or a folder: a file that comes first is none."""
    if len(words) < 2:
        raise UserError('ask takes a picture and a question: casa ask casa-tiny page.png "Read line 2."')
    *named, question = words
    if len(named) > 1 and not _is_picture(named[0]):
        return named[0], named[1:], question
    return "casa-tiny", named, question


def _is_picture(name: str) -> bool:
    from PIL import Image

    # by its ending if it is not there, so that a slip in its name is told as one
    endings = {*Image.registered_extensions(), ".heic", ".heif"}
    return Path(name).is_file() or Path(name).suffix.lower() in endings
