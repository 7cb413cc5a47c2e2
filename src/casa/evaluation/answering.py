"""Answers of a model to questions about pictures, in batches, greedily unless asked otherwise."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import Sampling
from casa.threads import settle


def answerer(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    seed: int | None = None,
) -> Callable[[Sequence[Image.Image | Sequence[Image.Image]], Sequence[str]], list[str]]:
    """A function from pictures and questions, one picture (or a list of them) and one question per answer, to the bare
    answers.

    sampling: its temperature, top_k and top_p; greedy if None. seed: of the draws of each call; another each time if
    None. torch's own random numbers stay as they were.
    """

    speaker: Any = model
    picked: dict[str, Any] = {"do_sample": False}
    if sampling is not None and sampling.temperature:
        picked = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")} | {"do_sample": True}

    @torch.no_grad()
    def answer(pictures: Sequence[Image.Image | Sequence[Image.Image]], questions: Sequence[str]) -> list[str]:
        settle()
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": picture} for picture in _listed(shown)),
                        {"type": "text", "text": question},
                    ],
                }
            ]
            for shown, question in zip(pictures, questions, strict=True)
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if picked["do_sample"]:
                torch.manual_seed(torch.seed() if seed is None else seed)
            tokens = speaker.generate(**inputs, max_new_tokens=max_new_tokens, **picked)
        fresh = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.tokenizer.batch_decode(fresh, skip_special_tokens=True)]

    return answer


def _listed(shown: Image.Image | Sequence[Image.Image]) -> Sequence[Image.Image]:
    return [shown] if isinstance(shown, Image.Image) else shown
