"""`casa ask`: one question about one picture."""

import json as json_module
from typing import Annotated

import typer

from casa.errors import UserError


def ask(
    words: Annotated[list[str], typer.Argument(metavar="[MODEL] PICTURE QUESTION", help="casa-tiny if left out.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a question about a picture; prints the bare answer.

    Example: casa ask casa-tiny page.png "Read line 2."
    """
    if len(words) not in (2, 3):
        raise UserError('ask takes a picture and a question: casa ask casa-tiny page.png "Read line 2."')
    name, picture, question = words if len(words) == 3 else ("casa-tiny", *words)
    from casa.evaluation.answering import answerer
    from casa.media import open_picture

    image = open_picture(picture)
    from casa.models.at_hand import load_at_hand

    model, processor = load_at_hand(name, device)
    answer = answerer(model, processor, max_new_tokens)([image], [question])[0]
    print(json_module.dumps({"question": question, "answer": answer}, ensure_ascii=False) if json else answer)
