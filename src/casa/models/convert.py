"""What `adapt` does, folder to folder: for models that do not fit into memory twice, or at all.

The fused model is built on the meta device, which gives every name and shape without a weight. Each weight of the new
checkpoint then has one source: a tensor of the backbone's or the tower's files, zeros, or a small fresh part.
"""

import copy
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from casa.errors import UserError
from casa.models.adapt import ADDED, adapt, configs_in, skeleton
from casa.models.configuration_casa import CasaConfig, FusionConfig
from casa.models.loading import UNREADABLE, check_folder, place_of, read_config, resolve, sentence_of, weight_files
from casa.models.modeling_casa import CasaForConditionalGeneration
from casa.models.processing_casa import CasaProcessor
from casa.vision.encoder import BESIDE_TOWER, TOWER, tower_config_of

# what safetensors files call the precisions that models are kept in
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# of what `adapt` adds, the parts that have no weights to start from
_FRESH = tuple(name for name in ADDED if name != "casa_layers")

Beside = Callable[[Path], Any]


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


def convert(
    backbone: Any,
    out: Any,
    fusion: FusionConfig | None = None,
    vision: Any = None,
    dtype: torch.dtype | None = None,
    *,
    max_shard_size: str = "2GB",
    beside: Beside | None = None,
) -> CasaForConditionalGeneration:
    """Writes to the new folder `out` what `adapt(backbone, fusion, vision).save_pretrained(out)` would.

    In memory there is never more than one file of the result and the fresh parts (projector, compressor, gist), whose
    random start follows torch's seed; an insertion model of casa's own is read whole, and so is a GGUF file.

    Args:
        backbone: A folder with safetensors files or a GGUF file, that file, or a name on the hub.
        out: The new folder. It appears when all is done.
        fusion: CASA⊕ in every block if left out.
        vision: A folder or hub name of an image encoder, or of a model that has one; only for text-only backbones.
        dtype: Of all weights; if left out, each checkpoint's own.
        max_shard_size: The largest file of weights.
        beside: Called with the unfinished folder, to put more into it (a processor).

    Returns:
        The model on the meta device: names and shapes, no weights.

    Raises:
        UserError: `adapt` would, or weights are missing, surplus or of another shape.
    """
    most_bytes = parse_size(max_shard_size)
    fusion = fusion if fusion is not None else FusionConfig()
    if place_of(backbone)[1]:
        return _whole(backbone, out, fusion, vision, dtype, most_bytes, beside)
    source = _folder(backbone)
    config = read_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{backbone} is quantised; adapt the weights it was made from.")
    if isinstance(config, CasaConfig):
        return _whole(source, out, fusion, vision, dtype, most_bytes, beside)
    tower = None if vision is None else _folder(vision)
    tower_config = None if tower is None else tower_config_of(read_config(tower))
    model = skeleton(config, fusion, tower_config)
    stored = stored_tensors(source)
    dtypes = {"backbone": dtype or _own_dtype(config, stored)}
    sources = _matched(model, "backbone.", stored, _backbone_name(model), backbone)
    if tower is not None and tower_config is not None:
        of_tower = stored_tensors(tower)
        dtypes["vision"] = dtype or _own_dtype(tower_config, of_tower)
        sources |= _matched(model, "vision.", of_tower, _tower_name(model), vision)
    makers = _makers(model, sources, zero=fusion.output == "zero")
    planned = {
        name: like.to(dtypes.get(name.split(".")[0], dtypes["backbone"])) if like.is_floating_point() else like
        for name, like in model.state_dict().items()
        if name in makers
    }
    with new_folder(out) as folder:
        _check_room(out, folder, planned)
        _write(folder, planned, makers, most_bytes)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = dtypes["backbone"]
        if dtype is not None:
            for part in configs_in(model.config):
                part.dtype = dtype
        model.config.save_pretrained(folder)
        has_own = (source / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(source) if has_own else model.generation_config
        (generation or GenerationConfig()).save_pretrained(folder)
        if beside is not None:
            beside(folder)
    return model


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
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMG])(I?))?B?", text.strip().upper())
    count = 0
    if found is not None:
        number, unit, binary = found.groups()
        count = int(float(number) * (1024 if binary else 1000) ** " KMG".index(unit or " "))
    if count < 1:
        raise UserError(f"{text!r} is no size; write it as in 2GB or 500MB.")
    return count


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint's safetensors files, by key; none is read.

    Raises UserError for a folder without such files, for weights of other kinds, and for a file that is damaged.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(key)
                    if (code := part.get_dtype()) not in _DTYPES:
                        raise UserError(f"{key} in {path} is of dtype {code}; give weights that are not quantised.")
                    found[key] = Stored(path, key, tuple(part.get_shape()), _DTYPES[code])
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again.") from error
    return found


def _whole(
    source: Any,
    out: Any,
    fusion: FusionConfig,
    vision: Any,
    dtype: torch.dtype | None,
    most_bytes: int,
    beside: Beside | None,
) -> CasaForConditionalGeneration:
    model = adapt(str(source), fusion, vision)
    if dtype is not None:
        torch.nn.Module.to(model, dtype=dtype)
    with new_folder(out) as folder:
        _check_room(out, folder, dict(model.named_parameters()))
        model.save_pretrained(folder, max_shard_size=most_bytes)
        if beside is not None:
            beside(folder)
    torch.nn.Module.to(model, device="meta")
    model.tie_weights()  # which the move has parted
    return model


def _check_room(out: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    needed, free = sum(weight.nbytes for weight in weights.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{out} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB; free some space.")


def _folder(name: Any) -> Path:
    name = resolve(name)
    check_folder(name)
    path = Path(str(name))
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be fetched: {sentence_of(error)}") from error


def _own_dtype(config: PreTrainedConfig, stored: Mapping[str, Stored]) -> torch.dtype:
    """What transformers would load a checkpoint in: as its config says, or as its first floating-point weight is."""
    if isinstance(said := getattr(config, "dtype", None), torch.dtype):
        return said
    return next((tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point), torch.float32)


def _backbone_name(model: CasaForConditionalGeneration) -> Callable[[str], str | None]:
    """What the backbone itself calls a weight of its files; None for one that it ignores."""
    key_map = type(model.decoder).key_map
    ignored: Any = getattr(model.backbone, "_keys_to_ignore_on_load_unexpected", None) or ()

    def name_of(key: str) -> str | None:
        for pattern, replacement in key_map:
            key = re.sub(pattern, replacement, key)
        return None if any(re.search(pattern, key) for pattern in ignored) else key

    return name_of


def _tower_name(model: CasaForConditionalGeneration) -> Callable[[str], str | None]:
    """What the image encoder calls a weight of its files; None for the other parts of a whole model."""
    own = set(model.vision.state_dict())

    def name_of(key: str) -> str | None:
        inner = key if key in own else re.sub(TOWER, "", key)
        return None if inner not in own and BESIDE_TOWER.match(inner) else inner

    return name_of


def _matched(
    model: CasaForConditionalGeneration,
    prefix: str,
    stored: Mapping[str, Stored],
    name_of: Callable[[str], str | None],
    where: Any,
) -> dict[str, Stored]:
    """Names below `prefix` with their file tensors. Raises UserError unless they are exactly the model's."""
    tied = model.all_tied_weights_keys
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


def _makers(
    model: CasaForConditionalGeneration, sources: Mapping[str, Stored], zero: bool
) -> dict[str, Callable[[], Tensor]]:
    """Where every weight of the new checkpoint comes from, by its name. zero: fusion layers begin silently."""
    found: dict[str, Callable[[], Tensor]] = {name: stored.read for name, stored in sources.items()}
    found |= {name: weight.clone for name, weight in _fresh_weights(model).items()}
    names = {id(module): name for name, module in model.named_modules()}
    for name, like in model.casa_layers.state_dict().items():
        block, _, inner = name.partition(".")
        if inner == "gate" or (zero and inner.startswith("o_proj.")):
            shape = tuple(like.shape)
            found[f"casa_layers.{name}"] = lambda shape=shape: torch.zeros(shape)
        else:
            attention = names[id(model.decoder.attention(int(block)))]
            found[f"casa_layers.{name}"] = sources[f"{attention}.{inner}"].read
    return found


def _fresh_weights(model: CasaForConditionalGeneration) -> dict[str, Tensor]:
    """Of the parts that start at random, for real, as `adapt` makes them."""
    found: dict[str, Tensor] = {}
    for name in _FRESH:
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


def _write(
    folder: Path, planned: Mapping[str, Tensor], makers: Mapping[str, Callable[[], Tensor]], most_bytes: int
) -> None:
    """Files of at most `most_bytes` (or one tensor), one after the other. planned: shapes and precisions, by name."""
    shards = split_torch_state_dict_into_shards(dict(planned), max_shard_size=most_bytes)
    for file, names in shards.filename_to_tensors.items():
        tensors = {}
        for name in names:
            made = makers[name]()
            if made.shape != planned[name].shape:
                raise RuntimeError(f"{name} was made in shape {tuple(made.shape)}, not {tuple(planned[name].shape)}")
            tensors[name] = made.to(planned[name].dtype).contiguous()
        save_file(tensors, folder / file, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
