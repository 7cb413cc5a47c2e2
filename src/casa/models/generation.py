"""What `generate` asks of a model that has images beside its tokens."""

from typing import Any

import torch
from torch import Tensor

from casa.errors import UserError

IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "image_positions", "image_features")


class CasaGeneration:
    """Mixed into CasaForConditionalGeneration, before transformers' own GenerationMixin."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Images go in with the prompt only; with a cache, later steps find them in its state."""
        first = kwargs.get("is_first_iteration", False)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        if not first and kwargs.get("use_cache", True):
            for name in IMAGE_INPUTS:
                inputs.pop(name, None)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise UserError(f"cache_implementation {kind!r} is not supported; leave it out for a growing cache.")
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()  # type: ignore[attr-defined]

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats rows, each with its images, for beams or several answers. Images are encoded once."""
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if expand_size > 1 and images["image_positions"] is not None:
            images = self._repeat_images(images, expand_size)
        kwargs.update({name: value for name, value in images.items() if value is not None})
        return input_ids, kwargs

    def _repeat_images(self, images: dict[str, Any], times: int) -> dict[str, Any]:
        positions, grid, features = (
            images["image_positions"],
            images["image_grid_thw"],
            images["image_features"],
        )
        if features is None:
            with torch.no_grad():
                features = self.encode_images(images["pixel_values"], grid)  # type: ignore[attr-defined]
        merge = getattr(self.config.vision_config, "spatial_merge_size", 1)  # type: ignore[attr-defined]
        tokens = features.split((grid.prod(1) // merge**2).tolist())
        order, rows = [], []
        for row in positions[:, 0].unique().tolist():
            mine = (positions[:, 0] == row).nonzero().flatten().tolist()
            for copy in range(times):
                order += mine
                rows += [row * times + copy] * len(mine)
        index = torch.tensor(order, device=positions.device)
        repeated = torch.stack([torch.tensor(rows, device=positions.device), positions[index, 1]], dim=1)
        return {
            "image_positions": repeated,
            "image_grid_thw": grid[index],
            "image_features": torch.cat([tokens[number] for number in order]),
        }
