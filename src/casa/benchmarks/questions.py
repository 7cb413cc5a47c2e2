"""A second question about a picture that was looked at: how long until its first token, beside the first question."""

from dataclasses import asdict
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from PIL import Image

from casa.analysis.inspection import question_inputs
from casa.benchmarks.harness import Benchmark, Figures, handwriting, table, take_turns
from casa.benchmarks.settings import QuestionsSettings
from casa.models import CasaForConditionalGeneration, CasaProcessor, ImageCache
from casa.models.auto import load_pretrained
from casa.threads import settle

QUESTIONS = ("Read line 1.", "How many lines are there?")


def bench_questions(settings: QuestionsSettings) -> Benchmark:
    """Asks two questions about pictures, without an `ImageCache`, with one in memory, and with one in a folder.

    A time is from the picture and the words to the first token: processor, image side and prompt. Of the folder, the
    second question is asked by a process that has just begun: nothing is in memory.
    """
    model, processor = load_pretrained(settings.model, settings.device)
    pictures = handwriting(settings.seed, settings.size)

    def round_of(where: str) -> tuple[float, float]:
        picture = next(pictures)
        with TemporaryDirectory() as folder:
            cache = ImageCache.named(folder if where == "folder" else where)
            if cache is not None:  # the weights' digest is made once, when a server starts
                cache.inputs(model, question_inputs(processor, [Image.new("RGB", (32, 32))], "warm"))
            first = _seconds(model, processor, picture, QUESTIONS[0], cache)
            if cache is not None and where == "folder":
                cache.clear()
            return first, _seconds(model, processor, picture, QUESTIONS[1], cache)

    ways = {where: partial(round_of, where) for where in ("off", "memory", "folder")}
    take_turns(ways, 1)
    found: Figures = {}
    for where, rounds in take_turns(ways, settings.rounds).items():
        first, second = ([pair[number] for pair in rounds] for number in (0, 1))
        ratio = median(b / a for a, b in rounds)
        found[where] = {
            "first_ms": round(1000 * median(first), 2),
            "second_ms": round(1000 * median(second), 2),
            "ratio": round(ratio, 3),
        }
    columns = {"kept in": "{where}", "first question": "{first_ms:.1f} ms", "second": "{second_ms:.1f} ms"}
    shown = table([{"where": where, **row} for where, row in found.items()], columns | {"ratio": "{ratio:.3f}"})
    told = {name: value for name, value in asdict(settings).items() if name not in ("model", "device")}
    return Benchmark("questions", told, found, shown, str(model.device), settings.model)


@torch.no_grad()
def _seconds(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    picture: Image.Image,
    question: str,
    cache: ImageCache | None,
) -> float:
    """From a picture and a question to the first token of the answer."""
    settle()
    begun = perf_counter()
    inputs = question_inputs(processor, [picture], question)
    if cache is not None:
        inputs = cache.inputs(model, inputs)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    int(model(**inputs, past_key_values=model.new_cache(), logits_to_keep=1).logits[0, -1].argmax())
    return perf_counter() - begun
