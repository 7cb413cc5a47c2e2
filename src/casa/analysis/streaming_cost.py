"""What watching costs, frame by frame: a CASA session beside insertion of the same size, in one run.

The insertion model has the CASA model's backbone, encoder and projector, and no CASA layers. It was never trained
to read inserted images, so it is for cost only: it is made to say, token for token, what the CASA model said. Both
sessions thus see the same frames and run the same number of steps. They take turns at every frame, so that whatever
else the machine does meets both alike.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor, FusionConfig
from casa.streaming import Sampling, StreamingSession, Usage

MAX_FRAMES = 120
MAX_IMAGE_TOKENS = 24_000
MAX_SECONDS = 30.0


@dataclass(frozen=True)
class Cost:
    """One frame in one session: seconds from the frame to its whole caption, and what the session holds then."""

    seconds: float
    usage: Usage


@dataclass(frozen=True)
class CostRow:
    """One frame in both sessions. insertion is None once that session was given up (see `Comparison`)."""

    caption: str
    tokens: int
    casa: Cost
    insertion: Cost | None


class Comparison:
    """Two sessions side by side, one frame at a time; `casa` is the CASA session.

    Args:
        max_frames, max_image_tokens, max_seconds: Where the insertion session stops, since its cost grows without end:
            frames it watched, image tokens it holds, seconds of its own work. None: never.
        sampling: Of the CASA session; greedy if left out.
        clock: Tells seconds.
        session: Further arguments of both sessions, such as prompt and max_new_tokens.

    Raises:
        UserError: The model is an insertion model itself.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        *,
        max_frames: int | None = MAX_FRAMES,
        max_image_tokens: int | None = MAX_IMAGE_TOKENS,
        max_seconds: float | None = MAX_SECONDS,
        sampling: Sampling | None = None,
        clock: Callable[[], float] = perf_counter,
        **session: Any,
    ) -> None:
        self._script: list[int] = []
        speaker = _Scripted(**(sampling or Sampling()).to_dict(), script=self._script)
        self.casa = StreamingSession(model, processor, sampling=speaker, **session)
        # a bound on the text is CASA's alone: insertion cannot forget
        session.pop("max_text_tokens", None)
        repeater = _Scripted(script=self._script, repeats=True)
        self._insertion: StreamingSession | None = StreamingSession(
            insertion_twin(model), processor, sampling=repeater, **session
        )
        self._device, self._clock = model.device, clock
        self._bounds = (max_frames, max_image_tokens, max_seconds)
        self._compared, self._spent = 0, 0.0

    def step(self, frame: Any) -> CostRow:
        """Shows both the frame (PIL.Image, or uint8 (H, W, 3)); the caption is the CASA session's."""
        self._script.clear()
        caption, ours = self._timed(self.casa, frame)
        said = len(self._script)
        theirs = None
        if self._insertion is not None:
            _, theirs = self._timed(self._insertion, frame)
            self._compared += 1
            self._spent += theirs.seconds
            reached = (self._compared, theirs.usage.image_tokens, self._spent)
            if any(most is not None and count >= most for count, most in zip(reached, self._bounds, strict=True)):
                self._insertion = None
        return CostRow(caption, said, ours, theirs)

    def _timed(self, session: StreamingSession, frame: Any) -> tuple[str, Cost]:
        start = self._now()
        text = session.step(frame)
        return text, Cost(self._now() - start, session.usage)

    def _now(self) -> float:
        if self._device.type == "cuda":
            # an accelerator works on after a call returns
            torch.cuda.synchronize(self._device)
        return self._clock()


def compare(
    model: CasaForConditionalGeneration, processor: CasaProcessor, frames: Iterable[Any], **settings: Any
) -> Iterator[CostRow]:
    """Rows of cost for all frames, as they are watched. settings: as for `Comparison`."""
    comparison = Comparison(model, processor, **settings)
    return (comparison.step(frame) for frame in frames)


def insertion_twin(model: CasaForConditionalGeneration) -> CasaForConditionalGeneration:
    """An insertion model with this model's backbone, encoder and projector; weights are shared, not copied.

    Raises:
        UserError: The model is an insertion model itself.
    """
    if model.fusion.method == "insertion":
        raise UserError("this is an insertion model already; compare a CASA or cross-attention model with it.")
    # a copy, since building a model writes into the configs of its parts
    config: Any = copy.deepcopy(model.config)
    kept = {"compressor": model.fusion.compressor, "gist": model.fusion.gist}
    config.fusion = FusionConfig(method="insertion", **kept).to_dict()
    twin: Any = CasaForConditionalGeneration(config)
    for name, part in model.named_children():
        if name != "casa_layers":
            twin.get_submodule(name).load_state_dict(part.state_dict(), assign=True)
    # what is not in the state dict (rotary tables) was built on the CPU
    twin.to(model.device)
    twin.generation_config = model.generation_config
    return twin.eval()


@dataclass(frozen=True)
class _Scripted(Sampling):
    """Picks as usual and writes the tokens down; or `repeats` what was written, whatever the logits are.

    script: what the CASA session said about the current frame, stop token included.
    """

    script: list[int] = field(default_factory=list)
    repeats: bool = False

    def pick(self, logits: Tensor, said: list[int], *how: Any, **named: Any) -> int:
        # a repeater reads the logits too, as every way of picking does
        token = super().pick(logits, said, *how, **named)
        if self.repeats:
            return self.script[len(said)]
        self.script.append(token)
        return token
