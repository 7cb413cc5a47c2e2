"""One chat completion, token by token, in slices, on the model's own thread.

Shapes: V vocabulary.

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
from casa.models.generation import stop_ids
from casa.models.image_tokens import count_tokens
from casa.models.loading import sentence_of
from casa.serving.chat_request import ChatRequest, RequestError
from casa.serving.detokenizer import Detokenizer, begun
from casa.vision import token_grids

LEAST = -9999.0  # what the OpenAI interface says for a log-probability too small to tell


@dataclass(frozen=True)
class Piece:
    """What is new in one of the answers. finish: "stop" or "length" in its last one. error: in place of all else.

    logprobs: the tokens of this text as the OpenAI interface tells them, where they were asked for.
    """

    text: str = ""
    finish: str | None = None
    error: Exception | None = None
    index: int = 0
    logprobs: list[dict[str, Any]] | None = None


class _Choice:
    """One of the answers to a request. given: characters told so far. untold: (where its text begins, token) of each
    token whose log-probabilities are still to be told.
    """

    def __init__(self, index: int, seed: int) -> None:
        self.index = index
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens: list[int] = []
        self.given = self.settled = 0
        self.untold: list[tuple[int, dict[str, Any]]] = []


class Completion:
    """tell: called with every piece, from the model's thread. cancelled: to be set when nobody listens any more.

    Several answers are said in one batch, a token each at a time; what one says depends on no other.
    """

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
        self._stops = frozenset(stop_ids(model, processor.tokenizer))
        self._text = Detokenizer(processor.tokenizer)
        self._inputs: dict[str, Any] | None = None
        self._pictures: list[dict[str, Tensor]] = []  # those that are not encoded yet
        self._features: list[Tensor] = []
        self._cache: Any = None
        self._choices = [_Choice(index, seed) for index, seed in enumerate(_seeds(request.seed, request.choices))]
        self._open = list(self._choices)  # those that go on, one row of the cache each
        self.prompt_tokens = 0
        self.cancelled = False

    @property
    def completion_tokens(self) -> int:
        """Of all answers together."""
        return sum(len(choice.tokens) for choice in self._choices)

    @torch.no_grad()
    def advance(self, until: float) -> bool:
        """Goes on until that moment; True once the answer is whole, or nobody wants it."""
        while not self.cancelled:
            if self._inputs is None:
                self._inputs = self._tokenized()
            elif self._pictures:
                picture = self._pictures.pop(0)
                self._features.append(self._model.encode_images(picture["pixel_values"], picture["image_grid_thw"]))
            elif self._say(self._inputs):
                return True
            if monotonic() >= until:
                return False
        return True

    def fail(self, error: Exception) -> None:
        self._tell(Piece(error=error))

    def _tokenized(self) -> dict[str, Any]:
        """The model's inputs, without the pixels: they go into `_pictures`, one by one."""
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
            self._pictures = [self._model.picked(inputs, [number]) for number in range(len(inputs["image_grid_thw"]))]
            del inputs["pixel_values"]
        return inputs

    def _image_tokens(self, inputs: dict[str, Any]) -> int:
        if "image_grid_thw" not in inputs:
            return 0
        grids = token_grids(self._model.config.encoder_config, inputs["image_grid_thw"])
        return count_tokens(self._model.final_grids(grids))

    def _say(self, inputs: dict[str, Any]) -> bool:
        """Chooses the next token of every answer, and tells it; True if these were the last ones."""
        if self._cache is None:
            self._cache = self._model.new_cache()
            if self._features:
                inputs = inputs | {"image_features": torch.cat(self._features)}
                self._features.clear()
        else:
            inputs = {"input_ids": torch.tensor([[choice.tokens[-1]] for choice in self._open]).to(self._model.device)}
        logits = self._model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if len(logits) < len(self._open):
            # the prompt is read once for all of them
            self._cache.batch_repeat_interleave(len(self._open))
            logits = logits.expand(len(self._open), -1)
        still = []
        for row, choice in enumerate(self._open):
            token = self._request.sampling.pick(logits[row], choice.tokens, choice.generator, self._stops)
            if self._request.top_logprobs is not None and token not in self._stops:
                choice.untold.append((choice.settled, self._logprobs(logits[row], token, self._request.top_logprobs)))
            if not self._take(token, choice.index):
                still.append(row)
        if still and len(still) < len(self._open):
            self._cache.batch_select_indices(torch.tensor(still, device=self._model.device))
        self._open = [self._open[row] for row in still]
        return not still

    def _take(self, token: int, index: int = 0) -> bool:
        """Tells what a token adds to an answer; True if it was the last one."""
        choice = self._choices[index]
        ended = token in self._stops
        if not ended:
            choice.tokens.append(token)
        last = ended or len(choice.tokens) == self._request.max_tokens
        text = self._text.whole(choice.tokens) if last else self._text.settled(choice.tokens)
        choice.settled = len(text)
        cut = min((at for stop in self._request.stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            text, ended, last = text[:cut], True, True
            choice.untold = [(start, told) for start, told in choice.untold if start < cut]
        ready = len(text) if last else len(text) - max((begun(text, stop) for stop in self._request.stop), default=0)
        if last or ready > choice.given:
            told = [entry for start, entry in choice.untold if last or start < ready]
            del choice.untold[: len(told)]
            self._tell(
                Piece(
                    text[choice.given : ready],
                    ("stop" if ended else "length") if last else None,
                    index=index,
                    logprobs=told if self._request.top_logprobs is not None else None,
                )
            )
            choice.given = ready
        return last

    def _logprobs(self, logits: Tensor, token: int, most: int) -> dict[str, Any]:
        """A token as the OpenAI interface tells it, with the model's own log-probabilities. logits: (V,)."""
        scores = logits.float().log_softmax(-1)
        best = scores.topk(min(most, len(scores)))

        def entry(token: int, score: float) -> dict[str, Any]:
            written, data = self._text.spelling(token)
            return {"token": written, "logprob": max(score, LEAST), "bytes": list(data)}

        likeliest = [entry(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return {**entry(token, float(scores[token])), "top_logprobs": likeliest}


def _seeds(seed: int, count: int) -> list[int]:
    """A seed for each answer: the first has the request's own, so that more answers change none."""
    draws = torch.Generator().manual_seed(seed)
    return [seed, *torch.randint(2**62, (count - 1,), generator=draws).tolist()]
