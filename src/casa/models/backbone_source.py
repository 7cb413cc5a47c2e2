"""Where a backbone's weights come from, and models saved without them: only what fusion and training added."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import extract_commit_hash

from casa.errors import UserError
from casa.models.backbones import InsertionVLM, family_of
from casa.models.configuration_casa import CasaConfig
from casa.models.gguf import llama_weights
from casa.models.loading import (
    ASSETS,
    WHERE,
    find_file,
    gguf_file,
    is_own,
    load_checked,
    place_of,
    quietly,
    reading,
    resolve,
    weight_files,
)
from casa.models.packed import pack, unpack

if TYPE_CHECKING:
    from casa.models.modeling_casa import CasaForConditionalGeneration

_PREFIX = "backbone."
_SAMPLED = 1024  # values of each tensor that a fingerprint looks at


def load_backbone(name: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """A language model or an insertion VLM with its weights as plain floats.

    Args:
        name: A folder, a GGUF file, a hub id, or an installed package with safetensors or a GGUF file. Of a model of
            casa's own, its backbone is taken.
        kwargs: Those of `from_pretrained`.

    Raises:
        UserError: There is none, its family is not known, or its weights are not complete.
    """
    place, gguf = place_of(name)
    if is_own(place):
        whole: Any = AutoModelForImageTextToText.from_pretrained(place, **kwargs)
        return whole.backbone
    if not gguf:
        return load_checked(_read, name, **kwargs)
    with reading(name, "GGUF weights"):
        return unpacked(load_checked(_read, place, **gguf, **kwargs))


def _read(path: str, gguf_file: str | None = None, revision: str | None = None, **kwargs: Any) -> Any:
    told = {name: value for name, value in (("gguf_file", gguf_file), ("revision", revision)) if value is not None}
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **told)
    kind = AutoModelForImageTextToText if issubclass(family_of(config), InsertionVLM) else AutoModelForCausalLM
    return kind.from_pretrained(path, config=config, trust_remote_code=False, **told, **kwargs)


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """A model as transformers would have it from plain weights, where those of a GGUF file were unpacked for it.

    Raises UserError if they are still packed.
    """
    method = getattr(model, "quantization_method", None)
    if not getattr(model, "is_quantized", False) or getattr(method, "value", method) != "gguf":
        return model
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise UserError(
            "this backbone's GGUF weights are packed, and fusion layers start as copies of its projections; read it "
            "with quantization_config=GgufConfig(dequantize=True), or give adapt the path of the file."
        )
    model.hf_quantizer.remove_quantization_config(model)  # type: ignore[union-attr]
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._is_quantized = False
    return model


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and some values of every tensor, whatever the precision they are kept in."""
    found = hashlib.sha256()
    for name in sorted(weights):
        flat = weights[name].detach().reshape(-1)
        values = flat[:: -(-len(flat) // _SAMPLED) or 1].cpu().double()
        found.update(f"{name} {tuple(weights[name].shape)}".encode() + values.numpy().tobytes())
    return found.hexdigest()


def save_added(
    model: "CasaForConditionalGeneration",
    folder: str | os.PathLike[str],
    backbone: str | Sequence[str] | None,
    packed: bool = False,
    **kwargs: Any,
) -> None:
    """What `model.save_pretrained(folder, added_only=True, ...)` does."""
    names = [str(backbone)] if isinstance(backbone, str | os.PathLike) else list(backbone or ())
    name = names[0] if names else model.backbone_name
    if not name:
        raise UserError(
            "this model does not say where its backbone came from; name it, by a path, a hub id or a package, with "
            "backbone=...",
            field="backbone",
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError("a quantised model has no weight of its backbone's files left; save it whole.")
    # of a hub's, the snapshot that is read now
    file = None if os.path.exists(resolve(name)) else find_file(name, CONFIG_NAME)
    revision = None if file is None else extract_commit_hash(str(file), None)
    original, _ = _original(name, revision)
    weights = kwargs.pop("state_dict", None) or _weights(model)
    kept = {key: weight for key, weight in weights.items() if not _is_same(weight, original.get(key), model.dtype)}
    if original.keys() <= kept.keys():
        raise UserError(f"no weight of the backbone is that of {name}; name the right one, or save the model whole.")
    if not kept:  # nothing was added nor trained, and a folder has a file of weights
        kept = dict(list(weights.items())[:1])
    place = os.path.abspath(name) if os.path.exists(name) else str(name)
    said: dict[str, Any] = {"name": place, "revision": revision, "fingerprint": fingerprint(original)}
    if names[1:]:
        said |= {"also": [str(one) for one in names[1:]], "norms": fingerprint(_norms(original))}
    model.config.backbone_source = said
    try:
        written = pack(kept) if packed else kept
        PreTrainedModel.save_pretrained(model, folder, state_dict=written, save_original_format=False, **kwargs)
    finally:
        model.config.backbone_source = None


def _original(name: str, revision: str | None) -> tuple[dict[str, Tensor], torch.dtype]:
    """A backbone's own weights, and the precision of its files. Raises UserError as `load_backbone` does."""
    file = gguf_file(name)
    if file is not None and (weights := llama_weights(file)) is not None:
        return {_PREFIX + key: weight for key, weight in weights.items()}, torch.float32
    with quietly():
        source = load_backbone(name, dtype="auto", revision=revision)
    return _weights(source, _PREFIX), source.dtype


def _weights(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """All that a folder keeps of a model, but for weights that are others under a second name."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {prefix + name: weight for name, weight in model.state_dict().items() if name not in tied}


def _norms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model keeps as it is when its matrices are quantised."""
    return {name: weight for name, weight in weights.items() if weight.ndim == 1}


def _is_same(weight: Tensor, original: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a weight is bit for bit what is read from its backbone's files, in the model's dtype."""
    if original is None or original.shape != weight.shape:
        return False
    original = _in(dtype, original)
    if original.dtype != weight.dtype:
        return False
    one, other = (part.detach().cpu().reshape(-1).contiguous().view(torch.uint8) for part in (original, weight))
    return torch.equal(one, other)


def _in(dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def with_backbone(
    path: Any, config: CasaConfig, backbone: Any, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """What `from_pretrained(None, ...)` takes for a folder that `save_added` wrote, and where its backbone was.

    Args:
        path: The folder, or its name on a hub.
        config: Its config.
        backbone: Where the backbone is, if not where the config says.
        kwargs: Those of `from_pretrained`, of which the place on a hub is read.

    Raises:
        UserError: The backbone is not there, or has other weights than the one that the model was made with.
    """
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    said = config.backbone_source or {}
    names = [str(backbone)] if backbone else [_found(str(said["name"]), path), *said.get("also", ())]
    told: list[str] = []
    for name in names:
        try:
            original, dtype = _original(name, said["revision"] if name == names[0] and not backbone else None)
            break
        except UserError as error:
            is_package = "/" not in name and not os.path.exists(resolve(name))
            told.append(f"pip install --no-deps {name}" if is_package else str(error).rstrip("."))
    else:
        shown = path if Path(str(path)).parent != ASSETS else Path(path).name
        listed = f"{' or '.join(names)}: {'; '.join(told)}; or give another place with backbone=..."
        raise UserError(f"{shown} leaves out the weights of its backbone, {listed}")
    if fingerprint(original) != said["fingerprint"] and fingerprint(_norms(original)) != said.get("norms"):
        raise UserError(f"{name} is not the backbone that {path} was made with: its weights differ; give that one.")
    # the precision it was saved in, which may be lower than that of the backbone's files
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else dtype
    weights = {key: _in(dtype, weight) for key, weight in original.items()}
    for file in weight_files(path, **where):
        weights |= unpack(load_file(file))
    generation = GenerationConfig.from_pretrained(path, **where)
    return {"config": config, "state_dict": weights, "generation_config": generation}, name


def _found(name: str, path: Any) -> str:
    """A folder that is gone may have moved together with the model."""
    beside = Path(str(path)).parent / Path(name).name
    return str(beside) if os.path.isabs(name) and not os.path.exists(name) and beside.exists() else name
