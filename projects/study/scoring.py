"""Held-out questions scored: whether greedy decoding would give the answer word for word, in one pass for many.

An answer is right if every token of it is the likeliest, the stop token too; that is what greedy decoding would say.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from casa.analysis import ablated
from casa.analysis.statistics import Case, set_statistics
from casa.models import CasaForConditionalGeneration
from projects.study.shared import Beginning
from projects.study.tasks import Sample
from projects.study.training import computing

_BATCH, _ROW = 48, 256  # samples of a pass, tokens of a row
PART = 60  # questions of a task on which models with parts taken out are asked
CASES = 16  # of a task, whose attention is looked at


@dataclass(frozen=True)
class Scores:
    """Of questions in order. exact: whether it is answered. log_likelihood: of the answer's tokens, nats, the mean."""

    exact: list[bool]
    log_likelihood: list[float]

    def by_kind(self, samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
        """For a record: by kind of question, a digit 0 or 1 for each, and the mean log-likelihood."""
        found: dict[str, list[int]] = defaultdict(list)
        for number, sample in enumerate(samples):
            found[sample.kind].append(number)
        return {
            kind: {
                "exact": "".join("01"[self.exact[n]] for n in numbers),
                "log_likelihood": round(sum(self.log_likelihood[n] for n in numbers) / len(numbers), 4),
            }
            for kind, numbers in sorted(found.items())
        }

    def by_task(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Share of right answers of each task."""
        found: dict[str, list[bool]] = defaultdict(list)
        for right, sample in zip(self.exact, samples, strict=True):
            found[sample.kind.partition(".")[0]].append(right)
        return {task: round(sum(rights) / len(rights), 4) for task, rights in found.items()}


@torch.no_grad()
def score(model: CasaForConditionalGeneration, beginning: Beginning, samples: Sequence[Sample]) -> Scores:
    """Asks held-out questions, one per sample."""
    writer = beginning.writer(model.gist_ids)
    exact, log_likelihood = [False] * len(samples), [0.0] * len(samples)
    for begin in range(0, len(samples), _BATCH):
        asked = list(samples[begin : begin + _BATCH])
        written = [writer.write(sample) for sample in asked]
        inputs, starts = beginning.inputs(asked, written, "held_out", _ROW)
        del inputs["labels"]
        with computing(model):
            chances = model(**_on(inputs, model.device), use_cache=False).logits.float().log_softmax(-1).cpu()
        for number, row, start in starts:
            chat = written[number]
            learned = torch.tensor([index for index, learn in enumerate(chat.learn) if learn])
            ids = torch.tensor(chat.ids)[learned]
            found = chances[row, start + learned - 1]
            exact[begin + number] = bool((found.argmax(-1) == ids).all())
            log_likelihood[begin + number] = float(found.gather(-1, ids[:, None]).mean())
    return Scores(exact, log_likelihood)


def part_of(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first so many of each task."""
    met: dict[str, int] = defaultdict(int)
    found = []
    for sample in samples:
        task = sample.kind.partition(".")[0]
        met[task] += 1
        if met[task] <= count:
            found.append(sample)
    return found


def ablations_of(model: CasaForConditionalGeneration) -> list[str]:
    """What can be taken out of a model."""
    fusion = model.fusion
    if fusion.method == "insertion":
        return ["no-images"]
    blocks = model.fused_blocks
    layers = [f"without-layers={block}" for block in blocks]
    layers += [f"only-layers={','.join(map(str, blocks[:count]))}" for count in range(1, len(blocks))]
    text = ["no-self-attention", "no-random-text", "no-text"] if fusion.attend == "both" else []
    return ["no-images", *text, *layers]


def inspect(model: CasaForConditionalGeneration, beginning: Beginning, samples: Sequence[Sample]) -> dict[str, Any]:
    """Where a trained model looks, and what it answers without its parts; for its record."""
    asked = part_of(samples, PART)
    found: dict[str, Any] = {"whole": score(model, beginning, asked).by_kind(asked)}
    for name in ablations_of(model):
        with ablated(model, name):
            found[name] = score(model, beginning, asked).by_kind(asked)
    return {"ablations": found, "attention": attention(model, beginning, part_of(samples, CASES))}


def attention(model: CasaForConditionalGeneration, beginning: Beginning, samples: Sequence[Sample]) -> dict[str, Any]:
    """Where answers look in the fusion layers, by layer and head; of self-attention under insertion."""
    writer = beginning.writer(model.gist_ids)
    cases = []
    for sample in samples:
        chat = writer.write(sample)
        inputs, _ = beginning.inputs([sample], [chat], "held_out", len(chat.ids))
        begin = chat.learn.index(True)
        inputs["input_ids"] = inputs["input_ids"][:, :begin]
        for name in ("labels", "position_ids"):
            del inputs[name]
        cases.append(Case(_on(inputs, model.device), chat.ids[begin:], sample.needs_picture))
    with computing(model):
        found = set_statistics(model, cases, layers=False).to_dict()
    return _rounded({name: value for name, value in found.items() if name != "scores"})


def _on(inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
