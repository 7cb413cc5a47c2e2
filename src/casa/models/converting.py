"""What `adapt` does, folder to folder and tensor by tensor: for models that do not fit into memory twice, or at all.

The fused model is built on the meta device, which gives every name and shape without a weight. Each weight of the new
checkpoint then has one source: a tensor of the backbone's or the tower's files, zeros, or a small fresh part.
"""

import copy
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from casa.errors import UserError
from casa.models.adapt import adapt
from casa.models.config import CasaConfig
from casa.models.configs import read_config, skeleton
from casa.models.freezing import ADDED
from casa.models.fusion_config import FusionConfig
from casa.models.loading import UNREADABLE, check_folder, place_of, sentence_of
from casa.models.model import CasaForConditionalGeneration
from casa.models.shard_files import Planned, Stored, new_folder, parse_size, stored_tensors, write_shards
from casa.models.shipped import resolve
from casa.vision.encoder import BESIDE_TOWER, TOWER, tower_config_of

# of what `adapt` adds, the parts that have no weights to start from
FRESH = tuple(name for name in ADDED if name != "casa_layers")


def convert(
    backbone: Any,
    out: Any,
    fusion: FusionConfig | None = None,
    vision: Any = None,
    dtype: torch.dtype | None = None,
    *,
    max_shard_size: str = "2GB",
    beside: Callable[[Path], Any] | None = None,
) -> CasaForConditionalGeneration:
    """Writes to the new folder `out` what `adapt(backbone, fusion, vision).save_pretrained(out)` would.

    backbone, vision: folders with safetensors files, or names on the hub; of the backbone, a GGUF file too. vision: of
        an image encoder, or of a whole model that has one; only for text-only backbones.
    dtype: of all weights; if left out, each checkpoint's own.
    beside: called with the unfinished folder, to put more into it (a processor). The folder appears when all is done.

    In memory there is never more than a tensor of the checkpoint and the fresh parts (projector, compressor, gist),
    whose random start follows torch's seed; an insertion model of casa's own is read whole, and so is a GGUF file.
    Returns the model on the meta device: names and shapes, no weights.
    Raises UserError as `adapt` does, and for weights that are missing, surplus or of another shape.
    """
    most_bytes = parse_size(max_shard_size)
    fusion = fusion if fusion is not None else FusionConfig()
    if place_of(backbone)[1]:
        return _whole(backbone, out, fusion, vision, dtype, max_shard_size, beside)
    source = _folder(backbone)
    config = read_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{backbone} is quantised; adapt the weights it was made from.")
    if isinstance(config, CasaConfig):
        return _whole(source, out, fusion, vision, dtype, max_shard_size, beside)
    tower_source = None if vision is None else _folder(vision)
    tower_config = None if tower_source is None else tower_config_of(read_config(tower_source))
    model = skeleton(config, fusion, tower_config)
    stored = stored_tensors(source)
    dtype_of = {"backbone": dtype or _own_dtype(config, stored)}
    sources = _backbone_sources(model, stored, backbone)
    if tower_source is not None:
        tower_stored = stored_tensors(tower_source)
        dtype_of["vision"] = dtype or _own_dtype(tower_config, tower_stored)
        sources |= _tower_sources(model, tower_stored, vision)
    planned = _plan(model, sources, dtype_of, fusion.output == "zero")
    with new_folder(out) as folder:
        _check_room(out, folder, sum(tensor.size for tensor in planned))
        write_shards(folder, planned, most_bytes)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = dtype_of["backbone"]
        if dtype is not None:
            _say(model.config, dtype)
        model.config.save_pretrained(folder)
        _generation_config(source, model).save_pretrained(folder)
        if beside is not None:
            beside(folder)
    return model


def _whole(
    source: Any,
    out: Any,
    fusion: FusionConfig,
    vision: Any,
    dtype: torch.dtype | None,
    max_shard_size: str,
    beside: Callable[[Path], Any] | None,
) -> CasaForConditionalGeneration:
    model: Any = adapt(str(source), fusion, vision)
    model = model if dtype is None else model.to(dtype)
    with new_folder(out) as folder:
        _check_room(out, folder, sum(p.numel() * p.element_size() for p in model.parameters()))
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if beside is not None:
            beside(folder)
    return model.to("meta")


def _check_room(out: Any, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{out} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB; free some space.")


def _say(config: Any, dtype: torch.dtype) -> None:
    """Writes the dtype of all weights into a config and those inside it."""
    config.dtype = dtype
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None:
            _say(inner, dtype)


def _folder(name: Any) -> Path:
    name = resolve(name)
    check_folder(name)
    path = Path(str(name))
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be fetched: {sentence_of(error)}") from error


def _own_dtype(config: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """What transformers would load a checkpoint in: as its config says, or as its first floating-point weight is."""
    said = getattr(config, "dtype", None)
    if isinstance(said, torch.dtype):
        return said
    floats = [tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point]
    return floats[0] if floats else torch.float32


def _backbone_sources(
    model: CasaForConditionalGeneration, stored: Mapping[str, Stored], where: Any
) -> dict[str, Stored]:
    """The file tensor of every backbone weight, by its name in the fused model."""
    family = type(model.decoder)
    ignored = [re.compile(p) for p in getattr(model.backbone, "_keys_to_ignore_on_load_unexpected", None) or ()]

    def name_of(key: str) -> str | None:
        for pattern, replacement in family.key_map:
            key = re.sub(pattern, replacement, key)
        return None if any(pattern.search(key) for pattern in ignored) else key

    return _matched(model, "backbone.", stored, name_of, where)


def _tower_sources(model: CasaForConditionalGeneration, stored: Mapping[str, Stored], where: Any) -> dict[str, Stored]:
    """The file tensor of every weight of a separate image encoder, by its name in the fused model."""
    own = set(model.get_submodule("vision").state_dict())

    def name_of(key: str) -> str | None:
        if key in own:
            return key
        inner = re.sub(TOWER, "", key)
        # the other parts of a whole model are not asked for
        return None if inner not in own and BESIDE_TOWER.match(inner) else inner

    return _matched(model, "vision.", stored, name_of, where)


def _matched(
    model: CasaForConditionalGeneration,
    prefix: str,
    stored: Mapping[str, Stored],
    name_of: Callable[[str], str | None],
    where: Any,
) -> dict[str, Stored]:
    """Names below `prefix` with their file tensors. Raises UserError unless they are exactly the model's."""
    tied = _tied(model)
    expected = {n: tuple(p.shape) for n, p in model.state_dict().items() if n.startswith(prefix) and n not in tied}
    found: dict[str, Stored] = {}
    for key, tensor in stored.items():
        inner = name_of(key)
        if inner is None or prefix + inner in tied:
            continue
        name = prefix + inner
        if name not in expected:
            raise UserError(f"{where} has a weight {key} that this model does not; casa has no key map for such files.")
        if name in found:
            raise UserError(f"{where} has the weight {name} twice, as {found[name].key} and as {key}.")
        if tensor.shape != expected[name]:
            raise UserError(f"{key} in {where} has shape {tensor.shape}, and its config asks for {expected[name]}.")
        found[name] = tensor
    if missing := [name for name in expected if name not in found]:
        first = missing[0].removeprefix(prefix)
        raise UserError(f"{where} lacks {len(missing)} of its weights, the first is {first}; fetch it again.")
    return found


def _tied(model: CasaForConditionalGeneration) -> set[str]:
    """Names of weights that are another weight under a second name, and are not saved."""
    patterns = list(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else []
    return {name for name in model.state_dict() if any(p == name or re.fullmatch(p, name) for p in patterns)}


def _plan(
    model: CasaForConditionalGeneration, sources: Mapping[str, Stored], dtype_of: Mapping[str, torch.dtype], zero: bool
) -> list[Planned]:
    """Every weight of the new checkpoint, in the model's order."""
    tied, fresh, planned = _tied(model), _fresh_parts(model), []
    for name, like in model.state_dict().items():
        if name in tied:
            continue
        part = name.split(".")[0]
        dtype = dtype_of.get(part, dtype_of["backbone"])
        shape = tuple(like.shape)
        if part == "casa_layers":
            _, block, inner = name.split(".", 2)
            if inner == "gate" or (zero and inner.startswith("o_proj.")):
                planned.append(Planned(name, shape, dtype, lambda shape=shape: torch.zeros(shape)))
                continue
            stored = sources[f"{_attention_name(model, int(block))}.{inner}"]
        elif name in fresh:
            planned.append(Planned(name, shape, dtype, lambda name=name: fresh[name]))
            continue
        else:
            stored = sources[name]
        kept = dtype if stored.dtype.is_floating_point else stored.dtype
        planned.append(Planned(name, shape, kept, stored.read))
    return planned


def _attention_name(model: CasaForConditionalGeneration, block: int) -> str:
    attention = model.decoder.attention(block)
    return next(name for name, module in model.named_modules() if module is attention)


def _fresh_parts(model: CasaForConditionalGeneration) -> dict[str, Tensor]:
    """The parts that start at random, for real, as `adapt` makes them."""
    found: dict[str, Tensor] = {}
    for name in FRESH:
        if (meta := getattr(model, name, None)) is None:
            continue
        part: Any = copy.deepcopy(meta).to_empty(device="cpu")
        for module in part.modules():
            for parameter in module.parameters(recurse=False):
                # transformers leaves alone what it has initialised already
                parameter._is_hf_initialized = False
            model._init_weights(module)
        if name == "compressor":
            part.reset_parameters()
        found |= {f"{name}.{key}": value.detach() for key, value in part.state_dict().items()}
    return found


def _generation_config(folder: Path, model: CasaForConditionalGeneration) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return model.generation_config or GenerationConfig()
