"""Weights in 8 bits for decoding: every linear layer of the text model and of the fusion layers, by output channel.

Shapes: N output channels, K input channels, M rows.

A weight is a whole number from -127 to 127 times the scale of its channel. A few rows are multiplied by torch's own
kernel, which reads half of what bf16 would; many rows by the weights made whole for the product. Embeddings (also where
the head has the same weights), norms, gates, the image encoder and the projector stay as they are. Such a model only
answers: it is neither trained nor saved.
"""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casa.errors import UserError
from casa.layers import is_its_weight

if TYPE_CHECKING:
    from casa.models.modeling_casa import CasaForConditionalGeneration

LEVELS = 127
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WEIGHTS = ("own", "int8")


class Int8Linear(nn.Module):
    """A linear layer with int8 weights (N, K), a scale (N,) in the dtype of its input, and perhaps a bias (N,)."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        whole = linear.weight.detach()
        scale = (whole.abs().amax(1).float() / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = (whole.float() / scale[:, None]).round().clamp(-LEVELS, LEVELS)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale.to(whole.dtype))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def _save_to_state_dict(self, *args: object, **kwargs: object) -> None:
        raise UserError("int8 weights are for answering and are not saved; save the model that they were made of.")

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)"""
        return int8_product(x.flatten(0, -2), self.weight, self.scale, self.bias).unflatten(0, x.shape[:-1])


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, few: int = 32) -> Tensor:
    """(M, K) times int8 weights (N, K) with their scales (N,): (M, N)."""
    if x.is_cpu and 0 < x.shape[0] <= few and x.dtype in KERNEL_DTYPES:
        found = torch._weight_int8pack_mm(x.contiguous(), weight, scale)
    else:
        found = F.linear(x, weight.to(x.dtype)) * scale
    return found if bias is None else found + bias


@torch.no_grad()
def to_int8(model: "CasaForConditionalGeneration") -> "CasaForConditionalGeneration":
    """Puts int8 layers in the place of the model's, which it returns.

    Raises:
        UserError: A layer is more than its weight: quantised already, or with an adapter that is not merged.
    """
    for root in (*model.decoder.blocks, *model.casa_layers.children()):
        for name, module in list(root.named_modules()):
            if isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
                if not is_its_weight(module):
                    raise UserError(
                        f"{name} is a {type(module).__name__}, more than a weight that could be made int8; "
                        "merge its adapter, or load a model that is not quantised."
                    )
                root.set_submodule(name, Int8Linear(cast(nn.Linear, module)))
    if is_its_weight(head := cast(nn.Linear, model.get_output_embeddings())):
        model.set_output_embeddings(Int8Linear(head))
    return model.requires_grad_(False).eval()


def is_int8(model: nn.Module) -> bool:
    """Whether some layers hold int8 weights."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
