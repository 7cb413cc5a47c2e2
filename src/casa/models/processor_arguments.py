"""What a call of the processor says: names that text and pictures know, and how long rows of tokens may be."""

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ImagesKwargs, TextKwargs
from transformers.tokenization_utils_base import LARGE_INTEGER, PaddingStrategy, TruncationStrategy

from casa.errors import UserError
from casa.models.image_processing_casa import bounds
from casa.settings import near

# What transformers' tokenizers take besides, for texts that are no chats with pictures; false values pass.
_NOT_HERE = {
    "text_pair",
    "text_target",
    "text_pair_target",
    "stride",
    "is_split_into_words",
    "return_overflowing_tokens",
    "return_offsets_mapping",
    "return_special_tokens_mask",
    "return_text_replacement_offsets",
    "sanitize_control_tokens",
}
_OF_TEXT = set(TextKwargs.__annotations__) - _NOT_HERE | {"return_mm_token_type_ids"}
_DEFAULTS = {"padding": True, "add_special_tokens": False, "return_tensors": "pt"}
_BOUNDS = ("min_pixels", "max_pixels")
# These have done their work before an image processor's own steps, or ask for none.
_BEFORE = {"do_convert_rgb", "input_data_format", "default_to_square", "return_tensors", "disable_grouping"}


def arguments(image_processor: Any, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call tells the text, with casa's defaults, and what it tells the image processor.

    Raises UserError for a name that nobody knows, that is given twice, or that means nothing to these two.
    """
    flat = _asking(given)
    of_images = {*ImagesKwargs.__annotations__, *_named(image_processor), *_BOUNDS}
    groups = {"text_kwargs": _OF_TEXT, "images_kwargs": of_images, "common_kwargs": _OF_TEXT | of_images}
    nested = {}
    for group, known in groups.items():
        if not isinstance(held := flat.pop(group, None), dict | None):
            raise UserError(f"{group} is {held!r}; give a dictionary.")
        nested[group] = _asking(held or {})
        _refuse_unknown(nested[group], known, f" in {group}")
    for group in ("videos_kwargs", "audio_kwargs"):
        if flat.pop(group, None):
            raise UserError(f"{group}: a video is read frame by frame, and sound not at all; leave that out.")
    _refuse_unknown(flat, _OF_TEXT | of_images, "")
    merged = []
    for group, known in (("text_kwargs", _OF_TEXT), ("images_kwargs", of_images)):
        if twice := sorted(nested[group].keys() & flat.keys()):
            raise UserError(f"{', '.join(twice)} is given twice, in {group} and beside it; leave one out.")
        common, own = ({n: v for n, v in held.items() if n in known} for held in (nested["common_kwargs"], flat))
        merged.append(common | nested[group] | own)
    text, images = merged
    images |= bounds(image_processor, *(images.pop(name, None) for name in _BOUNDS))
    used = _steps(image_processor) | _BEFORE
    # what is false asks for nothing, unless it would be done otherwise
    asked = {n for n, v in images.items() if v not in (None, False) or (v is False and getattr(image_processor, n, v))}
    if idle := sorted(asked - used):
        raise UserError(f"{type(image_processor).__name__} makes no use of {', '.join(idle)}; leave that out.")
    return _DEFAULTS | text, {"return_tensors": _DEFAULTS["return_tensors"]} | images


def _asking(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value or name not in _NOT_HERE}


def _named(image_processor: Any) -> Iterable[str]:
    return getattr(image_processor, "valid_kwargs", ImagesKwargs).__annotations__


def _refuse_unknown(given: Iterable[str], known: set[str], where: str) -> None:
    for name in given:
        if name in _NOT_HERE:
            raise UserError(f"the processor takes no {name}{where}: texts are chats with pictures; leave it out.")
        if name not in known:
            hint = near(name, sorted(known), "it knows:")
            raise UserError(f"the processor does not know {name}{where}; {hint}")


def _steps(image_processor: Any) -> set[str]:
    """The names of all that an image processor does to a picture; the rest of what it is told it passes over."""
    for kind in type(image_processor).__mro__:
        if "_preprocess" in vars(kind):
            names = set(inspect.signature(vars(kind)["_preprocess"]).parameters)
            if "return_tensors" in names:  # else it hands all on to the next kind
                return names
    return set(_named(image_processor))


@dataclass(frozen=True)
class Lengths:
    """How long rows of tokens may be, and are made.

    Attributes:
        most: Beyond which a row is cut; None cuts none.
        padding, to, multiple: As transformers has them.
    """

    most: int | None
    padding: PaddingStrategy
    to: int | None
    multiple: int

    @staticmethod
    def of(text: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> "Lengths":
        """From what a call tells the text. Raises UserError for what cannot be."""
        padding, truncation, most = text.get("padding"), text.get("truncation"), text.get("max_length")
        multiple = text.get("pad_to_multiple_of")
        for name, value in (("max_length", most), ("pad_to_multiple_of", multiple)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"{name} is {value!r}; give a whole number from 1 on.")
        if most is not None and not padding and truncation is None:
            truncation = True  # as transformers has it: a length alone cuts, where nothing is padded
        try:
            pads = PaddingStrategy({True: "longest", False: "do_not_pad", None: "do_not_pad"}.get(padding, padding))
            cuts = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}
            cut = TruncationStrategy(cuts.get(truncation, truncation))
        except ValueError as error:
            raise UserError(f"{error}.") from error
        is_cut = cut in (TruncationStrategy.LONGEST_FIRST, TruncationStrategy.ONLY_FIRST)
        if cut == TruncationStrategy.ONLY_SECOND:
            raise UserError("truncation 'only_second' is for pairs of texts; give True.")
        if most is not None and not is_cut and pads != PaddingStrategy.MAX_LENGTH:
            warnings.warn("max_length does nothing without truncation=True or padding='max_length'.", stacklevel=3)
        if most is None and tokenizer.model_max_length < LARGE_INTEGER:
            most = tokenizer.model_max_length
        if is_cut and most is not None and pads != PaddingStrategy.DO_NOT_PAD and most % (multiple or 1):
            raise UserError(f"max_length {most} is no multiple of pad_to_multiple_of {multiple}; give one that is.")
        return Lengths(most if is_cut else None, pads, most, multiple or 1)

    def padded(self, lengths: list[int]) -> list[int]:
        """How long rows of these lengths become."""
        if self.padding == PaddingStrategy.DO_NOT_PAD:
            return lengths
        wanted = self.to if self.padding == PaddingStrategy.MAX_LENGTH else max(lengths, default=0)
        if wanted is None:  # padded to a length that nobody named
            return lengths
        wanted = -(-wanted // self.multiple) * self.multiple
        return [max(length, wanted) for length in lengths]
