"""One chat completion, token by token, in slices, on the model's own thread; and its tokens back to text.

What a streamed answer has told is never taken back. A later token can complete a character of several bytes, so of
every text there is a part that is settled: of "I", " do", "n't", "\\xe2", "\\x82" (two thirds of a character) it is
"I don't". Shapes: V vocabulary.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.generation import stop_ids
from casa.models.image_cache import encode_pixels
from casa.models.inputs import count_tokens
from casa.models.loading import sentence_of
from casa.serving.chat import ChatRequest, RequestError
from casa.streaming.batch import UNFINISHED
from casa.streaming.sampling import decode
from casa.vision import token_grids

MIN_LOGPROB = -9999.0  # what the OpenAI interface says for a log-probability too small to tell
BYTE = re.compile("<0x([0-9A-F]{2})>")  # a token that stands for one byte, where the vocabulary has no other
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
# decoders of the tokenizers library that read a token by itself, or put tokens end to end
BY_TOKEN = {"BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}


class Detokenizer:
    """What the tokens of an answer say, special ones left out. Reads the tokenizer, and keeps no text.

    With a tokenizer that decodes in a way unknown here, or takes blanks out of what it has decoded, nothing is settled
    before the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._left_out = frozenset([*tokenizer.all_special_ids, *(token for token, about in added if about.special)])
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        told = json.loads(decoder.__getstate__()) if decoder is not None else {}
        decoders: list[dict[str, Any]] = told.get("decoders", [told] if told else [])
        kinds = [part["type"] for part in decoders]
        self._kinds = set(kinds)
        behind = decoders[kinds.index("Fuse") :] if "Fuse" in kinds else []
        # a token more only adds to the text of those before it, bytes of a character apart
        only_adds = self._kinds <= BY_TOKEN and not any(
            part["type"] == "Replace" or (part["type"] == "Strip" and part["stop"]) for part in behind
        )
        # from BPE transformers takes blanks only if it is told so twice
        forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
        is_bpe = type(getattr(backend, "model", None)).__name__ == "BPE" and not forced
        self._settles = only_adds and (is_bpe or not tokenizer.clean_up_tokenization_spaces)

    def whole(self, tokens: Sequence[int]) -> str:
        """The text of an answer that has ended."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)).lstrip()

    def settled(self, tokens: Sequence[int]) -> str:
        """The part of the text that is the beginning of `whole` with any tokens behind these."""
        if not self._settles:
            return ""
        end = len(tokens)
        while end and self._may_join(tokens[end - 1]):
            end -= 1
        text = self._tokenizer.decode(list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).rstrip(UNFINISHED).lstrip()

    def spelling(self, token: int) -> tuple[str, bytes]:
        """What one token adds in the middle of a text, special ones as they are written: as text, and its bytes.

        The bytes of all tokens together are those of the text; a single token may be less than a character.
        """
        if (piece := self._piece(token)) is None:
            return "", b""
        if "ByteFallback" in self._kinds and (one := BYTE.fullmatch(piece)) is not None:
            data = bytes([int(one[1], 16)])
        elif "ByteLevel" in self._kinds and all(letter in BYTES for letter in piece):
            data = bytes(BYTES[letter] for letter in piece)
        else:
            # the first token of a text may lose a blank, the second does not
            alone, twice = (
                str(self._tokenizer.decode([token] * count, clean_up_tokenization_spaces=False)) for count in (1, 2)
            )
            data = twice[len(alone) :].encode()
        return data.decode(errors="replace"), data

    def _may_join(self, token: int) -> bool:
        """Whether a token and those behind it may be read as one: bytes are, until something else follows."""
        piece = self._piece(token)
        return piece is None or token in self._left_out or BYTE.fullmatch(piece) is not None

    def _piece(self, token: int) -> str | None:
        """A token as the vocabulary has it; None for a row of the model's that the tokenizer knows nothing of."""
        return self._tokenizer.convert_ids_to_tokens([token])[0]


@dataclass(frozen=True)
class ChatDelta:
    """What is new in one of the answers."""

    text: str = ""  # to be put behind what was told
    finish: str | None = None  # "stop" or "length" in the last one of its answer
    error: Exception | None = None  # in place of all else
    index: int = 0  # of the answer
    logprobs: list[dict[str, Any]] | None = None  # of the tokens of this text, where they were asked for


class _Choice:
    """One of the answers to a request, while it is generated."""

    def __init__(self, index: int, seed: int, completion: "Completion") -> None:
        self._index, self._completion = index, completion
        self._generator = torch.Generator().manual_seed(seed)
        self.tokens: list[int] = []
        self.is_open = True
        self._told = self._settled = 0  # characters
        # of each token whose log-probabilities are still to be told: where its text begins, and they
        self._untold: list[tuple[int, dict[str, Any]]] = []

    @property
    def last(self) -> int:
        return self.tokens[-1]

    def take(self, logits: Tensor) -> bool:
        """Chooses the next token from logits (V,), and tells what it adds; True if it was the last one."""
        request, stops = self._completion.request, self._completion.stops
        token = request.sampling.pick(logits, self.tokens, self._generator, stops)
        if request.top_logprobs is not None and token not in stops:
            self._untold.append((self._settled, self._logprobs(logits, token, request.top_logprobs)))
        return self.add(token)

    def add(self, token: int) -> bool:
        """Tells what a token adds to the answer; True if it was the last one."""
        request, text_of = self._completion.request, self._completion.detokenizer
        ended = token in self._completion.stops
        if not ended:
            self.tokens.append(token)
        last = ended or len(self.tokens) == request.max_tokens
        text = text_of.whole(self.tokens) if last else text_of.settled(self.tokens)
        self._settled = len(text)
        cut = min((at for stop in request.stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            text, ended, last = text[:cut], True, True
            self._untold = [(start, told) for start, told in self._untold if start < cut]
        ready = len(text) if last else len(text) - max((_begun(text, stop) for stop in request.stop), default=0)
        if last or ready > self._told:
            told = [entry for start, entry in self._untold if last or start < ready]
            del self._untold[: len(told)]
            delta = ChatDelta(
                text[self._told : ready],
                ("stop" if ended else "length") if last else None,
                index=self._index,
                logprobs=told if request.top_logprobs is not None else None,
            )
            self._completion.on_delta(delta)
            self._told = ready
        self.is_open = not last
        return last

    def _logprobs(self, logits: Tensor, token: int, count: int) -> dict[str, Any]:
        """A token as the OpenAI interface tells it, with the model's own log-probabilities. logits: (V,)."""
        scores = logits.float().log_softmax(-1)
        best = scores.topk(min(count, len(scores)))

        def entry(token: int, score: float) -> dict[str, Any]:
            written, data = self._completion.detokenizer.spelling(token)
            return {"token": written, "logprob": max(score, MIN_LOGPROB), "bytes": list(data)}

        likeliest = [entry(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return {**entry(token, float(scores[token])), "top_logprobs": likeliest}


class Completion:
    """Answers to one request. Several are said in one batch, a token each at a time; none depends on another.

    A slice ends once the prompt is tokenized, after each picture, and after each token. `on_delta` is called with
    everything new, from the model's thread. A prompt has at most `max_prompt` tokens, pictures included. `read_picture`
    gives what stands for a picture's pixels, as `encode_pixels` does.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        detokenizer: Detokenizer,
        request: ChatRequest,
        max_prompt: int,
        on_delta: Callable[[ChatDelta], None],
        read_picture: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:
        self._model, self._processor, self._max_prompt = model, processor, max_prompt
        self._read_picture = read_picture or partial(encode_pixels, model)
        self.detokenizer, self.request, self.on_delta = detokenizer, request, on_delta
        self.stops = frozenset(stop_ids(model, processor.tokenizer))
        # the first has the request's own seed, so that more answers change none
        draws = torch.Generator().manual_seed(request.seed)
        others = torch.randint(2**62, (request.choices - 1,), generator=draws).tolist()
        self.choices = [_Choice(index, seed, self) for index, seed in enumerate([request.seed, *others])]
        self._stages = self._run()
        self.prompt_tokens = 0  # once the prompt has been read
        self.cancelled = False  # to be set when nobody listens any more

    @property
    def completion_tokens(self) -> int:
        """Of all answers together."""
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def _is_over(self) -> bool:
        return self.cancelled or not any(choice.is_open for choice in self.choices)

    @torch.no_grad()
    def advance(self, until: float) -> bool:
        """Goes on until that moment; True once the answer is whole, or nobody wants it."""
        while not self._is_over:
            next(self._stages)
            if monotonic() >= until:
                break
        return self._is_over

    def fail(self, error: Exception) -> None:
        self.on_delta(ChatDelta(error=error))

    def _run(self) -> Iterator[object]:
        """All of it; a slice ends wherever this yields."""
        inputs, pictures = self.prompt()
        yield
        read = []
        for picture in pictures:
            read.append(self._read_picture(picture))
            yield
        if read:
            inputs |= {name: torch.cat([one[name] for one in read]) for name in read[0]}
            read.clear()
        yield from decode(self._model, inputs, self._model.new_cache(), self.choices, drop_ended=True)

    def prompt(self) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The model's inputs, without the pixels, and the pictures one by one.

        Raises:
            RequestError: the template refuses the chat, or it is too long.
        """
        how: dict[str, Any] = {
            "add_generation_prompt": True,
            "tokenize": True,
            "return_dict": True,
            "return_tensors": "pt",
        }
        try:
            written = self._processor.apply_chat_template(self.request.messages, **how)
        except TemplateError as error:  # of several families: roles must take turns
            refused = f"the model's chat template refuses this chat: {sentence_of(error)}"
            raise RequestError(refused, "messages", "invalid_value") from error
        inputs: dict[str, Tensor] = dict(written)
        self.prompt_tokens, grid = inputs["input_ids"].shape[1], inputs.get("image_grid_thw")
        if grid is not None:
            grids = self._model.final_grids(token_grids(self._model.config.encoder_config, grid))
            self.prompt_tokens += count_tokens(grids)
        if self.prompt_tokens > self._max_prompt:
            long = f"the chat has {self.prompt_tokens} tokens, but at most {self._max_prompt} are taken; shorten it."
            raise RequestError(long, "messages", "context_length_exceeded")
        # one row has no padding
        inputs.pop("attention_mask", None)
        pictures = [] if grid is None else [self._model.picked(inputs, [number]) for number in range(len(grid))]
        inputs.pop("pixel_values", None)
        return {name: tensor.to(self._model.device) for name, tensor in inputs.items()}, pictures


def _begun(text: str, word: str) -> int:
    """How many characters at the end of a text, fewer than all of a word's, are the word's beginning."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
