"""StreamingSession: one model watching one stream, frame by frame, at constant memory. What is fed for one frame:

    pending  prefix  [image]  suffix  ->  caption tokens  stop
    `----- old window -----'  `------ new window -------'  `- pending of the next step

Without a suffix the last pending token comes behind the image, so that some text always sees the frame.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from casa.errors import UserError
from casa.layers import Turner
from casa.media.pictures import check_picture
from casa.models import CasaCache, CasaForConditionalGeneration, CasaProcessor
from casa.models.generation import stop_ids
from casa.models.image_cache import project_features
from casa.streaming import state
from casa.streaming.batch import Images, Look, ShouldStop, StepRequest, StepResult, encode_together, run_all
from casa.streaming.sampling import Sampling
from casa.streaming.state import Usage
from casa.threads import settle

MIN_SINKS = 4  # the first tokens that attention leans on, whatever they say


@dataclass(frozen=True)
class EncodedFrame:
    """A frame as it is fed: token ids before and after it, its pixels or what was made of them, and its look."""

    before: list[int]
    after: list[int]
    images: Images
    look: Look | None = None


StepFrame = Image.Image | np.ndarray | EncodedFrame


class StreamingSession:
    """Captions for a live stream of frames.

    Args:
        model: What watches.
        processor: The model's own.
        prompt: What the user asks for, in the chat template's user turn; None takes the processor's own.
        max_text_tokens: Bound on the cached text, and on that of the open window; None lets both grow by what is said.
            The prompt (and at least the first 4 tokens) is never forgotten. (A model with history=-1 keeps all images
            anyway.)
        max_new_tokens: Of the longest caption.
        sampling: How words are picked; greedy if left out.
        seed: Of the draws.
        same_frame: The mean difference of pixel values, as the processor makes them, up to which a frame is taken for
            the one that was encoded last, and not encoded again; 0: if it is equal.

    Attributes:
        notes: The caller's own: whatever JSON holds, saved and loaded with the session, as one file.

    Raises:
        UserError: The bound is too small for the prompt, or the model cannot forget its text.
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
        same_frame: float = 0.0,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; give 1 or more.")
        if not same_frame >= 0:
            raise UserError(f"same_frame is {same_frame}; give 0 or more.")
        self._bind(model, processor, processor.stream_prompt if prompt is None else prompt)
        self.max_text_tokens = max_text_tokens
        self.max_new_tokens = max_new_tokens
        self.same_frame = same_frame
        self.sampling = sampling if sampling is not None else Sampling()
        self.frames = 0
        self.notes: dict[str, Any] = {}
        self._truncated = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._earlier: list[int] = []  # what was said, for repetition control
        self._cache = model.new_cache()
        tokens, _ = processor.turn(self.prompt, opens=True)
        self._sinks = max(MIN_SINKS, len(tokens))
        self._check_bound()
        # the last token of the prompt waits: without a suffix it is the one that sees the first frame
        self._pending = tokens[-1:]
        if tokens[:-1]:
            with torch.no_grad():
                ids = torch.tensor([tokens[:-1]], device=model.device)
                model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def _bind(self, model: CasaForConditionalGeneration, processor: CasaProcessor, prompt: str) -> None:
        self._model, self._processor, self.prompt = model, processor, prompt
        self._around, self._answered = processor.around_frame(prompt), list[int]()
        self._encoded: Look | None = None  # the frame encoded last
        self._shown: Look | None = None  # the one answered last
        stops = stop_ids(model, processor.tokenizer)
        if not stops:
            raise UserError("the model has no stop token; set generation_config.eos_token_id.")
        self._stops, self._stop = frozenset(stops), stops[0]
        rotaries = model.decoder.rotaries(range(len(model.decoder.blocks)), model.device, model.dtype)
        self._turns = [Turner(rotary) for rotary in rotaries]

    def step(self, frame: StepFrame, should_stop: ShouldStop | None = None) -> str:
        """Watches a frame and returns what it says: "" if nothing.

        Args:
            frame: PIL.Image, or uint8 (H, W, 3), or what `encode` made of one.
            should_stop: Asked before every token; once it says True, the caption ends where it is (a live stream's
                budget), but not before a word of it can be read. Only a model that stops by itself says nothing.

        Raises:
            TypeError: The frame is no picture; whatever is raised, the session is as before.
            ValueError: Likewise.
        """
        request = self.prepare(frame, should_stop)
        return self.accept(*run_all(self._model, [request]))

    def ask(self, question: str, should_stop: ShouldStop | None = None) -> str:
        """Answers a question about the frame at hand; captioning goes on with the next frame."""
        request = self.prepare_question(question, should_stop)
        return self.accept(*run_all(self._model, [request]))

    @staticmethod
    def check(frame: Image.Image | np.ndarray) -> Image.Image:
        """The frame as a picture. Raises TypeError or ValueError for anything that is none; asks no model."""
        return check_picture(frame)

    def encode(self, frame: Image.Image | np.ndarray) -> EncodedFrame:
        """Encodes and projects a frame ahead of its turn; `step` takes the result in its place, from any thread."""
        settle()
        before, after, pixels = self._processor.frame(check_picture(frame), self._around)
        images, look = self._recognised(pixels)
        with torch.no_grad():
            if look is None:
                (images,) = encode_together(self._model, [pixels])
                self._encoded = look = Look(pixels, images["image_features"], is_ahead=True)
            return EncodedFrame(before, after, project_features(self._model, images), look)

    def _recognised(self, images: Images) -> tuple[Images, Look | None]:
        """A frame that looks as the one encoded last: with that one's features in the place of its pixels."""
        last = self._encoded
        if last is None or "pixel_values" not in images:
            return images, None
        if not torch.equal(last.images["image_grid_thw"], images["image_grid_thw"]):
            return images, None
        known, pixels, most = last.images["pixel_values"], images["pixel_values"], self.same_frame
        if not torch.equal(known, pixels) and not (most and float((known - pixels).abs().float().mean()) <= most):
            return images, None
        return {"image_features": last.features, "image_grid_thw": images["image_grid_thw"]}, last

    def prepare(self, frame: StepFrame, should_stop: ShouldStop | None = None) -> StepRequest:
        """What this session feeds for a frame, in a batch; it is as it was until `accept` is given what comes back."""
        if not isinstance(frame, EncodedFrame):
            frame = EncodedFrame(*self._processor.frame(check_picture(frame), self._around))
        images, look = (frame.images, frame.look) if frame.look else self._recognised(frame.images)
        tokens = self._pending + frame.before + frame.after
        place = len(tokens) - max(1, len(frame.after))
        if self._processor.stream_turns and look is not None and look is self._shown:
            tokens, images = [], {}  # the same turn again has the same answer
        return replace(self._request(tokens, place, images, should_stop), look=look)

    def prepare_question(self, question: str, should_stop: ShouldStop | None = None) -> StepRequest:
        """The same for a question about the frame at hand. Raises UserError for one that the bound has no room for."""
        tokens = self._pending + self._processor.turn(question)[0]
        needed = self._sinks + len(tokens) + self.max_new_tokens
        if self.max_text_tokens is not None and needed > self.max_text_tokens:
            raise UserError(
                f"this question, its answer and the prompt need {needed} tokens, and max_text_tokens is "
                f"{self.max_text_tokens}; ask in fewer words."
            )
        return self._request(tokens, None, {}, should_stop)

    def accept(self, result: StepResult) -> str:
        """Takes over the state that a request has left; its caption."""
        if not result.request.tokens:
            self.frames += 1
            return ""
        text = self._to_text(result.tokens)
        self._truncated += not result.complete
        self._cache, self._pending, self._generator = result.cache, [result.pending], result.request.generator
        self._earlier = [*self._earlier, *result.tokens][-self.sampling.memory :] if self.sampling.memory else []
        self.frames += result.request.image_index is not None
        if (look := result.look) is not None:
            # a caption that was cut may have more to say
            self._shown = look if result.complete else None
            self._encoded = self._encoded if look.is_ahead else look
        if self._processor.stream_turns and result.request.image_index is not None:
            text = "" if text == self._to_text(self._answered) else text
            self._answered = result.tokens
        return text

    def _request(
        self, tokens: list[int], image_index: int | None, images: Images, should_stop: ShouldStop | None
    ) -> StepRequest:
        # what the request does, it does to a twin: a batch that fails leaves nothing behind
        cache, generator = self._cache.twin(), _generator(self._generator.get_state())
        count, opens = len(tokens) + self.max_new_tokens, image_index is not None
        if self.max_text_tokens is not None:
            # all the room that a caption may need is made first: nothing is forgotten while one is said
            state.make_room(cache, count, self.max_text_tokens, self._sinks, self._turns, opens)
        return StepRequest(
            cache=cache,
            tokens=tokens,
            image_index=image_index,
            images=images,
            pick=lambda logits, said: self.sampling.pick(logits, said, generator, self._stops, self._earlier),
            stops=self._stops,
            stop=self._stop,
            max_new_tokens=self.max_new_tokens,
            generator=generator,
            to_text=self._to_text,
            should_stop=should_stop,
            draft=self._draft() if opens and cache.is_croppable and not cache.slides else (),
        )

    def _draft(self) -> list[int]:
        """Where every frame is a turn, its answer is the last one's as long as nothing new is seen."""
        return self._answered[: self.max_new_tokens] if self._processor.stream_turns else []

    def _to_text(self, tokens: Sequence[int]) -> str:
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
        return Usage.of(self._cache, self._truncated)

    @property
    def max_step_tokens(self) -> int:
        """The most text tokens that a step can add: those around the frame, and the longest caption."""
        return 2 + sum(map(len, self._around)) + self.max_new_tokens

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
        settings = {name: getattr(self, name) for name in (*SETTINGS, "same_frame", "_answered")}
        settings["sampling"] = self.sampling.to_dict()
        state.save(path, self._model, self._cache, settings, self._generator.get_state())

    @staticmethod
    def saved_notes(path: str | Path) -> dict[str, Any]:
        """The notes of a saved session, without loading it. Raises UserError if the file is none."""
        return state.read(path)[0]["settings"]["notes"]

    @classmethod
    def load(
        cls, path: str | Path, model: CasaForConditionalGeneration, processor: CasaProcessor
    ) -> "StreamingSession":
        """A session that goes on exactly where the saved one stopped. Raises UserError for one of another model."""
        cache, settings, generator = state.load(path, model)
        session = cls.__new__(cls)
        session._bind(model, processor, settings["prompt"])
        for name in SETTINGS:
            setattr(session, name, settings[name])
        session.same_frame, session._answered = settings.get("same_frame", 0.0), settings.get("_answered", [])
        session.sampling = Sampling(**settings["sampling"])
        session._generator, session._cache = _generator(generator), cache
        return session

    def _check_bound(self) -> None:
        if (bound := self.max_text_tokens) is None:
            return
        if (kind := state.why_unbounded(self._model)) is not None:
            raise UserError(f"{kind} cannot forget its text; leave max_text_tokens out.")
        if bound < (needed := self._sinks + self.max_step_tokens):
            raise UserError(
                f"max_text_tokens is {bound}, but the prompt ({self._sinks}) and one frame need {needed}; "
                "raise it, or lower max_new_tokens."
            )


# what is saved of a session as it is
SETTINGS = ("prompt", "max_text_tokens", "max_new_tokens", "frames", "notes")
SETTINGS += ("_truncated", "_sinks", "_pending", "_earlier")


def _generator(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator
