"""What a model answers on held-out pictures, beside what it answers without them.

    python -m projects.casa_smol.evaluation runs/casa-smol/final --count 100 --out docs/results/casa-smol.json

Three ways: "seen" with the picture; "blind" without it, which shows what can be guessed; "told" with the answer's text
handed over in place of the picture, which shows what the language model alone would miss.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from casa import CasaForConditionalGeneration, CasaProcessor
from casa.atomic import write_text
from casa.provenance import provenance
from projects.casa_smol.metrics import MEASURES, anls, characters, exact, relaxed, verbatim
from projects.casa_smol.tasks import BROWSED, TASKS, Browser, Turn, asked

WAYS = ("seen", "blind", "told")
MEASURE = {"exact": exact, "relaxed": relaxed, "verbatim": verbatim, "anls": anls}


class Answering:
    """A model and its processor, answering one question at a time, greedily."""

    def __init__(self, folder: str, dtype: torch.dtype = torch.bfloat16, most_tokens: int = 48) -> None:
        self.model: Any = CasaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.processor: Any = CasaProcessor.from_pretrained(folder)
        self.most_tokens = most_tokens

    @torch.no_grad()
    def __call__(self, picture: Any, turn: Turn, way: str) -> str:
        """The answer to a turn in one of WAYS."""
        content: list[dict[str, Any]] = [{"type": "text", "text": turn.question}]
        if way == "seen":
            content.insert(0, {"type": "image", "image": picture})
        elif way == "told":
            content.insert(0, {"type": "text", "text": f'The picture says "{turn.answer}". '})
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        made = self.model.generate(**inputs, max_new_tokens=self.most_tokens, do_sample=False)
        return self.processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def evaluate(answer: Any, tasks: Sequence[str], count: int, seed: int, ways: Sequence[str] = WAYS) -> dict[str, Any]:
    """Scores by task and way: the task's own measure, ANLS and the error rate of characters, over `count` questions.

    answer: called with a picture, a turn and a way. Of each picture at most two questions are asked.
    """
    found: dict[str, Any] = {}
    browser = Browser() if any(task in BROWSED for task in tasks) else None
    if browser is not None:
        browser.__enter__()
    try:
        for task in tasks:
            drawn = asked(task, "held_out", seed, count, browser=browser)
            questions = list(islice(((one.picture, turn) for one in drawn for turn in one.turns[:2]), count))
            found[task] = {way: _scores(task, answer, questions, way) for way in ways}
    finally:
        if browser is not None:
            browser.__exit__(None, None, None)
    return found


def _scores(task: str, answer: Any, questions: Sequence[tuple[Any, Turn]], way: str) -> dict[str, float]:
    said = [(answer(picture, turn, way), turn.answers) for picture, turn in questions]
    errors, length = (sum(part) for part in zip(*(characters(*one) for one in said), strict=True))
    name = MEASURES.get(task, "exact")
    means = {measure: sum(MEASURE[measure](*one) for one in said) / len(said) for measure in (name, "anls")}
    return {measure: round(value, 4) for measure, value in means.items()} | {
        "character_error_rate": round(errors / max(1, length), 4),
        "questions": len(said),
    }


def main(arguments: list[str]) -> int:
    """Evaluates a model's folder."""
    parser = argparse.ArgumentParser(description="Asks a model about held-out pictures.")
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--count", type=int, default=100, help="questions of each task")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args(arguments)
    found = evaluate(Answering(given.model), given.tasks, given.count, given.seed, given.ways)
    for task, ways in found.items():
        print(task, json.dumps(ways))
    if given.out is not None:
        told = {"model": given.model, "seed": given.seed, "scores": found} | provenance()
        write_text(given.out, json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
