"""`casa inspect`: one answer looked into, as a page; or a whole set of questions, as tables and plots."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casa.cli.ask import sort_words
from casa.cli.options import (
    SHAPES,
    Column,
    DataSplit,
    Device,
    Outside,
    Root,
    Shape,
    Subset,
    console,
    name_bad,
    pairs,
    progress_line,
    table,
)
from casa.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from casa.analysis.statistics import Case, SetStatistics
    from casa.pipeline import CasaPipeline

FILMS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".ts", ".mpg", ".mpeg")


def inspect(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] [PICTURE... QUESTION]", help="MODEL is casa-tiny if left out."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Instead of pictures and a question: a file of questions with their answers.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page to write, inspect.html; of --data, the folder inspect.")
    ] = None,
    answer: Annotated[str | None, typer.Option(help="Look into these words instead of the model's own.")] = None,
    self_attention: Annotated[
        bool, typer.Option("--self-attention", help="Look into the text model's own self-attention instead.")
    ] = False,
    max_frames: Annotated[int, typer.Option(min=1, help="The most frames of a film, evenly chosen.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    layers: Annotated[bool, typer.Option(help="Of --data: score without each layer, and with the first k.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of --data.")] = None,
    shape: Shape = SHAPES[0],
    root: Root = None,
    outside: Outside = False,
    column: Column = None,
    fps: Annotated[float, typer.Option(help="Frames per second that are looked at, of films.")] = 1.0,
    split: DataSplit = "train",
    subset: Subset = None,
    device: Device = "auto",
) -> None:
    """Ask about pictures or a film and write a page that shows where every token of the answer looked; or measure a
    model's layers on a set of questions.

    Example: casa inspect casa-tiny page.png "Read line 2." --out report.html

    Example: casa inspect ./my-casa film.mp4 "What happens?" --fps 2

    Example: casa inspect casa-tiny --data qa.jsonl --limit 200 --out statistics
    """
    if data is not None:
        source = {"path": data, "shape": shape, "root": root, "outside": outside, "fps": fps, "split": split}
        source |= {"subset": subset, "columns": pairs(column, "--column", "image=photo")}
        if len(words or []) > 1:
            raise UserError("--data has pictures and questions of its own; name the model alone before it.")
        _inspect_set((words or ["casa-tiny"])[0], source, limit, layers, out or Path("inspect"), device)
        return
    name, shown, question = sort_words(words or [], "inspect")
    from casa.analysis.inspect_page import write_inspection
    from casa.analysis.inspection import inspect_answer
    from casa.atomic import check_writable
    from casa.figures import check_page_path
    from casa.pipeline import load

    out = out or Path("inspect.html")
    check_page_path(out)
    check_writable(out)
    pictures, labels = _pictures(shown, fps, max_frames)
    eyes = load(name, device=device)
    found = inspect_answer(
        eyes.model,
        eyes.processor,
        pictures,
        question,
        answer=answer,
        labels=labels,
        max_new_tokens=max_new_tokens,
        self_attention=self_attention,
    )
    write_inspection(out, found, model=name)
    print(f"{found.answer}\n{out}: where each of its tokens looked.")


def _inspect_set(name: str, source: dict[str, Any], limit: int | None, layers: bool, folder: Path, device: str) -> None:
    from casa.analysis.set_plots import write_statistics
    from casa.analysis.statistics import set_statistics
    from casa.figures import new_figure
    from casa.pipeline import load
    from casa.provenance import provenance

    new_figure(1, 1)  # without matplotlib this is said before the hours of a measurement
    folder.mkdir(parents=True, exist_ok=True)
    eyes = load(name, device=device)
    left_out: list[str] = []
    with progress_line("{:,} questions measured") as show:
        cases = _cases(eyes, source, limit, left_out)
        found = set_statistics(eyes.model, cases, layers=layers, progress=show)
    name_bad(left_out, " are left out")
    facts = {"inspect": name, "data": source["path"], "limit": limit, "seed": None, "left_out": len(left_out)}
    files = write_statistics(folder, found, facts | provenance(str(eyes.model.device), name))
    _show(found)
    print(f"{folder}: " + ", ".join(file.name for file in files))


def _cases(eyes: "CasaPipeline", source: dict[str, Any], limit: int | None, left_out: list[str]) -> "Iterator[Case]":
    """The questions that have pictures; sentences about the others go to `left_out`."""
    from casa.analysis.inspection import answer_ids
    from casa.analysis.statistics import Case
    from casa.data import SourceSettings
    from casa.data.pictures import open_one
    from casa.data.record import BadRecord, Picture
    from casa.evaluation.questions import BadQuestion, read_questions
    from casa.settings import build

    sources = [build(SourceSettings, source, "data")]
    for question in read_questions(sources, limit=limit, known=("needs_picture",)):
        if isinstance(question, BadQuestion):
            left_out.append(f"{question.record}: {question.bad}")
            continue
        if question.is_live or not question.pictures:
            left_out.append(f"{question.record}: {'a live record' if question.is_live else 'no picture'}, left out.")
            continue
        try:
            chat = [
                {
                    "role": message.role,
                    "content": [
                        {"type": "image", "image": open_one(part)}
                        if isinstance(part, Picture)
                        else {"type": "text", "text": part.text}
                        for part in message.parts
                    ],
                }
                for message in question.messages
            ]
        except BadRecord as bad:
            left_out.append(f"{question.record}: {bad}")
            continue
        inputs = eyes.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        answer = answer_ids(eyes.model, eyes.processor, question.references[0])
        yield Case(dict(inputs), answer, question.row.get("needs_picture"), question.record)


def _show(found: "SetStatistics") -> None:
    from casa.analysis.attention_maps import KINDS

    shown = console(width=120)
    needed = int(found.needs_picture.sum())
    shown.print(f"{found.questions:,} questions, {found.tokens:,} answered tokens; {needed:,} need the picture")
    blocks = table("block", *KINDS, "gate, log10", "entropy needed", "not needed")
    spread = found.entropy_by_need()
    for layer, block in enumerate(found.blocks):
        shares = [f"{float(one[layer].mean()):.1%}" for one in found.shares]
        middles = [f"{of[layer][1]:.2f}" if of else "-" for of in (spread["needed"], spread["not needed"])]
        blocks.add_row(str(block), *shares, f"{float(found.gate()[layer].median()):+.2f}", *middles)
    shown.print(blocks)
    scores = table("model", "word for word", "nats per token")
    for name, score in found.scores.items():
        scores.add_row(name or "whole", f"{score.exact:.1%}", f"{score.log_likelihood:+.3f}")
    shown.print(scores)


def _pictures(names: list[str], fps: float, most: int) -> tuple[list["Image.Image"], list[str]]:
    """The pictures, with a line about each; a film stands for its frames."""
    from casa.media import open_picture, open_source
    from casa.media.pictures import as_picture

    pictures, labels = [], []
    for name in names:
        if Path(name).suffix.lower() not in FILMS:
            pictures.append(open_picture(name))
            labels.append(Path(name).name)
            continue
        kept, stride = [], 1
        with open_source(name, fps) as frames:
            for frame in frames:
                if frame.index % stride == 0:
                    kept.append((frame.time, frame.picture))
                if len(kept) == 2 * most:
                    # a long film is not held whole
                    kept, stride = kept[::2], 2 * stride
        if not kept:
            raise UserError(f"{name} has no frame at {fps} frames a second; give a larger fps.", field="fps")
        count = min(most, len(kept))
        kept = [kept[number * len(kept) // count] for number in range(count)]
        pictures += [as_picture(picture) for _, picture in kept]
        labels += [f"{time:.1f} s" for time, _ in kept]
    return pictures, labels
