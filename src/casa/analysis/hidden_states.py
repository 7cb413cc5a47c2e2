"""What layers hold besides attention: what each would say if it were the last, and how large image tokens are.

Shapes: L blocks, C fusion layers, q chosen text tokens, N image tokens, d width, k best guesses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from casa.analysis.attention_maps import check_one_text
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration
from casa.models.inputs import read_image_places
from casa.models.insertion import Stream, merge
from casa.vision import token_grids


@dataclass(frozen=True)
class LogitLens:
    """The next token as each block would have it (nostalgebraist's "logit lens", 2020).

    Attributes:
        tokens: The chosen tokens, by index in the text; each decides the token behind it.
        ids: int64 (L, q, k), the best guesses behind each block, best first.
        probabilities: float32 (L, q, k), theirs.
        entropy: float32 (L, q), nats, of the whole distribution.
    """

    tokens: tuple[int, ...]
    ids: Tensor
    probabilities: Tensor
    entropy: Tensor


@torch.no_grad()
def logit_lens(
    model: CasaForConditionalGeneration, inputs: Mapping[str, Any], tokens: Sequence[int], best: int = 5
) -> LogitLens:
    """Runs the model once and reads the hidden states behind every block through its last norm and its head.

    Args:
        model: Any model of this library.
        inputs: As from the processor, one row without padding.
        tokens: Indices in its text.
        best: k.

    Returns:
        The lens, on the CPU; its last row is what the model says.

    Raises:
        UserError: Several rows, or padding.
    """
    check_one_text(inputs)
    chosen = torch.tensor(list(tokens), dtype=torch.int64, device=model.device)
    states = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
    if (stream := _stream(model, inputs)) is not None:
        chosen = stream.text_slot[0].to(model.device)[chosen]
    norm = model.decoder.stack.get_submodule("norm")
    ids, probabilities, entropies = [], [], []
    for number, state in enumerate(states[1:], 1):
        picked = state[0, chosen]
        # transformers hands out the last one behind the norm
        logits = model.decoder.logits((picked if number == len(states) - 1 else norm(picked))[None])[0].float()
        chances = logits.softmax(-1)
        top = chances.topk(min(best, chances.shape[-1]), dim=-1)
        ids.append(top.indices.cpu())
        probabilities.append(top.values.cpu())
        entropies.append(-torch.special.xlogy(chances, chances).sum(-1).cpu())
    return LogitLens(tuple(tokens), torch.stack(ids), torch.stack(probabilities), torch.stack(entropies))


@dataclass(frozen=True)
class ImageNorms:
    """How large image tokens are, as Euclidean lengths.

    Attributes:
        tokens: float32 (N,), as they enter the text model.
        blocks: The blocks that `layers` speaks of.
        layers: float32 (C, N): of a fusion layer's values, root mean square over heads; under insertion, of the image
            tokens behind each block, since they go through all of them.
        images: First and last place in N, of each image.
        grids: Their (rows, columns).
    """

    tokens: Tensor
    blocks: tuple[int, ...]
    layers: Tensor
    images: tuple[tuple[int, int], ...]
    grids: tuple[tuple[int, int], ...]

    def map(self, image: int = -1, layer: int | None = None) -> Tensor:
        """float32 (rows, columns) of one image: as it enters, or in layer number `layer`."""
        start, stop = self.images[image]
        return (self.tokens if layer is None else self.layers[layer])[start:stop].reshape(self.grids[image])


@torch.no_grad()
def image_norms(model: CasaForConditionalGeneration, inputs: Mapping[str, Any]) -> ImageNorms:
    """Measures the image tokens of a text.

    Args:
        model: Any model of this library.
        inputs: As from the processor, one row without padding, with pixels.

    Returns:
        The norms, on the CPU.

    Raises:
        UserError: There is no image, or several rows.
    """
    check_one_text(inputs)
    if inputs.get("pixel_values") is None:
        raise UserError("there is no image to measure; give pixel_values.")
    grid = inputs["image_grid_thw"]
    features = model.encode_images(inputs["pixel_values"], grid)
    images = model.image_tokens(features, token_grids(model.config.encoder_config, grid))
    if (stream := _stream(model, inputs)) is not None:
        inside = stream.is_image[0].to(model.device)
        layers: list[Tensor] = []

        def measure(block: nn.Module, given: tuple, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            layers.append(state.view(-1, state.shape[-1])[inside].float().norm(dim=-1))

        # transformers hands out the last one behind the norm only
        handles = [block.register_forward_hook(measure) for block in model.decoder.blocks]
        try:
            model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        blocks = tuple(range(len(layers)))
    else:
        pairs = model.fusion_layers.keys_values(images)
        layers = [value.float().norm(dim=-1).pow(2).mean(-1).sqrt() for _, value in pairs]
        blocks = tuple(model.fused_blocks)
    starts = [sum(images.lengths[:number]) for number in range(len(images.lengths))]
    return ImageNorms(
        tokens=images.tokens.float().norm(dim=-1).cpu(),
        blocks=blocks,
        layers=torch.stack(layers).cpu(),
        images=tuple((start, start + size) for start, size in zip(starts, images.lengths, strict=True)),
        grids=tuple(images.grids),
    )


def _stream(model: CasaForConditionalGeneration, inputs: Mapping[str, Any]) -> Stream | None:
    """Where tokens of one text stand among those of its images; None where images stand beside the text."""
    if model.fusion.method != "insertion":
        return None
    grid = inputs.get("image_grid_thw")
    grids = model.final_grids(token_grids(model.config.encoder_config, grid)) if grid is not None else []
    places = read_image_places(inputs.get("image_positions"), len(grids))
    valid = torch.ones(1, inputs["input_ids"].shape[1], dtype=torch.bool)
    return merge(valid, places, [rows * columns for rows, columns in grids])
