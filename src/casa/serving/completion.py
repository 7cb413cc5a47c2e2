"""One chat completion, token by token, in slices, on the model's own thread.

Shapes: V vocabulary; n pictures with P patches and N image tokens in all.

    prompt, tokenized -> one picture after another, encoded -> the text read -> token, token, ...
    `-- a slice ends after any of these, so that streams wait for one picture at most --------´
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.loading import sentence_of
from casa.models.stopping import stop_ids
from casa.serving.chat_request import ChatRequest, RequestError
from casa.serving.detokenizer import Detokenizer, begun
from casa.vision import token_grids


@dataclass(frozen=True)
class Piece:
    """What is new. finish: "stop" or "length" in the last one. error: in place of all else."""

    text: str = ""
    finish: str | None = None
    error: Exception | None = None


class Completion:
    """tell: called with every piece, from the model's thread. cancelled: to be set when nobody listens any more."""

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        request: ChatRequest,
        most_prompt: int,
        tell: Callable[[Piece], None],
    ) -> None:
        self._model, self._processor, self._request = model, processor, request
        self._most_prompt, self._tell = most_prompt, tell
        self._generator = torch.Generator().manual_seed(request.seed)
        self._stops = frozenset(stop_ids(model, processor.tokenizer))
        self._text = Detokenizer(processor.tokenizer)
        self._inputs: dict[str, Any] | None = None
        self._patches: list[Tensor] = []  # of the pictures that are not encoded yet
        self._features: list[Tensor] = []
        self._cache: Any = None
        self._tokens: list[int] = []
        self._given = 0  # characters
        self.prompt_tokens = 0
        self.cancelled = False

    @property
    def completion_tokens(self) -> int:
        return len(self._tokens)

    @torch.no_grad()
    def advance(self, until: float) -> bool:
        """Goes on until that moment; True once the answer is whole, or nobody wants it."""
        while not self.cancelled:
            if self._inputs is None:
                self._inputs = self._tokenized()
            elif self._patches:
                self._look(self._inputs["image_grid_thw"])
            elif self._say(self._inputs):
                return True
            if monotonic() >= until:
                return False
        return True

    def fail(self, error: Exception) -> None:
        self._tell(Piece(error=error))

    def _tokenized(self) -> dict[str, Any]:
        """The model's inputs, without the pixels: they go into `_patches`, one picture each."""
        try:
            written = self._processor.apply_chat_template(
                self._request.messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        except TemplateError as error:  # of several families: roles must take turns
            refused = f"the model's chat template refuses this chat: {sentence_of(error)}"
            raise RequestError(refused, "messages", "invalid_value") from error
        inputs = dict(written.to(self._model.device))
        self.prompt_tokens = inputs["input_ids"].shape[1] + self._image_tokens(inputs)
        if self.prompt_tokens > self._most_prompt:
            raise RequestError(
                f"the chat has {self.prompt_tokens} tokens, but at most {self._most_prompt} are taken; shorten it.",
                "messages",
                "context_length_exceeded",
            )
        # one row has no padding
        inputs.pop("attention_mask", None)
        if "image_grid_thw" in inputs:
            counts = inputs["image_grid_thw"].prod(-1).tolist()
            self._patches = list(inputs.pop("pixel_values").split(counts))
        return inputs

    def _image_tokens(self, inputs: dict[str, Any]) -> int:
        if "image_grid_thw" not in inputs:
            return 0
        return sum(h * w for h, w in token_grids(self._model.config.encoder_config, inputs["image_grid_thw"]))

    def _look(self, grids: Tensor) -> None:
        """Encodes the next picture. grids: (n, 3), of all of them."""
        which = len(self._features)
        self._features.append(self._model.encode_images(self._patches.pop(0), grids[which : which + 1]))

    def _say(self, inputs: dict[str, Any]) -> bool:
        """Chooses the next token, and tells it; True if it was the last one."""
        if self._cache is None:
            self._cache = self._model.new_cache()
            if self._features:
                inputs = inputs | {"image_features": torch.cat(self._features)}
                self._features.clear()
        else:
            inputs = {"input_ids": torch.tensor([[self._tokens[-1]]], device=self._model.device)}
        logits = self._model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        return self._take(self._request.sampling.pick(logits, self._tokens, self._generator, self._stops))

    def _take(self, token: int) -> bool:
        """Tells what a token adds; True if it was the last one."""
        ended = token in self._stops
        if not ended:
            self._tokens.append(token)
        full = len(self._tokens) == self._request.max_tokens
        last = ended or full
        text = self._text.whole(self._tokens) if last else self._text.settled(self._tokens)
        cut = min((at for stop in self._request.stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            text, ended, last = text[:cut], True, True
        ready = len(text) if last else len(text) - max((begun(text, stop) for stop in self._request.stop), default=0)
        if last or ready > self._given:
            finish = ("stop" if ended else "length") if last else None
            self._tell(Piece(text[self._given : ready], finish))
            self._given = ready
        return last
