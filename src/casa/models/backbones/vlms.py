"""Insertion vision-language models: text model, image tower and connector in one; CASA takes them over whole.

Shapes: N image tokens, d_v width of the tower's output, d width of the text model, k deep-stack levels.

All their weights keep their names. The tower is read in place; image tokens come out of it, or out of the
connector behind it, in the text model's width, so no projector of our own stands between.
"""

from typing import ClassVar

from torch import Tensor, nn

from casa.models.backbones.decoder import Decoder
from casa.vision import Grids


class InsertionVLM(Decoder):
    """A vision-language model with its own tower.

    Attributes:
        tower_at: Where it stands.
        placeholder: The token its chat template writes for a picture.
        delimiters: What stands around a picture.
        template_delimits: Whether the template writes them; if not, the VLM's own processor does.
    """

    tower_at: ClassVar[str] = ""
    placeholder: ClassVar[str] = ""
    delimiters: ClassVar[tuple[str, str]] = ("", "")
    template_delimits: ClassVar[bool] = True

    @property
    def tower(self) -> nn.Module:
        return self.model.get_submodule(self.tower_at)

    def connect(self, features: Tensor, grids: Grids) -> Tensor:
        """Image tokens (N, d) from the tower's output (N', d_v) and its grids; theirs are `connected(grids)`."""
        return features

    def connected(self, grids: Grids) -> Grids:
        """The grids of image tokens for the tower's grids."""
        return grids


class QwenVLDecoder(InsertionVLM):
    """Qwen2-VL and Qwen2.5-VL: mRoPE, and a tower that ends in the text model's width."""

    stack_at: ClassVar[str] = "model.language_model"
    rotary_axes: ClassVar[int] = 3
    tower_at: ClassVar[str] = "model.visual"
    placeholder: ClassVar[str] = "<|image_pad|>"
    delimiters: ClassVar[tuple[str, str]] = ("<|vision_start|>", "<|vision_end|>")
    key_map: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
    )


class Qwen3VLDecoder(QwenVLDecoder):
    """Qwen3-VL: the tower hands out k more sets of features, which join the image tokens behind the first k blocks."""


class SmolVLMDecoder(InsertionVLM):
    """SmolVLM: a SigLIP tower on one square tile, and a connector that folds neighbouring tokens into one."""

    stack_at: ClassVar[str] = "model.text_model"
    tower_at: ClassVar[str] = "model.vision_model"
    placeholder: ClassVar[str] = "<image>"
    delimiters: ClassVar[tuple[str, str]] = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")
    template_delimits: ClassVar[bool] = False

    def connect(self, features: Tensor, grids: Grids) -> Tensor:
        connector = self.model.get_submodule("model.connector")
        if not grids:
            return features.new_zeros(0, self.config.hidden_size)
        # the tower takes squares of one size
        return connector(features.view(len(grids), -1, features.shape[-1])).flatten(0, 1)

    def connected(self, grids: Grids) -> Grids:
        fold: int = self.model.get_submodule("model.connector").scale_factor  # type: ignore[assignment]
        return [(rows // fold, columns // fold) for rows, columns in grids]
