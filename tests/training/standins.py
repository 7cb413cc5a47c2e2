"""Tiny random models and records that stand in for what recipes name, as folders and files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from casa import adapt
from casa.testing import tiny_backbone, tiny_checkpoint, tiny_encoder, tiny_processor, tiny_text_model
from casa.training.config import ModelSettings
from casa.training.models import load_processor

_SPECIAL = ("<pad>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def text_model(folder: Path) -> Path:
    """A text-only model with its tokenizer."""
    tiny_text_model(dtype=torch.float32).save_pretrained(folder)
    tiny_processor().tokenizer.save_pretrained(folder)
    return folder


def tower(folder: Path) -> Path:
    """An image encoder."""
    tiny_encoder(dtype=torch.float32).save_pretrained(folder)
    return folder


def vlm(folder: Path) -> Path:
    """An insertion VLM of Qwen2.5-VL's family, with tokenizer and template; pictures of at most 64 tokens."""
    model = tiny_backbone("qwen2_5_vl", dtype=torch.float32)
    words = [*_SPECIAL, *"0123456789abcdefghijklmnopqrstuvwxyz .?ABCDEFGH"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(list(_SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", unk_token="?", chat_template=_TEMPLATE
    )
    fast.add_special_tokens({"additional_special_tokens": list(_SPECIAL[2:])})
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 784, "max_pixels": 64 * 784}))
    return folder


def adapted(folder: Path, backbone: Path) -> Path:
    """An insertion VLM with fusion layers, and its processor, as route (b) leaves them."""
    adapt(str(backbone)).save_pretrained(folder)
    load_processor(ModelSettings(backbone=str(backbone))).save_pretrained(folder)
    return folder


def checkpoint(folder: Path) -> Path:
    """A fused model with its processor."""
    return tiny_checkpoint(folder)


def insertion(folder: Path) -> Path:
    """The same by insertion."""
    return tiny_checkpoint(folder, method="insertion")


def pages(folder: Path, count: int = 24, bad: int = 0, name: str = "pages.jsonl") -> Path:
    """A file of chats about drawn pictures, some of them bad; the answer is what the colour says."""
    generator = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for number in range(count):
        red = bool(generator.integers(2))
        sides = [28 * int(side) for side in generator.integers(1, 5, 2)]
        pixels = generator.integers(0, 60, (*sides, 3), dtype=np.uint8)
        pixels[..., 0 if red else 2] += 180
        picture = f"{number}.png"
        Image.fromarray(pixels).save(folder / picture)
        lines.append(
            {
                "messages": [
                    {"role": "user", "content": "<image>" + "which is it? " * int(generator.integers(1, 4))},
                    {"role": "assistant", "content": "red" if red else "blue as the sea"},
                ],
                "images": [picture if number >= bad else "gone.png"],
            }
        )
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
