"""What a live session holds: how much it is, how it is kept below a bound on its text, and how it is saved.

Two things hold text. The text model's cache forgets its oldest tokens behind the sinks (the prompt, mostly); the open
window of the CASA layers begins again at its images, as if the frame had been shown once more.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from casa.atomic import replacing
from casa.errors import UserError
from casa.layers import LayerWindow, WindowExtent, WindowState
from casa.models import CasaCache, CasaForConditionalGeneration
from casa.models.cache import Seen
from casa.models.insertion import StreamState
from casa.streaming.batch import text_of

FORMAT, ANY_FORMAT = "casa session 4", "casa session "


@dataclass(frozen=True)
class Usage:
    """What a session holds in memory, and how often time cut it short.

    Args:
        text_tokens: In the text model's cache.
        image_tokens: In the visible windows.
        cache_bytes: All of it: text_bytes, image_bytes and window_bytes.
        text_bytes: The text model's cache.
        image_bytes: Image keys and values of the visible windows; under insertion they are part of text_bytes.
        window_bytes: The text of the open window in the CASA layers.
        held_bytes: The memory that this takes: cache_bytes, the room that buffers keep for the text to come, and
            whatever in them nobody reads. Sessions that remember the same are equal, whatever room they have.
        truncated: Captions and answers so far that time cut short, in which case something was said, if not all.
    """

    text_tokens: int
    image_tokens: int
    cache_bytes: int
    text_bytes: int
    image_bytes: int
    window_bytes: int
    held_bytes: int = field(default=0, compare=False)
    truncated: int = field(default=0, compare=False)

    @classmethod
    def of(cls, cache: CasaCache, truncated: int = 0) -> "Usage":
        total, text, image = cache.num_bytes, cache.text_bytes, cache.image_bytes
        counts = cache.num_text, cache.image_tokens, total, text, image, total - text - image
        return cls(*counts, held_bytes=cache.held_bytes, truncated=truncated)


def supports_text_bound(model: CasaForConditionalGeneration) -> bool:
    """Whether a model can have a bound on its text: one of CASA's windows, whose blocks do not forget by themselves."""
    return why_unbounded(model) is None


def why_unbounded(model: CasaForConditionalGeneration) -> str | None:
    """What kind of model it is that can have no bound; None of one that can."""
    if model.fusion.method == "insertion":
        return "an insertion model"
    if model.fusion.split == "sample":
        return 'a model with split="sample"'
    return "a model with sliding-window attention" if model.new_cache().slides else None


def make_room(
    cache: CasaCache, count: int, bound: int, sinks: int, turns: Sequence[Callable[[Tensor, int], Tensor]], opens: bool
) -> None:
    """Makes room for `count` more tokens of text below the bound, in a cache of one row.

    The first `sinks` tokens are never forgotten. `opens`: a frame is among what comes and closes the open window, whose
    text then needs no room. `turns` are those of `CasaCache.drop_text`.
    """
    windows = cache.windows
    if windows is not None and not opens and windows.text_tokens[0] + count > bound:
        windows.forget_text()
    surplus = cache.num_text + count - bound
    if surplus > 0:
        # an eighth of the bound at a time, so that it happens rarely
        wanted = max(surplus, (bound - sinks) // 8)
        cache.drop_text(sinks, min(wanted, max(0, cache.num_text - sinks)), turns)


def save(
    path: str | Path, model: CasaForConditionalGeneration, cache: CasaCache, settings: dict[str, Any], draws: Tensor
) -> None:
    """Writes cache, settings and generator state as one safetensors file, whole or not at all, or raises UserError."""
    tensors = {"generator": draws}
    for index in range(len(cache.text.layers)):
        if (held := text_of(cache, index)) is not None:
            tensors |= {f"text.{index}.key": held[0], f"text.{index}.value": held[1]}
    described: dict[str, Any] = {"format": FORMAT, "model": _signature(model), "settings": settings}
    described |= {"num_text": cache.num_text, "seen": [astuple(row) for row in cache.seen]}
    if (stream := cache.stream) is not None:
        tensors |= {"stream.mask": stream.mask, "stream.next": stream.next_position, "stream.images": stream.images}
    if cache.windows is not None:
        described["windows"] = [[(w.images, w.text, w.behind) for w in row] for row in cache.windows.windows]
        described["image_slots"] = [layer.images for layer in cache.windows.layers]
        for index, window in enumerate(cache.windows.layers):
            tensors |= {f"window.{index}.key": window.key, f"window.{index}.value": window.value}
    try:
        with replacing(path) as unfinished:
            # copies: a safetensors file wants whole, separate tensors
            whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
            save_file(whole, unfinished, {"casa": json.dumps(described, separators=(",", ":"))})
    except (OSError, SafetensorError) as error:
        raise UserError(f"the session cannot be saved as {path}: {error}") from error


def load(path: str | Path, model: CasaForConditionalGeneration) -> tuple[CasaCache, dict[str, Any], Tensor]:
    """The cache, settings and generator state that `save` wrote. Raises UserError if the model is another one."""
    described, tensors = read(path, with_tensors=True)
    if described["model"] != _signature(model):
        raise UserError(f"{path} is a session of another model; load it with the model that it was made with.")
    generator = tensors.pop("generator")
    tensors = {name: value.to(model.device) for name, value in tensors.items()}
    cache = model.new_cache()
    for index in range(len(model.decoder.blocks)):
        if f"text.{index}.key" in tensors:
            cache.text.update(tensors[f"text.{index}.key"], tensors[f"text.{index}.value"], index)
    cache.num_text = described["num_text"]
    cache.seen = [Seen(*row) for row in described["seen"]]
    if "stream.mask" in tensors:
        cache.stream = StreamState(*(tensors[f"stream.{name}"] for name in ("mask", "next", "images")))
    if "windows" in described:
        layers = [
            LayerWindow(tensors[f"window.{index}.key"], tensors[f"window.{index}.value"], images)
            for index, images in enumerate(described["image_slots"])
        ]
        cache.windows = WindowState([[WindowExtent(*one) for one in row] for row in described["windows"]], layers)
    return cache, described["settings"], generator


def read(path: str | Path, with_tensors: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description that `save` wrote, and its tensors if they are wanted. Raises UserError for any other file."""
    wrong = f"{path} is not a saved session; give the file that session.save wrote."
    try:
        with safe_open(str(path), framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("casa", "{}"))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys() if with_tensors}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"there is no saved session at {path}.") from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(wrong) from error
    if (found := described.get("format")) != FORMAT:
        known = str(found).startswith(ANY_FORMAT)
        raise UserError(f"{path} is a session that another version of casa saved; begin a new one." if known else wrong)
    return described, tensors


def _signature(model: CasaForConditionalGeneration) -> list[Any]:
    """What tells whether a session fits a model."""
    config, fusion = model.config.get_text_config(), model.fusion
    sizes = [len(model.decoder.blocks), config.num_key_value_heads, model.decoder.attention(0).head_dim]
    return [*sizes, list(model.fused_blocks), fusion.method, fusion.placement, str(model.dtype)]
