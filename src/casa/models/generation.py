"""What `generate` asks of a model that has images beside its tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.utils import GENERATION_MODES_MAPPING

from casa.errors import UserError
from casa.vision import token_grids

# how candidates would be drafted, and why that cannot be
NO_DRAFTS = {
    "assistant_early_exit": "early exit runs the backbone cut short, without its fusion layers",
    "use_mtp": "the heads that predict several tokens are not carried over by adapt",
}

IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "image_positions", "image_features", "image_keys_values")


class TextScores(LogitsProcessor):
    """Processors of scores for a text whose gist tokens they cannot know: their ids stand behind the vocabulary.

    Each gist token shows as the text token before it (or the row's first). To penalties of repetition, that says
    nothing new.
    """

    def __init__(self, inner: LogitsProcessorList, vocabulary: int) -> None:
        self.inner = inner
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if not input_ids.shape[1]:  # text given as embeddings has no tokens yet
            return self.inner(input_ids, scores)  # type: ignore[arg-type]
        is_text = input_ids < self.vocabulary
        index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        before = index.masked_fill(~is_text, 0).cummax(dim=1).values
        first = is_text.int().argmax(dim=1, keepdim=True)
        return self.inner(input_ids.gather(1, torch.maximum(before, first)), scores)  # type: ignore[arg-type]


class CasaGeneration:
    """Mixed into CasaForConditionalGeneration, before transformers' own GenerationMixin."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Images go in with the prompt only; with a cache, later steps find them in its state."""
        first = kwargs.get("is_first_iteration", False)
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if not first and kwargs.get("use_cache", True):
            for name in IMAGE_INPUTS:
                inputs.pop(name, None)
        return inputs

    def _maybe_initialize_input_ids_for_generation(
        self, inputs: Tensor | None, bos_token_id: Tensor | None, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Where text is given as embeddings, rows are counted by them; transformers would count the first tensor's."""
        text_only = {name: value for name, value in model_kwargs.items() if name not in IMAGE_INPUTS}
        return super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, text_only)  # type: ignore[misc]

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

    def _get_candidate_generator(self, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Assisted decoding: whoever drafts sees the text alone; this model, which decides, sees the pictures too."""
        if self.fusion.method == "insertion":  # type: ignore[attr-defined]
            raise UserError(
                "assisted decoding takes tokens back, which a cache of inserted images cannot; leave it out."
            )
        if self.fusion.gist:  # type: ignore[attr-defined]
            raise UserError("gist tokens have ids that who drafts does not know; leave assisted decoding out.")
        for name, reason in NO_DRAFTS.items():
            if getattr(generation_config, name, None):
                raise UserError(f"{name} is not supported: {reason}; pass assistant_model or prompt_lookup_num_tokens.")
        text_only = {name: value for name, value in model_kwargs.items() if name not in IMAGE_INPUTS}
        return super()._get_candidate_generator(  # type: ignore[misc]
            generation_config=generation_config, model_kwargs=text_only, **kwargs
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """As in transformers; gist tokens are hidden from the processors."""
        found = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        if not self.fusion.gist or not len(found):  # type: ignore[attr-defined]
            return found
        vocabulary = self.config.get_text_config().vocab_size  # type: ignore[attr-defined]
        return LogitsProcessorList([TextScores(found, vocabulary)])

    def _get_deprecated_gen_repo(
        self, generation_mode: Any, trust_remote_code: bool, custom_generate: Any = None
    ) -> None:
        """Ways to decode that transformers has moved to code on a hub, which casa does not run."""
        if custom_generate is None and "/" in GENERATION_MODES_MAPPING.get(generation_mode, ""):
            name = generation_mode.value.replace("_", " ")
            raise UserError(f"{name} is code on a hub, which casa does not run; use greedy, sampling or beams.")

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
        if images["image_keys_values"] is not None:
            raise UserError("beams and several answers take image_features, not image_keys_values.")
        if features is None:
            with torch.no_grad():
                features = self.encode_images(images["pixel_values"], grid)  # type: ignore[attr-defined]
        grids = token_grids(self.config.encoder_config, grid)  # type: ignore[attr-defined]
        tokens = features.split([rows * columns for rows, columns in grids])
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
