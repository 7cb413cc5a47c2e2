"""Stage `text`: a small Llama model learns the tasks' own text, without pictures.

It learns how questions and answers are worded and how a dialogue goes; what an answer says it can only guess until it
sees. The documents are the texts of examples whose pictures are thrown away.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from casa.errors import UserError
from casa.evaluation.stream import PROMPT
from projects.casa_tiny.chat import ChatTokens, Writer, build_tokenizer, pack
from projects.casa_tiny.recipe import CELL, Recipe
from projects.casa_tiny.stage import train_stage
from projects.casa_tiny.tasks import CLIPS, PICTURES, SIDES

_SIDE = 8 * CELL  # small pictures are quick to draw, and long lines still fit


class Document(NamedTuple):
    """What is said about one example: turns about a picture, or the captions of a clip."""

    turns: tuple[tuple[str, str], ...] = ()
    captions: tuple[str, ...] = ()

    def texts(self) -> Iterator[str]:
        """All that is said."""
        yield from (text for turn in self.turns for text in turn)
        if self.captions:
            yield from (PROMPT, *filter(None, self.captions))


def train_text(recipe: Recipe, out: Path, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Makes the tokenizer and trains the model; writes both to `out/text`."""
    stage = recipe.text
    documents = [draw_document(recipe.seed, number) for number in range(stage.documents)]
    tokenizer = build_tokenizer([text for document in documents for text in document.texts()], stage.vocabulary)
    model = new_text_model(recipe, tokenizer)
    writer = Writer(tokenizer)

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        for step in range(start, stage.optimisation.steps):
            rng = np.random.default_rng([recipe.seed, 5, step])
            samples = [_sample(documents, writer, stage.max_turns, rng) for _ in range(stage.samples)]
            longest = max(len(sample.ids) for sample in samples)
            yield pack(samples, max(stage.row_tokens, longest), cast(int, tokenizer.pad_token_id)).inputs

    def save(folder: Path) -> None:
        model.config.use_cache = True
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    train_stage(recipe, "text", model, batches, out, save, callbacks)


def new_text_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama model with fresh weights.

    Raises:
        UserError: Its settings do not fit together.
    """
    given = {"max_position_embeddings": 8192, "tie_word_embeddings": True, **recipe.text.model}
    ids = {"eos_token_id": cast(int, tokenizer.eos_token_id), "pad_token_id": cast(int, tokenizer.pad_token_id)}
    try:
        # a few ids stay unused: multiples of 8 multiply faster
        config = LlamaConfig(vocab_size=-(-len(tokenizer) // 8) * 8, bos_token_id=None, **ids, **given)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"text.model does not make a Llama model: {str(error).strip().splitlines()[-1].strip()}"
        ) from error
    config._attn_implementation = "sdpa"
    torch.manual_seed(recipe.seed + 1)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids, max_new_tokens=32)
    return model


def draw_document(seed: int, number: int) -> Document:
    """Document number n: of each source that has text in turn."""
    rng = np.random.default_rng([seed, 1, number])
    names = [*PICTURES, *CLIPS]
    for offset in range(len(names)):
        name = names[(number + offset) % len(names)]
        if name in CLIPS:
            return Document(captions=tuple(CLIPS[name](rng).captions()))
        least, greatest = SIDES[name]
        side = min(max(least, _SIDE), greatest)
        if turns := PICTURES[name](rng, (side, side)).turns:
            return Document(turns=tuple((turn.question, turn.answer) for turn in turns))
    raise AssertionError("no source has text")


def _sample(documents: Sequence[Document], writer: Writer, max_turns: int, rng: np.random.Generator) -> ChatTokens:
    document = documents[int(rng.integers(len(documents)))]
    if document.captions:
        return writer.clip(PROMPT, document.captions).as_text()
    count = int(rng.integers(1, max_turns + 1))
    order = rng.permutation(len(document.turns))[:count]
    return writer.dialogue([document.turns[int(i)] for i in order]).as_text()
