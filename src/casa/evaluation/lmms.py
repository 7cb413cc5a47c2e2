"""casa models inside lmms-eval, which finds this file by the entry point `lmms_eval.models`.

    lmms-eval --model casa --model_args pretrained=casa-tiny --tasks mme --batch_size 8

lmms-eval is asked for here and nowhere else in the package (extra `casa-vlm[lmms]`). What is written for its version
0.7: a request's arguments are (text, settings or continuation, visuals, document, task, split), where visuals is a
function that gives a document's pictures and films; and `loglikelihood` gives the loss, the mean over the
continuation's tokens, since lmms-eval takes the smallest for the best.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from casa.data.frames import video_frames
from casa.data.pictures import open_one
from casa.data.record import Picture
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.auto import load_pretrained

try:
    from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
except ImportError:
    lmms: Any = object  # nobody has asked for the class then
try:
    from lmms_eval.api.instance import GenerationResult  # type: ignore[import-not-found]
except ImportError:
    GenerationResult: Any = None  # before 0.7

log = logging.getLogger("casa.evaluation")

PLACE = re.compile(r"<image(?: ?\d+)?>")  # where a task's text has a picture
SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
MAX_SIDE = 4096  # px of a film's frame, of which only larger ones are made smaller


def manifest() -> Any:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

    return ModelManifest(model_id="casa", simple_class_path=f"{__name__}.Casa", aliases=("casa_vlm",))


class Casa(lmms):
    """A model of this library as lmms-eval asks it.

    Args:
        pretrained: A checkpoint's folder, a hub id, or the name of a shipped model.
        device: "auto" (of several processes each its own GPU), "cpu", "cuda" or "cuda:1".
        batch_size: Requests that are answered at once.
        max_num_frames: Frames of a film, evenly chosen.
        fps: At most so many frames a second.
        system_prompt: Opens every chat, if any.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "casa-tiny",
        device: str = "auto",
        batch_size: int | str = 1,
        max_num_frames: int = 32,
        fps: float = 1.0,
        system_prompt: str = "",
        **unknown: Any,
    ) -> None:
        super().__init__()
        # lmms-eval's own line hands these to every model
        unknown = {name: value for name, value in unknown.items() if name != "max_batch_size"}
        if unknown:
            raise UserError(f"model_args has {', '.join(unknown)}, which casa does not know; leave it out.")
        self.batch_size = 1 if batch_size == "auto" else int(batch_size)
        self.max_num_frames, self.fps = int(max_num_frames), float(fps)
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        if device in ("auto", "cuda") and torch.cuda.device_count() > 1:
            from accelerate import PartialState

            device = str(PartialState().device)
        self.model: CasaForConditionalGeneration
        self.processor: CasaProcessor
        self.model, self.processor = load_pretrained(pretrained, device)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, up to the first of its stop words."""
        return self._each(requests, lambda request: repr(request.args[1]), self._generate)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """For each request the loss of its continuation, nats per token, and whether greedy decoding says it."""
        found = self._each(requests, lambda request: "", self._score)
        # 0.7 makes words of any pair that comes without a wrapper
        return found if GenerationResult is None else [GenerationResult(pair) for pair in found]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("casa answers tasks of one round; leave out those of several.")

    def _each(
        self,
        requests: Sequence[Any],
        kind: Callable[[Any], str],
        answer: Callable[[Sequence[Any], list[list[dict[str, Any]]]], list[Any]],
    ) -> list[Any]:
        """Answers in the order of the requests; those of one kind in batches, long ones first."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(kind(request), []).append(number)
        found: list[Any] = [None] * len(requests)
        for numbers in groups.values():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            for first in range(0, len(numbers), self.batch_size):
                batch = numbers[first : first + self.batch_size]
                chosen = [requests[number] for number in batch]
                chats = [self._chat(request) for request in chosen]
                for number, one in zip(batch, answer(chosen, chats), strict=True):
                    found[number] = one
        return found

    def _document(self, request: Any) -> Any:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _chat(self, request: Any) -> list[dict[str, Any]]:
        """The request as a chat, its pictures where its text has places for them, or else before it."""
        # a continuation by itself, without its question, comes without pictures too
        shown = request.args[2] if len(request.args) > 2 else None
        pictures = list(self._pictures(shown(self._document(request)) if callable(shown) else shown))
        text: str = request.args[0]
        words = PLACE.split(text)
        content: list[dict[str, Any]] = []
        if pictures and len(words) == len(pictures) + 1:
            order = [int(number) - 1 for number in re.findall(r"<image ?(\d+)>", text)]
            placed = [pictures[number] for number in order] if sorted(order) == [*range(len(pictures))] else pictures
            for part, picture in zip(words, [*placed, None], strict=True):
                content += [{"type": "text", "text": part}] if part else []
                content += [{"type": "image", "image": picture}] if picture is not None else []
        else:
            content += [{"type": "image", "image": picture} for picture in pictures]
            # `<image>` says that a picture comes along; what a task numbers, its question speaks of
            content.append({"type": "text", "text": text.replace("<image>", "").strip()})
        return self._apply_system_prompt([{"role": "user", "content": content}], self.system_prompt)

    def _pictures(self, visual: Any) -> Iterable[Image.Image]:
        """All pictures of what a task shows: pictures, arrays, files, films, and lists of these."""
        if visual is None:
            return
        if isinstance(visual, list | tuple):
            for one in visual:
                yield from self._pictures(one)
        elif isinstance(visual, Image.Image):
            yield visual
        elif isinstance(visual, np.ndarray):
            yield Image.fromarray(visual)
        elif isinstance(visual, Mapping) and visual.get("bytes"):
            yield open_one(Picture(visual["bytes"]))
        elif isinstance(visual, Mapping) and visual.get("path"):
            yield from self._pictures(visual["path"])
        elif isinstance(visual, str | Path) and Path(visual).suffix.lower() in Image.registered_extensions():
            yield open_one(Picture(Path(visual)))
        elif isinstance(visual, str | Path):
            frames = video_frames(Path(visual), self.fps, 0.0, None, MAX_SIDE, self.max_num_frames, True)
            yield from map(open_one, frames)
        else:
            raise UserError(f"a task shows a {type(visual).__name__}, which casa cannot see; leave the task out.")

    def _inputs(self, chats: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
        inputs = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
        return {name: value.to(self.device) for name, value in inputs.items()}

    @torch.no_grad()
    def _generate(self, requests: Sequence[Any], chats: list[list[dict[str, Any]]]) -> list[str]:
        inputs = self._inputs(chats)
        given: Mapping[str, Any] = requests[0].args[1]
        said = self.model.generate(**inputs, **settings_of(given))[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        until = given.get("until") or []
        answers = [cut(text, [until] if isinstance(until, str) else until) for text in texts]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], given), answer)
        return answers

    @torch.no_grad()
    def _score(self, requests: Sequence[Any], chats: list[list[dict[str, Any]]]) -> list[tuple[float, bool]]:
        inputs = self._inputs(chats)
        rows = len(requests)
        wanted = [
            self.tokenizer(
                request.args[1](self._document(request)) if callable(request.args[1]) else request.args[1],
                add_special_tokens=False,
            )["input_ids"]
            for request in requests
        ]
        longest = max(map(len, wanted))
        behind = torch.zeros(rows, longest, dtype=inputs["input_ids"].dtype)
        real = torch.zeros(rows, longest, dtype=torch.int64)
        for row, ids in enumerate(wanted):
            behind[row, : len(ids)], real[row, : len(ids)] = torch.tensor(ids, dtype=behind.dtype), 1
        behind, real = behind.to(self.device), real.to(self.device)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        inputs |= {
            "input_ids": torch.cat([inputs["input_ids"], behind], dim=1),
            "attention_mask": torch.cat([mask, real.to(mask.dtype)], dim=1),
        }
        logits = self.model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1].float()
        loss = -logits.log_softmax(-1).gather(-1, behind[..., None])[..., 0]
        right = (logits.argmax(-1) == behind) | ~real.bool()
        mean = (loss * real).sum(1) / real.sum(1).clamp(min=1)
        return list(zip(mean.tolist(), right.all(1).tolist(), strict=True))


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` is told of a task's settings: greedy unless they ask to sample."""
    if left := sorted(given.keys() - {*SETTINGS, "until", "max_gen_toks"}):
        log.warning("casa does not know %s of this task, and answers without.", ", ".join(left))
    found = {name: given[name] for name in SETTINGS if given.get(name) is not None}
    found.setdefault("max_new_tokens", given.get("max_gen_toks", 256))
    found["do_sample"] = bool(found.get("temperature")) and found.get("do_sample", True)
    if not found["do_sample"]:
        for name in ("temperature", "top_p", "top_k"):
            found.pop(name, None)
    return found


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop words. Blank ones, which an answer may begin with, count from its words."""
    text = text.strip()
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
