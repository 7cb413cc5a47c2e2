"""`casa`: the verbs, and how an error the user can cause becomes one sentence and exit status 2."""

import logging
import re
import sys
from io import TextIOWrapper

import typer
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

import casa
from casa.cli import adapt, ask, bench, data, evaluate, inspect, live, train
from casa.errors import UserError
from casa.threads import share_cores

EXTRAS = {"accelerate": "train", "peft": "train"}  # what is imported where it is used, and the extra that has it
STOPPED = (129, 130, 143)  # the exit status of a closed terminal, of Ctrl-C, of SIGTERM

app = typer.Typer(
    name="casa",
    help="Eyes for language models: cross-attention via self-attention.\n\n"
    'Example: casa ask casa-tiny page.png "Read line 2."',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (ask.demo, ask.ask, inspect.inspect, live.caption, adapt.adapt, train.train, train.export, live.serve):
    app.command(verb.__name__)(verb)
app.command("eval")(evaluate.evaluate)
app.add_typer(bench.bench_app, name="bench")
app.add_typer(data.data_app, name="data")


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"casa {casa.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_tell_version, is_eager=True),
) -> None:
    """Read by `run`, before any verb."""


def run() -> None:
    """The `casa` program."""
    share_cores()
    if isinstance(sys.stdout, TextIOWrapper):
        # a caption that the terminal or file has no letters for, as on Windows, must not end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    # where it is installed, PEFT loads it, and it asks for kernels that nothing here needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    debug = "--debug" in sys.argv[1:]
    # the flag is understood anywhere on the line
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except Exception as error:
        lacks_extra = isinstance(error, ModuleNotFoundError) and error.name in EXTRAS
        if debug or not (isinstance(error, (UserError, OSError)) or _lacks_memory(error) or lacks_extra):
            raise
        print(f"casa: {_sentence(error, arguments)}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        # Typer makes 130 of Ctrl-C, and says nothing
        if end.code in STOPPED:
            print("casa: stopped.", file=sys.stderr)
        raise


def _sentence(error: BaseException, arguments: list[str]) -> str:
    if isinstance(error, UserError):
        return with_flags(error, arguments)
    if isinstance(error, ModuleNotFoundError):
        return f"this needs {error.name}: install casa-vlm[{EXTRAS[error.name or '']}]."
    if _lacks_memory(error):
        return "there is not enough memory; use a smaller picture, batch or model."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return str(error) or type(error).__name__


def with_flags(error: UserError, arguments: list[str]) -> str:
    """The sentence of an error, with its fields written as the options of the verb that was called."""
    command = get_command(app)
    for word in arguments:
        if isinstance(command, TyperGroup) and word in command.commands:
            command = command.commands[word]
    options = {option.name: option for option in command.params if isinstance(option, TyperOption)}
    sentence = str(error)
    for field in error.fields:
        if (option := options.get(field)) is not None:
            given = rf"(?<![\w.-]){field}(?:=(True|False|'[^']*'|[\d.]*\d))?(?![\w=])"
            sentence = re.sub(given, lambda found, option=option: _flag(option, found[1]), sentence)
    return sentence


def _flag(option: TyperOption, value: str | None) -> str:
    if value == "False" and option.secondary_opts:
        return option.secondary_opts[0]
    return option.opts[0] if value in (None, "True") else f"{option.opts[0]} {value.strip(chr(39))}"


def _lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's (by name, since this file does without torch), or that of torch's
    tensors, which is a RuntimeError like any other but for its words.
    """
    if isinstance(error, MemoryError) or "OutOfMemoryError" in (kind.__name__ for kind in type(error).__mro__):
        return True
    words = ("can't allocate memory", "not enough memory: you tried")  # the second on Windows
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
