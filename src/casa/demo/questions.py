"""Questions about one frame, and where the model looked while it wrote an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from casa.analysis.attention_maps import AttentionShares, attention_shares
from casa.evaluation.answering import answerer
from casa.models import CasaForConditionalGeneration, CasaProcessor


@dataclass(frozen=True)
class Answered:
    """A question, what the model said, and what is right (None where nobody knows)."""

    question: str
    answer: str
    truth: str | None


@dataclass(frozen=True)
class Look:
    """Where the model looked for one token of an answer.

    shares: of all tokens that write the answer. token: the one that writes `written`, by its index in the text.
    written: the answer with the part that is being written in brackets.
    """

    shares: AttentionShares
    token: int
    written: str


def questions_for(number: str | None) -> list[tuple[str, str | None]]:
    """What is asked about a frame that shows `number` (None: nobody knows what it shows), with the truth."""
    if number is None:
        return [("How many lines are there?", None), ("Read line 1.", None)]
    asked: list[tuple[str, str | None]] = [("Read line 1.", number)]
    asked.append(("How many digits are in line 1?", str(len(number))))
    asked.append((f"What is digit {len(number)} of line 1?", number[-1]))
    return asked


def ask(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    picture: Image.Image,
    asked: Sequence[tuple[str, str | None]],
) -> list[Answered]:
    """Each question by itself about the same picture, answered greedily."""
    texts = answerer(model, processor, max_new_tokens=16)([picture] * len(asked), [question for question, _ in asked])
    return [Answered(question, text, truth) for (question, truth), text in zip(asked, texts, strict=True)]


def look(
    model: CasaForConditionalGeneration, processor: CasaProcessor, picture: Image.Image, answered: Answered
) -> Look:
    """Attention of the tokens that write an answer; the second of them, if there are two, is the one looked into."""
    question = {
        "role": "user",
        "content": [{"type": "image", "image": picture}, {"type": "text", "text": answered.question}],
    }
    said = {"role": "assistant", "content": [{"type": "text", "text": answered.answer}]}
    start = _inputs(processor, [question], True)["input_ids"].shape[1]
    inputs = _inputs(processor, [question, said], False).to(model.device)
    ids = inputs["input_ids"][0, start:].tolist()
    stop = processor.tokenizer.eos_token_id
    length = max(1, ids.index(stop) if stop in ids else len(ids))
    # a token is decided one place before it stands
    shares = attention_shares(model, inputs, range(start - 1, start - 1 + length))
    chosen = min(1, length - 1)
    parts = [
        processor.tokenizer.decode(part) for part in (ids[:chosen], ids[chosen : chosen + 1], ids[chosen + 1 : length])
    ]
    return Look(shares, start - 1 + chosen, f"{parts[0]}[{parts[1]}]{parts[2]}")


def _inputs(processor: CasaProcessor, messages: list[dict[str, Any]], prompt: bool) -> Any:
    return processor.apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=True, return_dict=True, return_tensors="pt"
    )
