"""Pictures that were looked at are not looked at again: their keys and values are kept, for any question and process.

    pixels (P, c) -> key -> in memory? -> in the folder? -> encode and project, and keep in both

A key is a digest of all that changes the result: the pixels as the model gets them (so the picture and the processor's
settings), the weights on the image side, adapters, config, precision, device and versions; and of a scope, within
which pictures are shared. Shapes: P patches, c channels of a patch, N image tokens, K and d_v as `image_keys_values`
and `encode_images` have them.
"""

import copy
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedConfig

from casa.atomic import DiskCache
from casa.errors import UserError
from casa.models.decoding import Watch
from casa.models.modeling_casa import CasaForConditionalGeneration

Tensors = dict[str, Tensor]

MIB = 2**20
MADE = ("image_keys_values", "image_features")  # what stands for a picture's pixels; the second under insertion
VERSIONS = tuple(version(name) for name in ("casa-vlm", "torch", "transformers"))
DIGEST = hashlib.sha256  # in hardware, where blake2 is not
# what PEFT's layers say of themselves beside their weights
ADAPTERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


@torch.no_grad()
def encode_pixels(model: CasaForConditionalGeneration, images: Mapping[str, Tensor]) -> Tensors:
    """What a model makes of pictures before it reads any text; stands for their pixels in a call.

    Args:
        model: Whose image side is run.
        images: `pixel_values` (P, c) and `image_grid_thw` (n, 3), on any device.

    Returns:
        On the model's device, `image_keys_values` (N, K), or `image_features` (N, d_v) under insertion, which has none;
        and `image_grid_thw`.
    """
    grid = images["image_grid_thw"].to(model.device)
    features = model.encode_images(images["pixel_values"].to(model.device), grid)
    return project_features(model, {"image_features": features, "image_grid_thw": grid})


def project_features(model: CasaForConditionalGeneration, images: Tensors) -> Tensors:
    """Pictures with keys and values in the place of features; under insertion, which has none, as they are."""
    if "image_features" not in images or model.fusion.method == "insertion":
        return images
    grid = images["image_grid_thw"]
    return {"image_keys_values": model.image_keys_values(images["image_features"], grid), "image_grid_thw": grid}


class ImageCache:
    """Keys and values of pictures, in memory and in a folder, the longest unused leaving first. For any models.

    Args:
        max_bytes: Held in host memory at most; 0 keeps nothing there.
        folder: Where they are kept too, for other processes and later ones. Files appear whole or not at all; one that
            is damaged is removed, and its picture looked at anew.
        max_folder_bytes: Of all files in the folder.

    Attributes:
        hits, misses: Pictures that were there, and that were looked at.
        held: Bytes in memory now.

    Raises:
        UserError: The folder cannot be made, or a bound is below 0.
    """

    def __init__(
        self,
        max_bytes: int = 512 * MIB,
        folder: str | os.PathLike[str] | None = None,
        max_folder_bytes: int = 4096 * MIB,
    ) -> None:
        if max_bytes < 0 or max_folder_bytes < 0:
            raise UserError("max_bytes and max_folder_bytes are 0 or more.")
        self.max_bytes = max_bytes
        self.folder = None if folder is None else _Folder(folder, max_folder_bytes)
        self.hits = self.misses = self.held = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._sides: WeakKeyDictionary[nn.Module, _ImageSide] = WeakKeyDictionary()

    @classmethod
    def named(cls, where: "ImageCache | str | os.PathLike[str] | None") -> "ImageCache | None":
        """A cache in words: "memory", "off" (None), or the path of a folder; one that is made already, as it is."""
        if where is None or isinstance(where, ImageCache):
            return where
        return None if where == "off" else cls(folder=None if where == "memory" else where)

    def inputs(self, model: CasaForConditionalGeneration, inputs: Mapping[str, Tensor], scope: str = "") -> Tensors:
        """A call's inputs with `image_keys_values` (N, K) in place of `pixel_values`; the rest as it was.

        Args:
            model: In evaluation mode; for one that trains nothing is kept, and its inputs come back as they are.
            inputs: What the processor made, best still on the CPU.
            scope: Pictures are found again within the same scope alone, such as that of one token of a server.
        """
        pixels, grid = inputs.get("pixel_values"), inputs.get("image_grid_thw")
        if pixels is None or grid is None or model.training:
            return dict(inputs)
        made = [self.read(model, model.picked(inputs, [number]), scope) for number in range(len(grid))]
        rest = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        return rest | {name: torch.cat([one[name] for one in made]) for name in MADE if name in made[0]}

    def read(self, model: CasaForConditionalGeneration, image: Mapping[str, Tensor], scope: str = "") -> Tensors:
        """`encode_pixels` of one picture, which is only run if the picture is not there. Any thread may ask."""
        name = MADE[model.fusion.method == "insertion"]
        identity = None if model.training else self._identity(model)
        if identity is None:
            return encode_pixels(model, image)
        key = _key(image, identity, scope)
        found = self._find(key)
        if found is None:
            made = encode_pixels(model, image)
            self.misses += 1
            found = made[name].detach().cpu()
            self._keep(key, found)
            if self.folder is not None:
                self.folder.keep(key, found)
            return made
        self.hits += 1
        return {name: found.to(model.device), "image_grid_thw": image["image_grid_thw"].to(model.device)}

    def clear(self) -> None:
        """Forgets what is in memory. What is in the folder stays."""
        with self._lock:
            self._kept.clear()
            self.held = 0

    def _find(self, key: str) -> Tensor | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = self.folder.find(key) if self.folder is not None else None
        if found is not None:
            self._keep(key, found)
        return found

    def _keep(self, key: str, tensor: Tensor) -> None:
        with self._lock:
            if key in self._kept or tensor.nbytes > self.max_bytes:
                return
            self._kept[key] = tensor
            self.held += tensor.nbytes
            while self.held > self.max_bytes:
                self.held -= self._kept.popitem(last=False)[1].nbytes

    def _identity(self, model: CasaForConditionalGeneration) -> str | None:
        """The name of a model in the state in which it is; None if that cannot be told."""
        side = self._sides.get(model)
        if side is None or not side.fits(model):
            side = self._sides[model] = _ImageSide(model, side)
        if side.is_on_disk:
            return None
        device, autocast = model.device, torch.is_autocast_enabled(model.device.type)
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        precision = torch.get_float32_matmul_precision(), autocast and torch.get_autocast_dtype(device.type)
        settings = side.adapters(), side.settings(model.config), repr(model.fusion)
        return repr((side.digest(), kind, precision, model.config._attn_implementation, VERSIONS, settings))


def _key(image: Mapping[str, Tensor], identity: str, scope: str) -> str:
    """The name of a picture's keys and values, 64 hexadecimal digits."""
    digest = DIGEST(repr((identity, scope, image["image_grid_thw"].tolist())).encode())
    _add(digest, "pixel_values", image["pixel_values"])
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    # as bytes, since numpy has no bfloat16
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _image_side(model: CasaForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    """By name, all weights and buffers but those of the text model, of which keys and values take a few only."""
    decoder = model.decoder
    head = model.get_output_embeddings()
    text = {id(one) for part in (decoder.stack, head) if part is not None for _, one in _tensors(part)}
    yield from ((name, one) for name, one in _tensors(model) if id(one) not in text)
    if model.fusion.method == "insertion":
        return
    used: Iterable[nn.Module] = model.fusion_layers.sources
    last = max(model.fused_blocks, default=-1) + 1
    blocks = decoder.blocks[:last] if model.fusion.update_images else []
    norms = (decoder.blocks[block].get_submodule("input_layernorm") for block in model.fused_blocks)
    for number, module in enumerate(chain(used, norms, blocks)):
        yield from ((f"text.{number}.{name}", one) for name, one in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


class _ImageSide:
    """What changes the keys and values of pictures in a model, as last seen.

    Which tensors and adapters there are is only looked up anew where a module or parameter has another in its place.
    """

    def __init__(self, model: CasaForConditionalGeneration, last: "_ImageSide | None") -> None:
        self._watch, self._fusion = Watch(model, ()), model.fusion
        self._named = list(_image_side(model))
        tensors = [tensor for _, tensor in self._named]
        self.is_on_disk = any(tensor.is_meta for tensor in tensors)  # until it is called
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._first = [tensor.detach().reshape(-1)[:1] for tensor in tensors if tensor.numel()]
        self._places = [(tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        # PEFT's: the weights of those that do not act are there as well
        self._adapters = [pair for pair in model.named_modules() if hasattr(type(pair[1]), "merged_adapters")]
        self._known = None if last is None else last._known
        self._config: tuple[object, str] | None = None

    def fits(self, model: CasaForConditionalGeneration) -> bool:
        """Whether all is where it was."""
        return self._fusion is model.fusion and self._watch.is_unchanged

    def digest(self) -> str:
        """Of all values. torch counts what is written to a tensor, but not through its `.data`: so the first value of
        each is looked at, too, which costs less than all of them.
        """
        values = self._first
        if len({(one.dtype, one.device) for one in values}) > 1:
            # as wide as they are: Apple's GPU has no float64
            wide = torch.float64 if any(one.dtype == torch.float64 for one in values) else torch.float32
            values = [one.to(values[0].device, wide) for one in values]
        state = self._places, [one._version for one in self._counted], torch.cat(values).tolist() if values else []
        if self._known is None or self._known[0] != state:
            self._known = state, _digest_of(self._named)
        return self._known[1]

    def adapters(self) -> list[tuple[str, str]]:
        """Which act, by module."""
        return [(name, repr([getattr(module, about, None) for about in ADAPTERS])) for name, module in self._adapters]

    def settings(self, config: PreTrainedConfig) -> str:
        """A config in words."""
        if self._config is None or self._config[0] != config:
            self._config = copy.deepcopy(config), config.to_json_string(use_diff=False)
        return self._config[1]


def _digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = DIGEST()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        _add(digest, name, tensor)
    return digest.hexdigest()


class _Folder(DiskCache):
    """FOLDER/<two digits>/<the other digits>.safetensors: `kept`, and the digest of its bytes."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        with suppress(OSError):  # it is what people have shown: nobody else's to read
            Path(folder).expanduser().mkdir(mode=0o700, parents=True, exist_ok=True)
        super().__init__(folder, ".safetensors", "keys and values of pictures", "folder", max_bytes)

    def find(self, key: str) -> Tensor | None:
        """What was kept; None if there is nothing. What is damaged is removed."""
        path = self.path(key)
        try:
            whole = path.read_bytes()
            mark, data = whole[:32], whole[32:]
            found = load(data)["kept"] if mark == self._mark(key, data) else None
        except (SafetensorError, KeyError):
            found = None
        except OSError:
            return None
        if found is None:
            path.unlink(missing_ok=True)
            return None
        self.used(path)
        return found

    def keep(self, key: str, tensor: Tensor) -> None:
        data = save({"kept": tensor.contiguous()})

        def write(file: Path) -> None:
            file.write_bytes(self._mark(key, data) + data)

        self.put(key, write)

    @staticmethod
    def _mark(key: str, data: bytes) -> bytes:
        return DIGEST(key.encode() + data).digest()
