"""The tower of SmolVLM and Idefics3: a SigLIP that sees squares, its patches placed by fractions of the side.

Shapes: n images, N patches of all images.

One picture is one full square here, so that nothing is padded. Their own models cut a large picture into such
squares and add a small view of the whole; a caller who wants that gives each square as an image.
"""

from typing import Any

from torch import Tensor

from casa.vision.encoders.family import Family


def _run(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Tensor:
    # this tower, unlike the others, does not bring pixels to its own type
    weight = encoder.embeddings.patch_embedding.weight
    return encoder(pixel_values.to(weight.dtype)).last_hidden_state.flatten(0, 1)


def _tower(module: str, model: str) -> Family:
    return Family(module=module, model=model, pictures="squares", run=_run, resample="lanczos")


SMOLVLM_TOWERS = {
    "smolvlm_vision": _tower("smolvlm.modeling_smolvlm", "SmolVLMVisionTransformer"),
    "idefics3_vision": _tower("idefics3.modeling_idefics3", "Idefics3VisionTransformer"),
}
