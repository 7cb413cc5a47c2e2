"""StreamingSession: one model watching one stream, frame by frame, for as long as it likes.

Each frame opens a new window: its image tokens replace those of the frame before, and the text model's cache
grows by the few tokens said about it. With `max_text_tokens`, the oldest text beyond the prompt is forgotten
and the positions of what stays are closed up, so that a session is constant in memory for ever, also while it
is asked about one frame again and again (see `bound`).

What is fed for one frame, of a model with delimiters around images (`pending` is what the last step left):

    pending  prefix  [image]  suffix  ->  caption tokens  stop
    `----- old window -----'  `------ new window -------'  `- pending of the next step

A model without a suffix takes the last pending token behind the image, so that some text always sees the frame.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from casa.errors import UserError
from casa.layers import turner
from casa.media.pictures import check_picture
from casa.models import CasaCache, CasaForConditionalGeneration, CasaProcessor
from casa.models.generation import stop_ids
from casa.streaming import store
from casa.streaming.bound import make_room, unforgetting
from casa.streaming.sampling import Sampling
from casa.streaming.together import Call, Said, looked_at, run_together
from casa.streaming.usage import Usage

FEWEST_SINKS = 4  # the first tokens that attention leans on, whatever they say


@dataclass(frozen=True)
class Looked:
    """A frame as it is fed: token ids before and after it, and its pixels, or the features that were made of them."""

    before: list[int]
    after: list[int]
    images: dict[str, Tensor]


class StreamingSession:
    """Captions for a live stream of frames.

    prompt: what the user asks for, in the chat template's user turn; None takes the processor's own.
    max_text_tokens: bound on the cached text, and on that of the open window; None lets both grow by what is said. The
        prompt (and at least the first 4 tokens) is never forgotten. (A model with history=-1 keeps all images anyway.)
    max_new_tokens: the longest caption. sampling, seed: greedy unless asked.
    `notes` is the caller's own: whatever JSON holds, saved and loaded with the session, as one file.
    Raises UserError for a bound too small for the prompt, or of a model whose text cannot be forgotten (`bound`).
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        prompt: str | None = None,
        max_text_tokens: int | None = None,
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; give 1 or more.")
        self._bind(model, processor)
        self.prompt = processor.stream_prompt if prompt is None else prompt
        self.max_text_tokens = max_text_tokens
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling if sampling is not None else Sampling()
        self.frames = 0
        self._cut = 0
        self.notes: dict[str, Any] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._earlier: list[int] = []  # what was said, for repetition control
        self._cache = model.new_cache()
        tokens = self._prompt_tokens(self.prompt)
        self._sinks = max(FEWEST_SINKS, len(tokens))
        self._check_bound()
        # the last token of the prompt waits: without a suffix it is the one that sees the first frame
        self._pending = tokens[-1:]
        if tokens[:-1]:
            with torch.no_grad():
                ids = torch.tensor([tokens[:-1]], device=model.device)
                model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def _bind(self, model: CasaForConditionalGeneration, processor: CasaProcessor) -> None:
        self._model, self._processor = model, processor
        stops = stop_ids(model, processor.tokenizer)
        if not stops:
            raise UserError("the model has no stop token; set generation_config.eos_token_id.")
        self._stops, self._stop = frozenset(stops), stops[0]
        decoder = model.decoder
        rotaries = decoder.rotaries(range(len(decoder.blocks)), model.device, model.dtype)
        self._turns = [turner(rotary) for rotary in rotaries]

    def step(self, frame: Any, cut: Callable[[], bool] | None = None) -> str:
        """Watches a frame (PIL.Image, or uint8 (H, W, 3)) and returns what it says: "" if nothing.

        cut: asked before every token; once it says True, the caption ends where it is (a live stream's budget), but
        not before a word of it can be read. Only a model that stops by itself says nothing; `usage.cut` counts.
        Raises TypeError or ValueError for anything that is no picture; whatever is raised, the session is as before.
        """
        return self.accept(*run_together(self._model, [self.prepare(frame, cut)]))

    def ask(self, question: str, cut: Callable[[], bool] | None = None) -> str:
        """Answers a question about the frame at hand; captioning goes on with the next frame."""
        return self.accept(*run_together(self._model, [self.prepare_question(question, cut)]))

    @staticmethod
    def check(frame: Any) -> Image.Image:
        """The frame as a picture. Raises TypeError or ValueError for anything that is none; asks no model."""
        return check_picture(frame)

    def look(self, frame: Any) -> Looked:
        """Encodes and projects a frame ahead of its turn; `step` takes the result in its place, from any thread."""
        before, after, pixels = self._processor.frame(check_picture(frame))
        return Looked(before, after, looked_at(self._model, pixels))

    def prepare(self, frame: Any, cut: Callable[[], bool] | None = None) -> Call:
        """What this session feeds for a frame; hand it to `run_together`, and what comes back to `accept`.

        The session is as it was until then, whatever becomes of the call.
        """
        seen = frame if isinstance(frame, Looked) else Looked(*self._processor.frame(check_picture(frame)))
        tokens, after = self._pending + seen.before, seen.after
        if not after:
            tokens, after = tokens[:-1], tokens[-1:]
        return self._call(tokens + after, len(tokens), seen.images, cut)

    def prepare_question(self, question: str, cut: Callable[[], bool] | None = None) -> Call:
        """The same for a question about the frame at hand. Raises UserError for one that the bound has no room for."""
        tokens = self._pending + self._turn_tokens(question)
        needed = self._sinks + len(tokens) + self.max_new_tokens
        if self.max_text_tokens is not None and needed > self.max_text_tokens:
            raise UserError(
                f"this question, its answer and the prompt need {needed} tokens, and max_text_tokens is "
                f"{self.max_text_tokens}; ask in fewer words."
            )
        return self._call(tokens, None, {}, cut)

    def accept(self, said: Said) -> str:
        """Takes over the state that a call has left; its caption."""
        text = self._reads(said.tokens)
        self._cut += not said.whole
        self._cache, self._pending, self._generator = said.cache, [said.pending], said.call.draws
        self._earlier = [*self._earlier, *said.tokens][-self.sampling.memory :] if self.sampling.memory else []
        self.frames += said.call.place is not None
        return text

    def _call(
        self, tokens: list[int], place: int | None, pixels: dict[str, Tensor], cut: Callable[[], bool] | None
    ) -> Call:
        # what the call does, it does to a twin: a pass that fails leaves nothing behind
        cache, draws = self._cache.twin(), _generator(self._generator.get_state())
        if self.max_text_tokens is not None:
            # all the room that a caption may need is made first: nothing is forgotten while one is said
            count, opens = len(tokens) + self.max_new_tokens, place is not None
            make_room(cache, count, self.max_text_tokens, self._sinks, self._turns, opens)
        return Call(
            cache=cache,
            tokens=tokens,
            place=place,
            pixels=pixels,
            pick=lambda logits, said: self.sampling.pick(logits, said, draws, self._stops, self._earlier),
            stops=self._stops,
            stop=self._stop,
            most=self.max_new_tokens,
            draws=draws,
            reads=self._reads,
            cut=cut,
        )

    def _reads(self, tokens: Sequence[int]) -> str:
        return self._processor.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    @property
    def cache(self) -> CasaCache:
        """A copy of what is held, to go on from as a chat: `model.generate(..., past_key_values=session.cache)`.

        With the ids of the new text alone, and an `attention_mask` over both. The new text begins with `pending`.
        """
        return copy.deepcopy(self._cache)

    @property
    def pending(self) -> list[int]:
        """Ids of the tokens that were said and wait to be cached."""
        return list(self._pending)

    @property
    def usage(self) -> Usage:
        """What is held now."""
        cache = self._cache
        return Usage(
            text_tokens=cache.num_text,
            image_tokens=cache.image_tokens,
            cache_bytes=cache.num_bytes,
            text_bytes=cache.text_bytes,
            image_bytes=cache.image_bytes,
            window_bytes=cache.num_bytes - cache.text_bytes - cache.image_bytes,
            held_bytes=cache.held_bytes,
            cut=self._cut,
        )

    @property
    def most_step_tokens(self) -> int:
        """The most text tokens that a step can add: those around the frame, and the longest caption."""
        return 2 + sum(map(len, self._processor.around_frame)) + self.max_new_tokens

    def fork(self) -> "StreamingSession":
        """A second session that goes on from here by itself; the model is shared."""
        twin = copy.copy(self)
        twin._cache = copy.deepcopy(self._cache)
        twin._pending, twin._earlier = list(self._pending), list(self._earlier)
        twin.notes = copy.deepcopy(self.notes)
        twin._generator = _generator(self._generator.get_state())
        return twin

    def save(self, path: str | Path) -> None:
        """Writes the session's state (not the model) as one safetensors file, whole or not at all."""
        settings = {
            "prompt": self.prompt,
            "max_text_tokens": self.max_text_tokens,
            "max_new_tokens": self.max_new_tokens,
            "sampling": self.sampling.to_dict(),
            "frames": self.frames,
            "cut": self._cut,
            "sinks": self._sinks,
            "pending": self._pending,
            "earlier": self._earlier,
            "notes": self.notes,
        }
        store.save(path, self._cache, settings, self._generator.get_state())

    @staticmethod
    def saved_notes(path: str | Path) -> dict[str, Any]:
        """The notes of a saved session, without loading it. Raises UserError if the file is none."""
        return store.read_settings(path).get("notes", {})

    @classmethod
    def load(
        cls, path: str | Path, model: CasaForConditionalGeneration, processor: CasaProcessor
    ) -> "StreamingSession":
        """A session that goes on exactly where the saved one stopped.

        Raises UserError if the file is no saved session, or one of another model.
        """
        cache, settings, generator = store.load(path, model)
        session = cls.__new__(cls)
        session._bind(model, processor)
        session.prompt = settings["prompt"]
        session.max_text_tokens = settings["max_text_tokens"]
        session.max_new_tokens = settings["max_new_tokens"]
        session.sampling = Sampling(**settings["sampling"])
        session.frames = settings["frames"]
        session._cut = settings.get("cut", 0)
        session.notes = settings.get("notes", {})
        session._sinks = settings["sinks"]
        session._pending, session._earlier = list(settings["pending"]), list(settings["earlier"])
        session._generator, session._cache = _generator(generator), cache
        return session

    def _prompt_tokens(self, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        inputs = self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return inputs["input_ids"][0].tolist()

    def _turn_tokens(self, question: str) -> list[int]:
        """A user's turn in mid-conversation: as at its start, without the token that opens a text."""
        tokens = self._prompt_tokens(question)
        opening = self._processor.tokenizer.bos_token_id
        return tokens[1:] if tokens and tokens[0] == opening else tokens

    def _check_bound(self) -> None:
        bound = self.max_text_tokens
        if bound is None:
            return
        if (kind := unforgetting(self._model)) is not None:
            raise UserError(f"{kind} cannot forget its text; leave max_text_tokens out.")
        needed = self._sinks + self.most_step_tokens
        if bound < needed:
            raise UserError(
                f"max_text_tokens is {bound}, but the prompt ({self._sinks}) and one frame need {needed}; "
                "raise it, or lower max_new_tokens."
            )


def _generator(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator
