"""Answers of a model to questions about pictures, in batches, greedily."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from casa.evaluation.runner import Answerer
from casa.models import CasaForConditionalGeneration, CasaProcessor


def answerer(model: CasaForConditionalGeneration, processor: CasaProcessor, max_new_tokens: int = 64) -> Answerer:
    """A function from pictures and questions, one of each per answer, to the bare answers."""

    speaker: Any = model

    @torch.no_grad()
    def answer(pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}],
                }
            ]
            for picture, question in zip(pictures, questions, strict=True)
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        tokens = speaker.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        fresh = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.tokenizer.batch_decode(fresh, skip_special_tokens=True)]

    return answer
