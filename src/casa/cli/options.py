"""Options that have one meaning for every verb, and what verbs print and read alike."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from casa.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LISTED = 5  # bad records that are named on the terminal
DTYPES = ("bfloat16", "float16", "float32")


def writable(path: Path | None) -> Path | None:
    """An option's file, once it is known that it can be written: before the hours of a measurement, not after."""
    from casa.atomic import check_writable

    check_writable(path)
    return path


def numbers(text: str, option: str, separator: str = ",") -> list[int]:
    """Whole numbers with a separator between them. Raises UserError, which names the option."""
    try:
        return [int(part) for part in text.split(separator)]
    except ValueError:
        raise UserError(f"{option} {text!r} is not made of whole numbers.") from None


def pairs(given: list[str] | None, option: str, example: str) -> dict[str, str]:
    """What stands before and behind the "=" of each word given. Raises UserError, which names the option."""
    found = {}
    for word in given or ():
        known, equals, actual = word.partition("=")
        if not (known and equals and actual):
            raise UserError(f"{option} {word!r} names nothing; write it as in {example}.")
        found[known] = actual
    return found


def console(width: int = 160) -> "Console":
    """A terminal as it is; in a file there is no edge to break lines at, and `width` is taken."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(width=width, highlight=False)


def table(first: str, *columns: str) -> "Table":
    """A plain table, of whose columns all but the first have numbers."""
    from rich.table import Table

    found = Table(first, box=None, pad_edge=False, header_style="dim")
    for name in columns:
        found.add_column(name, justify="right")
    return found


@contextmanager
def progress_line(form: str, title: str = "") -> Iterator[Callable[..., None]]:
    """Gives what shows its values in one line of stderr, which stays in place; nothing where that is no terminal."""
    shown = sys.stderr.isatty()

    def show(*values: object) -> None:
        if shown:
            print(f"\r{title + form.format(*values):<79}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if shown:
            print(file=sys.stderr)


def name_bad(sentences: Sequence[str], where: str = "") -> None:
    """Prints the first sentences of what is left out, on stderr, and how many more there are."""
    for sentence in sentences[:LISTED]:
        print(f"casa: {sentence}", file=sys.stderr)
    if len(sentences) > LISTED:
        print(f"casa: and {len(sentences) - LISTED:,} more{where}.", file=sys.stderr)


Model = Annotated[str, typer.Argument(help="A checkpoint's folder, or casa-tiny.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps (Apple's GPU, not taken by auto).")]
Weights = Annotated[
    Literal["own", "int8"], typer.Option(help="own: as they were saved; int8: smaller and faster, nearly the same.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ImageCache = Annotated[
    str, typer.Option(metavar="WHERE", help="Pictures that were looked at are kept in: memory, a folder, or off.")
]
Out = Annotated[Path | None, typer.Option(help="Write the JSON here too, with commit and versions.", callback=writable)]
# how words are picked and how long they are remembered: see casa.streaming.Sampling and StreamingSession
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens of the longest caption or answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above, words are drawn.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability in all.")]
Repetition = Annotated[float, typer.Option(help="Taken from a token's score for each time it was said; 0: nothing.")]
Decay = Annotated[float, typer.Option(help="How much of a saying counts one token later, for --repetition.")]
NoRepeatNgramSize = Annotated[int, typer.Option(help="No run of so many tokens is said twice; 0: allowed.")]
StopBias = Annotated[float, typer.Option(help="Added to the stop token's score; above 0 says less.")]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
MaxTextTokens = Annotated[int, typer.Option(min=0, help="Bound on the text remembered, in tokens; 0: none.")]
# where records are read: see casa.data.SourceSettings, whose shapes these are; it is not loaded for a help text
SHAPES = (
    *("auto", "chat", "llava", "finevision", "llava-video", "live-whisperx", "vqa", "prompt-completion"),
    "caption",
)
Shape = Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")]
Root = Annotated[str | None, typer.Option(help="Where relative picture paths start.")]
Outside = Annotated[bool, typer.Option("--outside", help="Paths may lead out of the root.")]
Column = Annotated[list[str] | None, typer.Option(help="Its name here and in the data: image=photo.")]
VideoFps = Annotated[float, typer.Option(help="Frames of a video looked at per second.")]
DataSplit = Annotated[str, typer.Option(help="Of a hub data set, or of a saved DatasetDict.")]
Subset = Annotated[str | None, typer.Option(help="Of a hub data set.")]
