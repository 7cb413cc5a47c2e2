"""Questions a second, as `casa eval` asks them and one at a time, with one and with several questions a picture."""

from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from casa.analysis.inspection import question_inputs
from casa.benchmarks.harness import Benchmark, Figures, handwriting, table, take_turns
from casa.benchmarks.settings import EvalSettings
from casa.data.record import Message, Picture, Text
from casa.evaluation.answering import Answerer
from casa.evaluation.questions import AnswerSettings, Question
from casa.media import open_picture
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.auto import load_pretrained
from casa.threads import settle

QUESTIONS = (
    "Read line 1.",
    "How many lines are there?",
    "What is digit 1 of line 1?",
    "How many digits are in line 1?",
    "Read the last line.",
)


def bench_eval(settings: EvalSettings) -> Benchmark:
    """Asks both ways in turn, over the same pictures on disk. Opening them counts; nothing is kept between rounds.

    Args:
        settings: How many pictures, questions and rounds.

    Returns:
        Rows by questions a picture. `same` is the share of questions that both ways answer alike; in float32 a tie may
        be broken otherwise.
    """
    model, processor = load_pretrained(settings.model, settings.device)
    rows = []
    with TemporaryDirectory() as folder:
        files = []
        for number, picture in enumerate(islice(handwriting(settings.seed, settings.size), settings.pictures)):
            files.append(Path(folder) / f"{number}.png")
            picture.save(files[-1])
        for count in settings.questions:
            asked = _questions(files, count)
            ways = {"alone": lambda asked=asked: _alone(model, processor, asked, settings)}
            ways["batched"] = lambda asked=asked: _batched(model, processor, asked, settings)
            take_turns(ways, 1)
            found = take_turns(ways, settings.rounds)
            took = {way: median(seconds for seconds, _ in turns) for way, turns in found.items()}
            ratios = [a[0] / b[0] for a, b in zip(found["alone"], found["batched"], strict=True)]
            pairs = zip(found["alone"][0][1], found["batched"][0][1], strict=True)
            rows.append(
                {
                    "questions_per_picture": count,
                    "questions": len(asked),
                    "alone_per_s": round(len(asked) / took["alone"], 3),
                    "batched_per_s": round(len(asked) / took["batched"], 3),
                    "ratio": round(median(ratios), 3),
                    "same": round(sum(one == other for one, other in pairs) / len(asked), 4),
                }
            )
    told: Figures = {name: value for name, value in asdict(settings).items() if name not in ("model", "device")}
    columns = {
        "a picture": "{questions_per_picture}",
        "one at a time": "{alone_per_s:.2f} a second",
        "in batches": "{batched_per_s:.2f} a second",
        "times faster": "{ratio:.2f}",
        "same answers": "{same:.1%}",
    }
    return Benchmark("eval", told, {"rows": rows}, table(rows, columns), str(model.device), settings.model)


def _questions(files: list[Path], count: int) -> list[Question]:
    pairs = [(file, text) for file in files for text in islice(cycle(QUESTIONS), count)]
    return [
        Question(number, file.name, 1, (Message("user", (Picture(file), Text(text))),), ("",))
        for number, (file, text) in enumerate(pairs)
    ]


Taken = tuple[float, list[str]]  # seconds, and the answers


@torch.no_grad()
def _alone(
    model: CasaForConditionalGeneration, processor: CasaProcessor, asked: list[Question], settings: EvalSettings
) -> Taken:
    """Each question by itself, its picture opened and looked at anew."""
    began, answers = perf_counter(), []
    for one in asked:
        settle()
        inputs = question_inputs(processor, [open_picture(one.keys[0])], one.text)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        tokens = model.generate(**inputs, max_new_tokens=settings.tokens, do_sample=False)
        said = tokens[0, inputs["input_ids"].shape[1] :]
        answers.append(str(processor.tokenizer.decode(said, skip_special_tokens=True)).strip())
    return perf_counter() - began, answers


def _batched(
    model: CasaForConditionalGeneration, processor: CasaProcessor, asked: list[Question], settings: EvalSettings
) -> Taken:
    began = perf_counter()
    chosen = AnswerSettings(max_new_tokens=settings.tokens, batch_size=settings.batch_size)
    answerer = Answerer(model, processor, chosen)
    found: dict[int, str] = {}
    for batch in answerer.batches(asked):
        found |= {one.index: str(answer) for one, answer in zip(batch, answerer.answer(batch), strict=True)}
    return perf_counter() - began, [found[one.index] for one in asked]
