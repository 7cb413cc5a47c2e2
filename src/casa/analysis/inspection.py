"""One answer looked into: its tokens, where each looked, what each layer would have said, how large image tokens are.

The answer is written once, greedily. The whole text then goes through the model in one pass, which gives every token
what it had when it was written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from casa.analysis.attention_maps import AttentionShares, attention_shares
from casa.analysis.hidden_states import ImageNorms, LogitLens, image_norms, logit_lens
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.generation import stop_ids


@dataclass(frozen=True)
class InspectedToken:
    """One token of the text. answered: the model wrote it. probability: that it comes here, as the model has it."""

    text: str
    answered: bool
    probability: float


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        question: What was asked.
        answer: What was said, without special tokens.
        pictures: What was shown, as it was given.
        labels: A line about each, such as its time.
        tokens: All tokens of the text.
        shares: Of all tokens from the one before the first picture's text on; a token is written from the place before
            its own.
        lens: Of the same tokens.
        guesses: The texts of the lens's best guesses, by block, token and rank.
        norms: Of the image tokens.
        method: The model's, as `FusionConfig` has it.
    """

    question: str
    answer: str
    pictures: tuple[Image.Image, ...]
    labels: tuple[str, ...]
    tokens: tuple[InspectedToken, ...]
    shares: AttentionShares
    lens: LogitLens
    guesses: list[list[list[str]]]
    norms: ImageNorms
    method: str


def question_inputs(processor: CasaProcessor, pictures: Sequence[Image.Image], question: str) -> dict[str, Any]:
    """The inputs of one user's turn: the pictures, then the question, up to where the answer begins."""
    parts = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    chat = [{"role": "user", "content": parts}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)


def with_answer(inputs: dict[str, Any], answer: Sequence[int]) -> dict[str, Any]:
    """The inputs (one row) with the tokens of an answer behind them."""
    ids = inputs["input_ids"]
    grown = torch.cat([ids, torch.tensor([list(answer)], dtype=ids.dtype, device=ids.device)], dim=1)
    return {**inputs, "input_ids": grown, "attention_mask": torch.ones_like(grown)}


def answer_ids(model: CasaForConditionalGeneration, processor: CasaProcessor, answer: str) -> list[int]:
    """The tokens of an answer that is known, with the stop token that ends it."""
    stops = stop_ids(model, processor.tokenizer)
    return processor.tokenizer(answer, add_special_tokens=False)["input_ids"] + list(stops[:1])


@torch.no_grad()
def inspect_answer(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    pictures: Sequence[Image.Image],
    question: str,
    *,
    answer: str | None = None,
    labels: Sequence[str] = (),
    max_new_tokens: int = 64,
    self_attention: bool = False,
    best: int = 5,
) -> Inspection:
    """Asks a question about pictures and looks into the answer.

    Args:
        model: Any model of this library.
        processor: Its own.
        pictures: In the order in which the model sees them; a film's frames.
        question: The question.
        answer: Looks into these words instead of the model's own.
        labels: A line about each picture.
        max_new_tokens: The longest answer.
        self_attention: Looks into the blocks' own self-attention; see `attention_shares`.
        best: How many guesses of every block are kept.

    Returns:
        What was found.

    Raises:
        UserError: There is no picture, or nothing was answered.
    """
    if not pictures:
        raise UserError("there is nothing to look at; give a picture.")
    given = question_inputs(processor, pictures, question)
    inputs = {name: value.to(model.device) for name, value in given.items()}
    start = inputs["input_ids"].shape[1]
    if answer is None:
        said = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, start:].tolist()
    else:
        said = answer_ids(model, processor, answer)
    inputs = with_answer(inputs, said)
    ids = inputs["input_ids"][0].tolist()
    first = int(inputs["image_positions"][0, 1])
    chosen = list(range(max(0, first - 1), len(ids)))
    logits = model(**inputs, use_cache=False).logits[0].float().log_softmax(-1)
    chances = logits[:-1].gather(-1, inputs["input_ids"][0, 1:, None])[:, 0].exp().tolist()
    lens = logit_lens(model, inputs, chosen, best)
    spell = _Speller(processor)
    return Inspection(
        question=question,
        answer=processor.tokenizer.decode(said, skip_special_tokens=True).strip(),
        pictures=tuple(pictures),
        labels=tuple(labels) or ("",) * len(pictures),
        tokens=tuple(
            InspectedToken(spell(token), place >= start, chance)
            for place, (token, chance) in enumerate(zip(ids, [1.0, *chances], strict=True))
        ),
        shares=attention_shares(model, inputs, chosen, self_attention=self_attention),
        lens=lens,
        guesses=[[[spell(token) for token in best] for best in row] for row in lens.ids.tolist()],
        norms=image_norms(model, inputs),
        method=model.fusion.method,
    )


class _Speller:
    """A token as it stands in a text, kept: the lens asks for the same ones again and again."""

    def __init__(self, processor: CasaProcessor) -> None:
        self._tokenizer = processor.tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._tokenizer.decode([token]) if token < len(self._tokenizer) else f"<{token}>"
        return self._known[token]
