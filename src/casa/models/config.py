"""CasaConfig: the text model's config, the image encoder's, and how they are fused."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from casa.errors import UserError
from casa.models.fusion_config import FusionConfig
from casa.models.shipped import resolve
from casa.vision import kind_of


class CasaConfig(PreTrainedConfig):
    """Configuration of `CasaForConditionalGeneration`.

    text_config: config of the backbone, a transformers model, or its dict with a `model_type`: a text-only model
        (Llama by default), or an insertion VLM, which brings its own image encoder.
    vision_config: config of the image encoder of a text-only backbone (Qwen2.5-VL's by default); None for a VLM.
    fusion: a FusionConfig or its dict. Saved as JSON beside the weights.
    """

    model_type = "casa"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # type: ignore[assignment]  # noqa: RUF012

    text_config: Any = None
    vision_config: Any = None
    fusion: dict | FusionConfig | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _sub_config(self.text_config, "llama")
        if hasattr(self.text_config, "vision_config"):
            if self.vision_config is not None:
                raise UserError("this backbone brings its own image encoder; leave out vision_config.")
        else:
            self.vision_config = _sub_config(self.vision_config, "qwen2_5_vl_vision")
            # a tower taken out of a whole model may still be called by that model's name (see `kind_of`)
            self.vision_config.model_type = kind_of(self.vision_config)
        self.fusion = self._parsed_fusion().to_dict()
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    def _parsed_fusion(self) -> FusionConfig:
        if isinstance(self.fusion, FusionConfig):
            return self.fusion
        return FusionConfig.from_dict(self.fusion or {})

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
        return self._parsed_fusion()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "CasaConfig":
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
