"""What `adapt` does, folder to folder and tensor by tensor: for models that do not fit into memory twice, or at all.

The fused model is built on the meta device, which gives every name and shape without a weight. Each weight of the new
checkpoint then has one source: a tensor of the backbone's or the tower's files, zeros, or a small fresh part.
"""

import copy
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig

from casa.atomic import replacing
from casa.errors import UserError
from casa.models.adapt import ADDED, adapt, skeleton
from casa.models.configuration_casa import CasaConfig, FusionConfig
from casa.models.loading import UNREADABLE, check_folder, place_of, read_config, resolve, sentence_of
from casa.models.modeling_casa import CasaForConditionalGeneration
from casa.models.processing_casa import CasaProcessor
from casa.vision.encoder import BESIDE_TOWER, TOWER, tower_config_of

_CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor. The file is opened for it alone: pages mapped for it go away with it."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.key)


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `make` is called when its turn has come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        count = self.dtype.itemsize
        for side in self.shape:
            count *= side
        return count


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint's safetensors files, by key; none is read.

    Raises UserError for a folder without such files, for weights of other kinds, and for a file that is damaged.
    """
    files = _files(folder)
    found: dict[str, Stored] = {}
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing; fetch it again.")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(key)
                    code = part.get_dtype()
                    if code not in _CODES:
                        raise UserError(f"{key} in {path} is of dtype {code}; give weights that are not quantised.")
                    found[key] = Stored(path, key, tuple(part.get_shape()), _CODES[code])
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again.") from error
    return found


def _files(folder: Path) -> list[Path]:
    # in the order in which transformers looks for them
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise UserError(_nothing_to_read(folder))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        names = []
    # no file outside of the folder
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{index} cannot be read; fetch it again.")
    return [folder / name for name in names]


def _nothing_to_read(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (
            f"{folder} holds its weights as pickles, which casa does not open; "
            "load them with transformers and save_pretrained them as safetensors first."
        )
    return f"{folder} has no model.safetensors nor an index of several; give the folder that save_pretrained wrote."


def write_shards(folder: Path, tensors: Sequence[Planned], most_bytes: int) -> None:
    """Writes `model.safetensors`, or several files of at most `most_bytes` (or one tensor) and their index.

    Each file appears whole or not at all. Raises UserError if the folder cannot be written.
    """
    shards = _divided(tensors, most_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with replacing(folder / name) as unfinished, open(unfinished, "wb") as file:
            _write(file, shard)
    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": dict(sorted(places.items()))}
        with replacing(folder / "model.safetensors.index.json") as unfinished:
            unfinished.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _divided(tensors: Sequence[Planned], most_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def _write(file: BinaryIO, tensors: Sequence[Planned]) -> None:
    # wider dtypes first: every tensor then starts at a multiple of its own width
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        place = [offset, offset + tensor.size]
        header[tensor.name] = {"dtype": _CODE_OF[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
        made = tensor.make().to(tensor.dtype)
        if tuple(made.shape) != tensor.shape:
            raise RuntimeError(f"{tensor.name} was made in shape {tuple(made.shape)}, not {tensor.shape}")
        file.write(memoryview(made.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def check_new(path: str | os.PathLike[str]) -> None:
    """Raises UserError if `path` exists and is no empty folder."""
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists already; name a new folder.")


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh folder beside `path`, which becomes `path` if the block ends well and is removed if it does not.

    Raises UserError if `path` exists and is no empty folder, or cannot be made.
    """
    check_new(path)
    target = Path(path)
    unfinished = target.absolute().parent / f".casa-{secrets.token_hex(8)}.part"
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target} cannot be made ({error.strerror}): write elsewhere.") from error
    try:
        yield unfinished
        if target.is_dir():
            # a rename over a folder, even an empty one, is not allowed everywhere
            target.rmdir()
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def parse_size(text: str) -> int:
    """Bytes of "2GB", "500MB", "64MiB" or a bare number. Raises UserError for anything else."""
    digits = text.strip().rstrip("BbKkMmGgIi ")
    unit = text.strip()[len(digits) :].strip().upper() or "B"
    try:
        count = int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        raise UserError(f"{text!r} is no size; write it as in 2GB or 500MB.")
    return count


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


def merge(source: Any, out: Any, dtype: torch.dtype | None = None) -> None:
    """Writes to the new folder `out` a model with the weights of the backbone that its folder leaves out.

    Args:
        source: A folder or hub name of a model of casa's own, with its processor.
        out: The new folder.
        dtype: Of all weights; the model's if left out.

    Raises:
        UserError: `out` exists, or the model or its backbone cannot be read.
    """
    check_new(out)
    processor = CasaProcessor.from_pretrained(source)
    model = CasaForConditionalGeneration.from_pretrained(source, dtype=dtype or "auto")
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


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
