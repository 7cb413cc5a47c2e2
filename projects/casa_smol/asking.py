"""A model asked: with a picture, without it, with the answer's text in its place; and about text alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from casa.models.backbone_source import load_backbone
from projects.casa_smol.tasks import Turn

WAYS = ("seen", "blind", "told")
PROMPTS = ("What is the capital of France?", "Write a short poem about the sea.", "Add 17 and 25, step by step.")

Question = tuple[Image.Image, Turn]
Answer = Callable[[Sequence[Question], str], list[str]]
"""From questions and one of WAYS to answers."""


class Answering:
    """A model that answers greedily.

    Args:
        eyes: What `casa.load` gives. It keeps what it has made of a picture for the next question about it.
        most_tokens: Of an answer.
        batch: Questions at once.
    """

    def __init__(self, eyes: Any, most_tokens: int = 64, batch: int = 8) -> None:
        self.eyes, self.how = eyes, {"max_new_tokens": most_tokens, "batch_size": batch}

    def __call__(self, questions: Sequence[Question], way: str) -> list[str]:
        if way == "seen":
            pictures, texts = [picture for picture, _ in questions], [turn.question for _, turn in questions]
            return self.eyes.ask(pictures, texts, **self.how)
        texts = [_handed_over(turn) if way == "told" else turn.question for _, turn in questions]
        # without pictures many are the same
        once = list(dict.fromkeys(texts))
        answers = dict(zip(once, self.eyes.ask(None, once, **self.how), strict=True))
        return [answers[text] for text in texts]


def _handed_over(turn: Turn) -> str:
    return f'The picture says "{turn.answer}". {turn.question}'


@torch.no_grad()
def text_only(eyes: Any, source: str) -> dict[str, int]:
    """Of how many prompts without a picture the logits are those of the text model, to the bit.

    Args:
        eyes: What `casa.load` gives.
        source: Folder, package or hub name of the text model.

    Raises:
        UserError: There is no such text model.
    """
    alone: Any = load_backbone(source, dtype=eyes.model.dtype).eval().to(eyes.model.device)
    # on some processors the same product has other last bits where its numbers lie elsewhere in memory
    own = dict(eyes.model.backbone.named_parameters())
    for name, weight in alone.named_parameters():
        if name in own and torch.equal(own[name], weight):
            weight.data = own[name].data
    same = 0
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        inputs = eyes.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = inputs["input_ids"].to(eyes.model.device)
        same += torch.equal(eyes.model(input_ids=ids).logits, alone(input_ids=ids).logits)
    return {"same_logits": same, "prompts": len(PROMPTS)}
