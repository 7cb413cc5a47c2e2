"""CasaConfig and FusionConfig: the text model's config, the image encoder's, and how they are fused."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from casa.errors import UserError
from casa.models.loading import resolve
from casa.settings import Bounds, NonNegative, Positive, Settings, build, plain_values
from casa.vision import kind_of, parse_compressor

Method = Literal["casa", "cross_attention", "insertion"]
Placement = Literal["parallel", "before", "replace"]
Split = Literal["image", "sample"]
Gate = Literal["tanh", None]
Output = Literal["copy", "zero"]
ProjectorKind = Literal["mlp", "linear"]


@dataclass(frozen=True)
class FusionConfig(Settings):
    """The fusion of a text model with images. The presets name the usual ones: `FusionConfig.replace(every=4)`.

    Args:
        method: "casa"; "cross_attention", the same layers with images as their only keys and no rotary positions;
            "insertion", image tokens in the text stream.
        placement: "parallel" (CASA⊕), "before" (CASA→) or "replace" (CASA∨) of the block's self-attention.
        every, layers: Every n-th block (n-1, 2n-1, ...), or an explicit list of blocks.
        share_weights: Use the block's own self-attention weights. "replace" always does: the layer takes over the
            weights of the self-attention it replaces.
        gate: "tanh" scales the layer's output by tanh of a scalar that starts at zero.
        output: How a layer's output projection starts: "copy" of the block's, or "zero", so that the layer adds nothing
            at first.
        split, history: What a window is and how many earlier ones stay visible (see WindowLayout). With history,
            the image keys of earlier windows are turned once for every window that sees them, and held twice meanwhile.
        update_images: Image tokens pass through the feed-forward network of every block, so deeper layers see
            other image tokens. They still attend to nothing.
        gist: Learned tokens behind each image that carry it into later windows; 0 leaves that to the delimiter that the
            chat template writes there (paper v2). The processor writes them.
        compressor: Fewer image tokens before fusion, whatever the method: "pool:k" and "pixel_shuffle:k" make one of k
            x k, "q_former:n" makes n of an image.
        projector: From an encoder to a text-only model: "mlp", two layers behind a LayerNorm, or one "linear" layer,
            which keeps the scale of the encoder's tokens.

    Raises:
        UserError: A value is unknown, or makes no sense beside the others.
    """

    method: Method = "casa"
    placement: Placement = "parallel"
    every: Positive = 1
    layers: tuple[int, ...] | None = None
    share_weights: bool = False
    gate: Gate = None
    output: Output = "copy"
    split: Split = "image"
    history: Annotated[int, Bounds(ge=-1)] = 0
    update_images: bool = False
    gist: NonNegative = 0
    compressor: str | None = None
    projector: ProjectorKind = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        for given, name in ((self.gate is not None, "a gate"), (self.output == "zero", "output='zero'")):
            if given and self.borrows:
                raise UserError(
                    f"{name} needs layers with weights of their own; drop it, or share_weights and replace."
                )
        if self.method == "insertion" and self.update_images:
            raise UserError("insertion updates image tokens in every block anyway; leave out update_images.")
        if self.compressor is not None:
            parse_compressor(self.compressor)

    @classmethod
    def parallel(cls, **fields: Any) -> "FusionConfig":
        """CASA⊕, layers beside the blocks' self-attention. fields: any other of `FusionConfig`."""
        return cls(placement="parallel", **fields)

    @classmethod
    def before(cls, **fields: Any) -> "FusionConfig":
        """CASA→, layers before the blocks' self-attention. fields: any other of `FusionConfig`."""
        return cls(placement="before", **fields)

    @classmethod
    def replace(cls, every: int = 4, **fields: Any) -> "FusionConfig":
        """CASA∨, layers in place of the self-attention of every n-th block. fields: any other of `FusionConfig`."""
        return cls(placement="replace", every=every, **fields)

    @classmethod
    def cross_attention(cls, **fields: Any) -> "FusionConfig":
        """The first baseline: images are a layer's only keys; `gate="tanh"` is Flamingo's. fields: any other."""
        return cls(method="cross_attention", **fields)

    @classmethod
    def insertion(cls, **fields: Any) -> "FusionConfig":
        """The second baseline: image tokens in the text stream. fields: `gist`, `compressor` and `projector`."""
        return cls(method="insertion", **fields)

    def blocks(self, count: int) -> tuple[int, ...]:
        """The blocks, of `count`, that get a layer. Raises UserError if one is missing or none keeps self-attention."""
        if self.method == "insertion":
            return ()
        chosen = self.layers if self.layers is not None else range(self.every - 1, count, self.every)
        found = tuple(sorted(set(chosen)))
        if not found:
            raise UserError(f"no block gets a fusion layer: every={self.every} of {count} blocks; lower it.")
        if found[0] < 0 or found[-1] >= count:
            raise UserError(f"fusion layers {list(found)} are not all among the {count} blocks 0..{count - 1}.")
        if self.placement == "replace" and len(found) == count:
            raise UserError("replacing every block leaves no self-attention over the whole text; use every=2 or more.")
        return found

    @property
    def borrows(self) -> bool:
        """Whether the layers have no weights of their own."""
        return self.share_weights or self.placement == "replace"

    @property
    def attend(self) -> str:
        """What the layers' queries look at, in the terms of `casa_attention`."""
        return "image" if self.method == "cross_attention" else "both"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, of which `casa.settings.build` makes it again."""
        return plain_values(self)


class CasaConfig(PreTrainedConfig):
    """Configuration of `CasaForConditionalGeneration`.

    Args:
        text_config: Config of the backbone, a transformers model, or its dict with a `model_type`: a text-only model
            (Llama by default), or an insertion VLM, which brings its own image encoder.
        vision_config: Config of the image encoder of a text-only backbone (Qwen2.5-VL's by default); None for a VLM.
        fusion: A FusionConfig or its dict. Saved as JSON beside the weights.
        backbone_source: In a folder without its backbone's weights, where those are: name, revision, fingerprint.
    """

    model_type = "casa"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # type: ignore[assignment]  # noqa: RUF012

    text_config: Any = None
    vision_config: Any = None
    fusion: dict | FusionConfig | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    backbone_source: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _sub_config(self.text_config, "llama")
        if hasattr(self.text_config, "vision_config"):
            if self.vision_config is not None:
                raise UserError("this backbone brings its own image encoder; leave out vision_config.")
        else:
            self.vision_config = _sub_config(self.vision_config, "qwen2_5_vl_vision")
            # a tower taken out of a whole model may still be called by that model's name (see `kind_of`)
            self.vision_config.model_type = kind_of(self.vision_config)
        self.fusion = self.typed_fusion.to_dict()
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    @property
    def encoder_config(self) -> Any:
        """Config of the image encoder, wherever it stands."""
        return self.vision_config if self.vision_config is not None else self.text_config.vision_config

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        """Config of the text model, also where the backbone is a VLM."""
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def typed_fusion(self) -> FusionConfig:
        """The fusion, checked and typed."""
        return (
            self.fusion if isinstance(self.fusion, FusionConfig) else build(FusionConfig, self.fusion or {}, "fusion")
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "CasaConfig":  # type: ignore[override]
        """As in transformers; `casa-tiny` names the checkpoint in the package. Raises UserError for another model's."""
        path = resolve(pretrained_model_name_or_path)
        kind = cls.get_config_dict(path, **kwargs)[0].get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise UserError(f"{path} holds a {kind!r} model, not a casa one; make one of it with adapt.")
        return super().from_pretrained(path, **kwargs)


def _sub_config(config: Any, default: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    values = dict(config or {})
    name = values.pop("model_type", default)
    if name not in CONFIG_MAPPING:
        raise UserError(f"model type {name!r} is not one that the installed transformers knows.")
    return CONFIG_MAPPING[name](**values)
