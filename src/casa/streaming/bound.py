"""The bound on a session's text: which models can have one, and how room is made below it.

Two things hold text, and each is kept within the bound. The text model's cache has all of it; its oldest tokens behind
the sinks (the prompt, mostly) are forgotten, and later ones move up. The open window in the CASA layers has what was
said of the frame at hand; once questions about that frame make it too much, the window begins again at its images:

    cache     sinks  . . . . .  text text text text      next
    window    images  . . . . . . . . . . . . . . .      next

That is what the CASA layers would see had the frame been shown once more, and it costs nothing. So one may ask about a
frame for ever, as one may watch for ever.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from casa.models import CasaCache, CasaForConditionalGeneration


def forgets(model: CasaForConditionalGeneration) -> bool:
    """Whether a model can have a bound on its text.

    Not under insertion, nor where all text is one window, nor with blocks that forget by themselves.
    """
    return unforgetting(model) is None


def unforgetting(model: CasaForConditionalGeneration) -> str | None:
    """What kind of model it is that can have none; None of one that can."""
    if model.fusion.method == "insertion":
        return "an insertion model"
    if model.fusion.split == "sample":
        return 'a model with split="sample"'
    return "a model with sliding-window attention" if model.new_cache().slides else None


def make_room(
    cache: CasaCache, count: int, bound: int, sinks: int, turns: Sequence[Callable[[Tensor, int], Tensor]], opens: bool
) -> None:
    """Makes room for `count` more tokens of text below the bound, in a cache of one row.

    sinks: the first tokens, never forgotten. turns: as in `CasaCache.drop_text`. opens: whether a frame is among what
    comes, which closes the window that is open now, and so its text needs no room.
    """
    windows = cache.windows
    if windows is not None and not opens and windows.text_tokens[0] + count > bound:
        windows.forget_text()
    surplus = cache.num_text + count - bound
    if surplus > 0:
        # an eighth of the bound at a time, so that it happens rarely
        wanted = max(surplus, (bound - sinks) // 8)
        cache.drop_text(sinks, min(wanted, max(0, cache.num_text - sinks)), turns)
