"""What transformers' users do to a model beside running it: change its vocabulary, checkpoint activations.

Mixed into CasaForConditionalGeneration.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from casa.errors import UserError


class CasaUpkeep:
    """Stands before transformers' PreTrainedModel."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """As in transformers; the backbone's own config follows.

        Raises UserError for a model with gist tokens: their ids stand behind the vocabulary, and would move.
        """
        model: Any = self
        if model.fusion.gist and (new_num_tokens is not None or pad_to_multiple_of is not None):
            raise UserError(
                "this model's gist tokens have ids behind its vocabulary, which would move; "
                "resize the backbone before adapt."
            )
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)  # type: ignore[misc]
        for config in (model.backbone.config, model.backbone.config.get_text_config(decoder=True)):
            if hasattr(config, "vocab_size"):
                config.vocab_size = model.config.get_text_config().vocab_size
        return embedding

    def _cast_adapter_dtype(self, *args: Any, **kwargs: Any) -> None:
        """Asked by PEFT of a model that it wraps as it is, which its prompt methods do, to refuse them in time.

        They put virtual tokens before the text on its way here, and the places of images do not count those.
        """
        raise UserError(
            "PEFT's prompt methods (prompt tuning, p-tuning, prefix tuning, CPT, cartridges) put virtual tokens before "
            "the text, where the places of images do not count them; use one that changes weights: LoRA, DoRA, IA3."
        )

    @property
    def checkpoints_blocks(self) -> bool:
        """Whether blocks of the text model run again in the backward pass instead of keeping their activations."""
        model: Any = self
        return any(getattr(block, "gradient_checkpointing", False) for block in model.decoder.blocks)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """Image keys and values reach a block beside its arguments, which reentrant checkpointing cannot follow."""
        asked = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
        if enable and asked:
            raise UserError(
                "use_reentrant=True loses the gradients of images; leave it out, or pass use_reentrant=False."
            )
        if enable and asked is None:
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable=enable, gradient_checkpointing_func=gradient_checkpointing_func, **kwargs
        )
