"""What a set of questions tells of a model's layers: their gates, what each adds to the score, how widely they look.

Everything is measured on answers that are known, one pass each: the tokens that write the reference, its probability,
and whether greedy decoding would say it word for word (every token of it the likeliest, the stop token too).

Shapes: C layers, Hq query heads, n answered tokens of all questions, R questions.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from casa.analysis.ablations import LAYERED, NamedAblation, ablated, parse_ablation
from casa.analysis.attention_maps import KINDS, AttentionShares, attention_shares
from casa.analysis.inspection import with_answer
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration
from casa.models.image_cache import encode_pixels

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
WITHOUT, ONLY = LAYERED
LOOKS = ("itself", "one other text token", "one image token")
NEEDED = math.log(2)  # a question needs its picture if that makes the reference at least twice as likely


@dataclass(frozen=True)
class Case:
    """A question whose answer is known.

    Attributes:
        inputs: Of the question, one row without padding, up to where the answer begins; with `image_features` in
            place of pixels where they were kept.
        answer: The reference's tokens, with the stop token.
        needs_picture: Whether it can be answered by looking alone; None finds out by hiding the images.
        name: Where it is from.
    """

    inputs: Mapping[str, Any]
    answer: Sequence[int]
    needs_picture: bool | None = None
    name: str = ""


@dataclass(frozen=True)
class ReferenceScore:
    """How well references are said. exact: share of those that greedy decoding says word for word. log_likelihood: nats
    per token, the mean over questions.
    """

    exact: float
    log_likelihood: float


@dataclass
class SetStatistics:
    """What was found.

    Attributes:
        blocks: The block of each layer.
        questions: R.
        tokens: n.
        shares: float64 (4, C, Hq), the mean over tokens, in the order of `KINDS`.
        looks: float64 (3, C, Hq, n), attention to one key of each of `LOOKS`; NaN where there is none.
        entropy: float64 (C, R), of the attention to images, the mean over heads and tokens: 0 for a single token, 1 for
            all alike.
        needs_picture: bool (R,).
        gain: float64 (R,), by how many nats the picture makes the reference likelier.
        scores: By ablation, "" for the whole model.
    """

    blocks: tuple[int, ...]
    questions: int
    tokens: int
    shares: Tensor
    looks: Tensor
    entropy: Tensor
    needs_picture: Tensor
    gain: Tensor
    scores: dict[str, ReferenceScore] = field(default_factory=dict)

    def gate(self) -> Tensor:
        """float64 (C, Hq): median over tokens of log10 of the attention to itself over that to one image token."""
        own, _, image = self.looks.clamp(min=1e-30).log10()
        return (own - image).nanmedian(-1).values

    def quantiles(self) -> Tensor:
        """float64 (3, C, 5): of `looks` over heads and tokens, at `QUANTILES`."""
        at = torch.tensor(QUANTILES, dtype=self.looks.dtype)
        return self.looks.flatten(2).nanquantile(at, dim=-1).permute(1, 2, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those of single tokens; None where there is no number."""
        found = {
            "questions": self.questions,
            "tokens": self.tokens,
            "blocks": list(self.blocks),
            "shares": {kind: one.tolist() for kind, one in zip(KINDS, self.shares, strict=True)},
            "gate_log10": self.gate().tolist(),
            "attention_quantiles": {look: one.tolist() for look, one in zip(LOOKS, self.quantiles(), strict=True)},
            "entropy": self.entropy_by_need(),
            "needs_picture": int(self.needs_picture.sum()),
            "scores": {name or "whole": vars(score) for name, score in self.scores.items()},
        }
        return _without_nan(found)

    def entropy_by_need(self) -> dict[str, list[list[float]]]:
        """Quartiles of each layer's entropy, over questions that need the picture and those that do not; [] of none."""
        at = torch.tensor([0.25, 0.5, 0.75], dtype=self.entropy.dtype)
        groups = {"needed": self.needs_picture, "not needed": ~self.needs_picture}
        return {
            name: self.entropy[:, chosen].nanquantile(at, dim=1).T.tolist() if bool(chosen.any()) else []
            for name, chosen in groups.items()
        }


@torch.no_grad()
def set_statistics(
    model: CasaForConditionalGeneration,
    cases: Iterable[Case],
    *,
    layers: bool = True,
    progress: Callable[[int], None] | None = None,
) -> SetStatistics:
    """Measures a model on a set.

    Args:
        model: Any model of this library.
        cases: Questions with pictures, one by one.
        layers: Also scores the model without each of its fusion layers, and with the first k of them alone, two passes
            more per layer and question. Insertion models have none.
        progress: Is told how many questions are done.

    Returns:
        The statistics, on the CPU.

    Raises:
        UserError: There is no question, or one has no picture.
    """
    ablations = _ablations(model, layers)
    shares: list[Tensor] = []
    looks: list[Tensor] = []
    entropy: list[Tensor] = []
    needs: list[bool] = []
    gain: list[float] = []
    scores: dict[str, list[tuple[bool, float]]] = {"": [], "no-images": [], **{str(one): [] for one in ablations}}
    by_name = {"no-images": parse_ablation("no-images"), **{str(one): one for one in ablations}}
    blocks: tuple[int, ...] = ()
    for case in cases:
        if case.inputs.get("image_positions") is None or not len(case.inputs["image_positions"]):
            raise UserError(f"{case.name or 'a question'} has no picture to look at; leave it out.")
        # no ablation changes what pictures are before text looks at them: they are encoded once
        asked = {name: value.to(model.device) for name, value in case.inputs.items() if name != "pixel_values"}
        start = asked["input_ids"].shape[1]
        encoded = encode_pixels(model, case.inputs) if "pixel_values" in case.inputs else {}
        inputs = with_answer(asked | encoded, case.answer)
        found = attention_shares(model, inputs, range(start - 1, start - 1 + len(case.answer)))
        blocks = found.blocks
        shares.append(found.shares)
        looks.append(_looks(found))
        spread = found.image_entropy() / found.num_image.double().log()
        entropy.append(spread.nanmean((1, 2)))
        for name, kept in scores.items():
            kept.append(_said(model, inputs, start, by_name.get(name)))
        gain.append((scores[""][-1][1] - scores["no-images"][-1][1]) * len(case.answer))
        needs.append(gain[-1] >= NEEDED if case.needs_picture is None else case.needs_picture)
        if progress is not None:
            progress(len(needs))
    if not needs:
        raise UserError("there is no question to measure; give some with pictures and answers.")
    return SetStatistics(
        blocks=blocks,
        questions=len(needs),
        tokens=sum(one.shape[-1] for one in shares),
        shares=torch.cat(shares, -1).mean(-1),
        looks=torch.cat(looks, -1),
        entropy=torch.stack(entropy, 1),
        needs_picture=torch.tensor(needs),
        gain=torch.tensor(gain, dtype=torch.float64),
        scores={
            name: ReferenceScore(*(sum(values) / len(values) for values in zip(*kept, strict=True)))
            for name, kept in scores.items()
        },
    )


def _ablations(model: CasaForConditionalGeneration, layers: bool) -> list[NamedAblation]:
    """What the model is scored without: the implicit gate, and what it is compared with; each fusion layer; all of them
    but none, the first, the first two ...
    """
    blocks = model.fused_blocks
    both = model.fusion.attend == "both" and model.fusion.method != "insertion"
    found = [parse_ablation(name) for name in ("no-self-attention", "no-random-text") if both]
    if layers and model.fusion.method != "insertion":
        found += [NamedAblation(WITHOUT, (block,)) for block in blocks]
        found += [NamedAblation(ONLY, blocks[:count]) for count in range(len(blocks))]
    return found


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _looks(found: AttentionShares) -> Tensor:
    """float64 (3, C, Hq, q): attention to one key of each kind, sinks included."""
    own, other, image = found.heads
    return torch.stack([own, other / found.num_other, image / found.num_image])


def _said(
    model: CasaForConditionalGeneration, inputs: Mapping[str, Any], start: int, without: NamedAblation | None
) -> tuple[bool, float]:
    """Whether greedy decoding says the answer that begins at `start`, and its log-likelihood per token."""
    answer = inputs["input_ids"][0, start:]
    with ablated(model, *([] if without is None else [without])):
        logits = model(**inputs, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
    logits = logits.float().log_softmax(-1)
    chances = logits.gather(-1, answer[:, None])[:, 0]
    return bool((logits.argmax(-1) == answer).all()), float(chances.mean())
