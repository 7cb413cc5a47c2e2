"""CasaConfig: the text model's config, the image encoder's, and how they are fused."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from casa.errors import UserError
from casa.models.fusion_config import FusionConfig
from casa.models.shipped import resolve


class CasaConfig(PreTrainedConfig):
    """Configuration of `CasaForConditionalGeneration`.

    text_config, vision_config: configs of transformers models, or their dicts with a `model_type`; a text
        model of the Llama family and the Qwen2.5-VL image encoder by default.
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
        self.vision_config = _sub_config(self.vision_config, "qwen2_5_vl_vision")
        self.fusion = self._parsed_fusion().to_dict()
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    def _parsed_fusion(self) -> FusionConfig:
        if isinstance(self.fusion, FusionConfig):
            return self.fusion
        return FusionConfig.from_dict(self.fusion or {})

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
