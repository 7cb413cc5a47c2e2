"""A session's state as one safetensors file: tensors, and what describes them as JSON in its header."""

import json
from dataclasses import astuple
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

FORMAT = "casa session 3"


def save(path: str | Path, cache: CasaCache, settings: dict[str, Any], generator: Tensor) -> None:
    """Writes the state, whole or not at all. Raises UserError if it cannot."""
    tensors = {"generator": generator}
    for index, layer in enumerate(cache.text.layers):
        if getattr(layer, "keys", None) is not None:
            tensors[f"text.{index}.key"], tensors[f"text.{index}.value"] = layer.keys, layer.values  # type: ignore[assignment]
    described: dict[str, Any] = {"format": FORMAT, "settings": settings, "num_text": cache.num_text}
    described["seen"] = [astuple(row) for row in cache.seen]
    if (stream := cache.stream) is not None:
        tensors |= {"stream.mask": stream.mask, "stream.next": stream.next_position, "stream.images": stream.images}
    if cache.windows is not None:
        described["windows"] = [[(w.images, w.text, w.behind) for w in row] for row in cache.windows.windows]
        described["image_slots"] = [layer.images for layer in cache.windows.layers]
        for index, layer in enumerate(cache.windows.layers):
            tensors[f"window.{index}.key"], tensors[f"window.{index}.value"] = layer.key, layer.value
    try:
        with replacing(path) as unfinished:
            # copies: a safetensors file wants whole, separate tensors
            whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
            save_file(whole, unfinished, {"casa": json.dumps(described, separators=(",", ":"))})
    except (OSError, SafetensorError) as error:
        raise UserError(f"the session cannot be saved as {path}: {error}") from error


def load(path: str | Path, model: CasaForConditionalGeneration) -> tuple[CasaCache, dict[str, Any], Tensor]:
    """The cache, settings and generator state that `save` wrote. Raises UserError for anything else."""
    described, tensors = _read(path, True)
    generator = tensors.pop("generator")
    tensors = {name: value.to(model.device) for name, value in tensors.items()}
    cache = model.new_cache()
    _check_fits(path, tensors, model)
    for index in range(len(model.decoder.blocks)):
        if f"text.{index}.key" in tensors:
            cache.text.update(tensors[f"text.{index}.key"], tensors[f"text.{index}.value"], index)
    cache.num_text = described["num_text"]
    cache.seen = [Seen(*row) for row in described.get("seen", ())]
    if "stream.mask" in tensors:
        cache.stream = StreamState(*(tensors[f"stream.{name}"] for name in ("mask", "next", "images")))
    if "windows" in described:
        layers = [
            LayerWindow(tensors[f"window.{index}.key"], tensors[f"window.{index}.value"], images)
            for index, images in enumerate(described["image_slots"])
        ]
        windows = [[WindowExtent(*window) for window in row] for row in described["windows"]]
        cache.windows = WindowState(windows, layers)
    return cache, described["settings"], generator


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save` wrote. Raises UserError for anything else."""
    return _read(path, False)[0]["settings"]


def _read(path: str | Path, whole: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description, and the tensors too if the whole is wanted."""
    try:
        with safe_open(str(path), framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("casa", "{}"))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys() if whole}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"there is no saved session at {path}.") from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a saved session; give the file that session.save wrote.") from error
    if described.get("format") != FORMAT:
        raise UserError(f"{path} is not a saved session; give the file that session.save wrote.")
    return described, tensors


def _check_fits(path: str | Path, tensors: dict[str, Tensor], model: CasaForConditionalGeneration) -> None:
    config = model.config.get_text_config()
    heads, width = config.num_key_value_heads, model.decoder.attention(0).head_dim
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("text.")}
    layers = {int(name.split(".")[1]) for name in tensors if name.startswith("window.")}
    kept = len(model.decoder.blocks) - (len(model.fused_blocks) if model.fusion.placement == "replace" else 0)
    shapes = [t for name, t in tensors.items() if name.endswith((".key", ".value"))]
    fits = (
        (not blocks or len(blocks) == kept)
        and (not layers or len(layers) == len(model.fused_blocks))
        and all(t.shape[1] == heads and t.shape[3] == width and t.dtype == model.dtype for t in shapes)
    )
    if not fits:
        raise UserError(f"{path} is a session of another model; load it with the model that it was made with.")
