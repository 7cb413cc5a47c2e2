"""Image encoders behind one set of functions: pixels in, the image tokens the text model may look at out.

Shapes: P patches, n images, N image tokens (after the encoder's own merge), d_v width of an encoder's token,
k extra feature sets per token (Qwen3-VL's deep-stack levels; 0 for the others).

Every function is keyed by the encoder's transformers config. What casa knows of an encoder is its `EncoderSpec`;
`register_encoder` adds one (docs/adding-an-encoder.md). casa's own are in towers.py and page_encoder.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from casa.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Grids = list[tuple[int, int]]
"""Rows and columns of tokens of each image, whose tokens are in reading order."""


@dataclass(frozen=True)
class EncoderSpec:
    """What casa knows of one image encoder of transformers.

    Attributes:
        model: Its class, a PreTrainedModel; or its dotted name below `transformers.models`, imported when asked for.
        pictures: How its pixels come. "patches": (P, channels of a patch), in squares of merged patches, as the Qwen
            towers have it; "flexible": (P, p * p * channels), plain reading order; "squares": (n, 3, H, W); "own": as
            the encoder's own image processor makes them, with one row of pixel_values per patch.
        run: Encoder, pixels, int64 (n, 3) patch grids to (N, (1 + k) * d_v), images in order, each in reading order.
        width: d_v.
        merge: Patches per side of one token.
        depths: k.
        resample: The filter its pictures were resized with, by its PIL name.
        clip_colours: Whether colours were normalised by CLIP's means and deviations; else they run from -1 to 1.
        image_processor: For "own", config and a bound for a picture's area (None: the encoder's own) to a transformers
            image processor. It makes `pixel_values` and `image_grid_thw`, int64 (n, 3), (1, rows, columns) in patches,
            and says more, so that a picture's cost is known before it is opened: `max_pixels`; `patch_grid(height,
            width, **bound)`, its rows and columns; `at_most(patches)`, the `bound` under which no picture has more
            patches.
        flops: Encoder, rows and columns of patches to its operations for one picture; left out, those of a transformer.
    """

    model: "type[PreTrainedModel] | str"
    pictures: str
    run: Callable[[Any, Tensor, Tensor], Tensor]
    width: "Callable[[PreTrainedConfig], int]" = lambda config: config.hidden_size
    merge: "Callable[[PreTrainedConfig], int]" = lambda config: 1
    depths: "Callable[[PreTrainedConfig], int]" = lambda config: 0
    resample: str = "bicubic"
    clip_colours: bool = False
    image_processor: "Callable[[PreTrainedConfig, int | None], Any] | None" = None
    flops: Callable[[Any, int, int], int] | None = None

    @property
    def model_class(self) -> "type[PreTrainedModel]":
        if not isinstance(self.model, str):
            return self.model
        module, _, name = self.model.rpartition(".")
        return getattr(import_module(f"transformers.models.{module}"), name)


SPECS: dict[str, EncoderSpec] = {}


def register_encoder(model_type: str, spec: EncoderSpec) -> None:
    """Makes an image encoder known to `adapt`, and its folders to everything that loads models.

    transformers' AutoConfig and AutoModel learn of it too, if `spec.model` is a class. An image processor of its own is
    registered by its own module, with AutoImageProcessor.

    Args:
        model_type: The `model_type` of its config's class.
        spec: What casa needs to know of it.
    """
    SPECS[model_type] = spec
    if not isinstance(spec.model, str):
        from transformers import AutoConfig, AutoModel

        AutoConfig.register(model_type, spec.model.config_class, exist_ok=True)
        AutoModel.register(spec.model.config_class, spec.model, exist_ok=True)


# where whole models, casa's own among them, keep their tower, and what else is in them
TOWER = r"^(backbone\.)?(model\.)?(visual|vision_model|vision_tower|vision)\.(vision_model\.)?"
BESIDE_TOWER = re.compile(
    r"(model|text_model|language_model|lm_head|logit_scale|logit_bias|connector|multi_modal_projector|image_newline"
    r"|backbone|casa_layers|projector|compressor|gist)\b"
)


def kind_of(config: object) -> str | None:
    """The `model_type` of a config's class. One read from a published file may itself say that of the whole model:
    transformers 5.17 keeps what the file says, and Qwen's files call a tower "qwen2_5_vl".
    """
    return getattr(type(config), "model_type", None) or getattr(config, "model_type", None)


def is_known(config: object) -> bool:
    """Whether `config` is one of an image encoder that casa knows (not of a whole model that has one)."""
    return kind_of(config) in SPECS


def spec_of(config: "PreTrainedConfig") -> EncoderSpec:
    """Raises UserError, naming the known encoders, for a config of anything else."""
    kind = kind_of(config)
    if kind in SPECS:
        return SPECS[kind]
    name = kind or type(config).__name__
    if is_known(inner := getattr(config, "vision_config", None)):
        raise UserError(f"{name!r} is a whole model; give its image encoder, a {kind_of(inner)!r}.")
    raise UserError(
        f"{name!r} is no image encoder that casa knows; the known ones are: {', '.join(SPECS)}; "
        "docs/adding-an-encoder.md shows how to add one."
    )


def encoder_class(config: "PreTrainedConfig") -> "type[PreTrainedModel]":
    """The transformers class of an encoder, also where AutoModel does not list it."""
    return spec_of(config).model_class


def new_encoder(config: "PreTrainedConfig") -> "PreTrainedModel":
    """An image encoder with fresh weights, from its config."""
    return encoder_class(config)._from_config(config)


def load_encoder(path: Any, **kwargs: Any) -> Any:
    """Loads an encoder from its folder, or the tower alone from the folder of a whole model (SigLIP, a VLM).

    Args:
        path: As for `from_pretrained`.
        kwargs: Those of `from_pretrained`.

    Returns:
        The encoder; with `output_loading_info=True` (encoder, info), where the weights of a whole model's other parts
        are not counted as unexpected.

    Raises:
        UserError: casa does not know the encoder, or the whole model is quantised.
    """
    from transformers import AutoConfig

    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if is_known(config):
        return encoder_class(config).from_pretrained(path, config=config, **kwargs)
    vision = _inner(config)
    kind = encoder_class(vision if vision is not None else config)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{path} is quantised; take the tower of the weights it was made from.")
    wanted = kwargs.pop("output_loading_info", False)
    kwargs["key_mapping"] = {TOWER: ""} | (kwargs.get("key_mapping") or {})
    loaded: Any = kind.from_pretrained(path, config=vision, output_loading_info=True, **kwargs)
    encoder, info = loaded
    surplus = info["unexpected_keys"]
    info["unexpected_keys"] = type(surplus)(key for key in surplus if not BESIDE_TOWER.match(key))
    return (encoder, info) if wanted else encoder


def tower_config_of(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Returns the image encoder's config: this one, or the one inside a whole model's. Raises UserError without one."""
    if not is_known(config) and (inner := _inner(config)) is not None:
        config = inner
    spec_of(config)
    return config


def _inner(config: "PreTrainedConfig") -> "PreTrainedConfig | None":
    """Config of a whole model's tower; casa's own models say where theirs stands."""
    return getattr(config, "encoder_config", None) or getattr(config, "vision_config", None)


def output_width(config: "PreTrainedConfig") -> int:
    """d_v of an encoder: the width of one token as the text side gets it, without extra feature sets."""
    return spec_of(config).width(config)


def extra_depths(config: "PreTrainedConfig") -> int:
    """How many further feature sets, each d_v wide, stand beside every token (Qwen3-VL's deep-stack).

    Args:
        config: Of an image encoder.

    Returns:
        k; 0 for most encoders.
    """
    return spec_of(config).depths(config)


def token_grids(config: "PreTrainedConfig", image_grid_thw: Tensor) -> Grids:
    """Rows and columns of tokens of each image. `image_grid_thw` is int64 (n, 3), in patches, for every encoder.

    Raises UserError for several frames in one entry: video is read frame by frame (paper, "Set-up").
    """
    merge = spec_of(config).merge(config)
    grids = []
    for frames, height, width in image_grid_thw.tolist():
        if frames != 1:
            raise UserError(f"an image has {frames} frames; give a video frame by frame, one image each.")
        grids.append((height // merge, width // merge))
    return grids


def encode(encoder: nn.Module, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
    """Encodes images.

    Args:
        encoder: The image encoder.
        pixel_values: By its `EncoderSpec.pictures`: (P, channels of a patch), or squares (n, 3, H, W).
        image_grid_thw: int64 (n, 3), (1, rows, columns) in patches.

    Returns:
        (N, (1 + k) * d_v): tokens of all images, each image's in reading order; extra feature sets beside them.

    Raises:
        UserError: The two do not fit together.
    """
    config = cast("PreTrainedConfig", encoder.config)
    spec = spec_of(config)
    if spec.pictures == "squares":
        height, width = (side // config.patch_size for side in pixel_values.shape[-2:])
        fits = image_grid_thw.tolist() == [[1, height, width]] * len(pixel_values)
    else:
        fits = int(image_grid_thw.prod(dim=-1).sum()) == len(pixel_values)
    if not fits:
        shape = tuple(pixel_values.shape)
        raise UserError(f"image_grid_thw does not describe pixel_values of shape {shape}; the processor makes both.")
    if not len(image_grid_thw):
        return pixel_values.new_zeros(0, (1 + spec.depths(config)) * spec.width(config))
    return spec.run(encoder, pixel_values, image_grid_thw)
