"""The tokens at which a model ends what it says."""

from typing import Any


def stop_ids(model: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """The ids of the model's generation config, one or several there; else the tokenizer's end of text; else none."""
    settings = getattr(model, "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)
