"""What `generate` asks of a model that has images beside its tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

from casa.errors import UserError
from casa.layers import Ablation
from casa.models.cache import CACHE, CasaCache, pop_cache
from casa.models.configuration_casa import CasaConfig, FusionConfig
from casa.models.inputs import read_image_places
from casa.vision import Grids, spec_of, token_grids


def stop_ids(model: object, tokenizer: object = None) -> tuple[int, ...]:
    """The ids of the model's generation config, one or several there; else the tokenizer's end of text; else none."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return _as_ids(getattr(tokenizer, "eos_token_id", None) if found is None else found)


def _as_ids(given: int | Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return ()
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)  # type: ignore[return-value]


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


@dataclass(frozen=True)
class Continuation:
    """A text whose beginning is cached: its last `length` columns are new.

    Attributes:
        mask: bool (B, S + length), over cache and new text.
        first: Per row, the new column before which an image is an old one; an image between that and `real`, the row's
            first new token, stands where the cache ends.
    """

    length: int
    mask: Tensor
    first: list[int]
    real: list[int]


def continuation(cache: CasaCache, length: int, mask: Tensor) -> Continuation | None:
    """How a text of `length` columns with `mask` goes on from a cache; None if all of it is new.

        cached        a a a a a     turn of both, padded anew    . . a a a a a x    what is fed    . . x
                      . . b b b                                  b b b y y y y y                   ...

    Args:
        mask: (B, length) for the whole text, whose columns may stand elsewhere than they do in the cache if it was
            padded anew; (B, S + length) for new text alone.

    Raises:
        UserError: The mask has another width, or does not show the padding that is in the cache.
    """
    cached, known = cache.num_text, cache.known.to(mask.device)
    rows, width = mask.shape
    if width == cached + length:
        return None
    if width != length:
        raise UserError(
            f"attention_mask has {width} columns; give {length}, as many as input_ids, for a whole chat, or "
            f"{cached + length} for new text alone behind the {cached} tokens that are cached."
        )
    said = mask[:, :cached]
    if length > cached and torch.equal(said, known):
        return Continuation(length - cached, mask, [0] * rows, _first_real(mask[:, cached:]))
    count = mask.sum(1) - known.sum(1)
    padded = int(mask.long().diff(dim=1).min()) >= 0 and bool(mask.all(1).any())
    if padded and int(count.min()) > 0 and not cache.slides:
        new = torch.arange(int(count.max()), device=mask.device) >= count.max() - count[:, None]
        begins = _first_real(new)
        return Continuation(new.shape[1], torch.cat([known, new], dim=1), begins, begins)
    if length <= cached:
        raise UserError(
            f"the cache holds {cached} tokens and input_ids {length}: give the whole chat, with at least one token "
            "that is new (cache.crop(-1) takes the last one back), or new text alone with an attention_mask over both."
        )
    if cache.hidden_last(said) is None:
        raise UserError(
            "attention_mask does not show the padding that is in the cache; give new text alone, padded on the left, "
            "with an attention_mask over cache and new text."
        )
    return Continuation(length - cached, mask, [0] * rows, _first_real(mask[:, cached:]))


def _first_real(mask: Tensor) -> list[int]:
    return mask.int().argmax(1).tolist()


class CasaGenerativeModel(PreTrainedModel, GenerationMixin):
    """A model whose `generate` takes images beside the text, and goes on from a filled cache."""

    config_class = CasaConfig
    config: CasaConfig
    fusion: FusionConfig
    fused_blocks: tuple[int, ...]
    ablation: Ablation | None = None  # see casa.analysis.ablated

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        raise NotImplementedError

    def final_grids(self, grids: Grids) -> Grids:
        raise NotImplementedError

    def new_cache(self) -> CasaCache:
        """An empty cache for this model."""
        replaced = self.fused_blocks if self.fusion.placement == "replace" else ()
        return CasaCache(self.config.get_text_config(decoder=True), replaced)

    def own_cache(self, given: Cache) -> CasaCache:
        """The cache given, or an empty one of transformers' own kind made this model's, in place.

        Raises UserError for any other: of another kind, or filled by another model.
        """
        if isinstance(given, CasaCache):
            return given
        if type(given) is not DynamicCache or given.offloading or given.get_seq_length() > 0:
            raise UserError(
                "past_key_values must come from an earlier call of this model or from model.new_cache(), or be an "
                "empty DynamicCache; or leave it out."
            )
        return self.new_cache().take_over(given)

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, from a filled cache too: another turn of a chat, of which only what is new is computed.

        Beams and several answers leave a filled cache that they are given as it is.

        Args:
            inputs: int64 (B, L), as `input_ids`.
            kwargs: Of `forward` and of transformers' `generate`. With `past_key_values` (or `cache`), what an earlier
                turn left, `input_ids` and the `image_positions` in them are those of the whole chat, and pictures that
                the cache has seen are not looked at again; or, with an `attention_mask` over cache and new text, those
                of the new text alone.

        Returns:
            As in transformers: int64 (B, L + new tokens), or a `GenerateOutput`.

        Raises:
            UserError: The text does not go on from the cache.
        """
        given = pop_cache(kwargs)
        if given is not None:
            kwargs[CACHE] = cache = self.own_cache(given)
            if cache.num_text:
                kwargs |= self._continued(cache, inputs, generation_config, kwargs)
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _continued(
        self, cache: CasaCache, inputs: Tensor | None, config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> dict[str, Tensor | None]:
        """The mask and the images of what is new, from the arguments of `generate` and a filled cache."""
        embeds = kwargs.get("inputs_embeds")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        text = embeds if embeds is not None else ids
        if text is None:
            raise UserError(
                "a filled cache is gone on from with input_ids: the whole chat's, or those of its new text."
            )
        if kwargs.get("use_cache") is False:
            raise UserError("a filled cache is gone on from with use_cache=True.")
        if cache.searched:
            raise UserError(
                "this cache holds the beams of a search, not its answer; give the whole chat without past_key_values."
            )
        rows, length = text.shape[:2]
        if rows != cache.num_rows:
            raise UserError(f"the cache holds {cache.num_rows} rows and input_ids {rows}; give one row for each.")
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = _mask_of(cache, length, ids if embeds is None else None, config or self.generation_config)
        found = continuation(cache, length, mask.bool())
        if found is None:
            if embeds is not None:
                raise UserError("inputs_embeds beside a filled cache are those of the whole chat.")
            return {}
        if embeds is None:
            assert ids is not None
            _check_beginning(cache, ids, mask.bool())
        images = {name: kwargs.get(name) for name in IMAGE_INPUTS}
        return {"attention_mask": found.mask.long()} | self._new_images(cache, images, found, length)

    def _new_images(
        self, cache: CasaCache, images: dict[str, Tensor | None], found: Continuation, length: int
    ) -> dict[str, Tensor | None]:
        """The images that the cache has not seen, with their places in the new text."""
        places = images["image_positions"]
        if places is None:
            return {}
        grid = images["image_grid_thw"]
        old = [0] * len(found.first)
        ends = [cache.at_end(row) for row in range(len(old))]
        order, shifted = [], []
        for number, (row, index) in enumerate(read_image_places(places, 0 if grid is None else len(grid))):
            column = index - (length - found.length)
            if not 0 <= row < len(old):
                raise UserError(f"image {number} stands in row {row}, but the batch has rows 0..{len(old) - 1}.")
            # at the very end of what is cached stand those that were given last, and then new ones
            ends[row] -= (at_end := found.first[row] <= column <= found.real[row] and ends[row] > 0)
            if column < found.first[row] or at_end:
                old[row] += 1
            else:
                order.append(number)
                shifted.append((row, column))
        for row, count in enumerate(old):
            if count not in (0, known := cache.seen[row].images if cache.seen else 0):
                raise UserError(
                    f"{count} images stand before the new text of row {row}, and the cache has seen {known} there; "
                    "give all images of the chat or the new ones alone, or begin a new cache."
                )
        picked = self.picked(images, order)
        if order:
            picked["image_positions"] = torch.tensor(shifted, device=places.device)
        return dict.fromkeys(IMAGE_INPUTS) | picked

    def picked(self, images: Mapping[str, Tensor | None], order: Sequence[int]) -> dict[str, Tensor]:
        """Of a call's image inputs, those of the images numbered `order`; nothing if there are none."""
        grid, places = images["image_grid_thw"], images["image_positions"]
        if not order or grid is None or places is None:
            return {}
        config = self.config.encoder_config
        grids = token_grids(config, grid)
        rows_of = {
            "pixel_values": [1] * len(grids) if spec_of(config).pictures == "squares" else grid.prod(-1).tolist(),
            "image_features": [rows * columns for rows, columns in grids],
            "image_keys_values": [rows * columns for rows, columns in self.final_grids(grids)],
        }
        found = {"image_grid_thw": grid[list(order)], "image_positions": places[list(order)]}
        for name, lengths in rows_of.items():
            if (given := images.get(name)) is not None:
                if len(given) != sum(lengths):
                    raise UserError(f"image_grid_thw does not describe {name} of shape {tuple(given.shape)}.")
                each = given.split(lengths)
                found[name] = torch.cat([each[number] for number in order])
        return found

    def _sample(  # type: ignore[override]
        self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """As in transformers; afterwards the cache knows its text, and of no row more than it said."""
        cache: CasaCache | None = kwargs.get(CACHE)
        before = 0 if cache is None else cache.num_text
        found: GenerateDecoderOnlyOutput | Tensor = super()._sample(input_ids, *args, **kwargs)  # type: ignore[assignment]
        if cache is not None:
            said = (found if isinstance(found, Tensor) else found.sequences)[:, input_ids.shape[1] :]
            _settle(cache, before, input_ids, said, kwargs["generation_config"])
        return found

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._beam_search(*args, **kwargs)  # type: ignore[misc]
        if (cache := kwargs.get(CACHE)) is not None:
            cache.searched = True
        return found

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Images go in with the prompt only; with a cache, later steps find them in its state."""
        first = kwargs.get("is_first_iteration", False)
        cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
        if first and cache is not None and mask is not None:
            kwargs["next_sequence_length"] = mask.shape[1] - cache.num_text
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if not first and kwargs.get("use_cache", True):
            for name in IMAGE_INPUTS:
                inputs.pop(name, None)
        return inputs

    def _maybe_initialize_input_ids_for_generation(
        self, inputs: Tensor | None, bos_token_id: Tensor | None, model_kwargs: dict[str, Any]
    ) -> torch.LongTensor:
        """Where text is given as embeddings, rows are counted by them; transformers would count the first tensor's."""
        text_only = {name: value for name, value in model_kwargs.items() if name not in IMAGE_INPUTS}
        return super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, text_only)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> bool:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise UserError(f"cache_implementation {kind!r} is not supported; leave it out for a growing cache.")
        cache = model_kwargs.get(CACHE)
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("image_positions") is not None:
            raise UserError("pictures go in with the whole of their text; leave prefill_chunk_size out.")
        if cache is not None:
            cache._is_user_defined = True
            times = max(generation_config.num_beams, generation_config.num_return_sequences)
            if cache.num_text and times > 1:
                # the rows that were asked about stay as they are, to be asked about again
                model_kwargs[CACHE] = several = cache.twin()
                several.batch_repeat_interleave(times)
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = self.new_cache()
        return True

    def _get_candidate_generator(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> CandidateGenerator:
        """Assisted decoding: whoever drafts sees the text alone; this model, which decides, sees the pictures too."""
        if (cache := model_kwargs.get(CACHE)) is not None and cache.num_text:
            raise UserError(
                "assisted decoding begins with an empty cache (transformers would feed it what it holds already); "
                "leave past_key_values out, or the assistance."
            )
        if self.fusion.method == "insertion":
            raise UserError(
                "assisted decoding takes tokens back, which a cache of inserted images cannot; leave it out."
            )
        if self.fusion.gist:
            raise UserError("gist tokens have ids that who drafts does not know; leave assisted decoding out.")
        for name, reason in NO_DRAFTS.items():
            if getattr(generation_config, name, None):
                raise UserError(f"{name} is not supported: {reason}; pass assistant_model or prompt_lookup_num_tokens.")
        text_only = {name: value for name, value in model_kwargs.items() if name not in IMAGE_INPUTS}
        return super()._get_candidate_generator(generation_config, model_kwargs=text_only, **kwargs)  # type: ignore[misc]

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """As in transformers; gist tokens are hidden from the processors."""
        found = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        if not self.fusion.gist or not len(found):
            return found
        vocabulary = self.config.get_text_config().vocab_size
        return LogitsProcessorList([TextScores(found, vocabulary)])

    def _get_deprecated_gen_repo(
        self, generation_mode: GenerationMode, trust_remote_code: bool, custom_generate: str | None = None
    ) -> None:
        """Ways to decode that transformers has moved to code on a hub, which casa does not run."""
        if custom_generate is None and "/" in GENERATION_MODES_MAPPING.get(generation_mode, ""):
            name = generation_mode.value.replace("_", " ")
            raise UserError(f"{name} is code on a hub, which casa does not run; use greedy, sampling or beams.")

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats rows, each with its images, for beams or several answers. Images are encoded once."""
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)  # type: ignore[misc]
        if expand_size > 1 and images["image_positions"] is not None:
            images = self._repeat_images(images, expand_size)
        kwargs.update({name: value for name, value in images.items() if value is not None})
        return input_ids, kwargs

    def _repeat_images(self, images: dict[str, Any], times: int) -> dict[str, Any]:
        positions = images["image_positions"]
        if images["image_features"] is None and images["image_keys_values"] is None:
            with torch.no_grad():
                images["image_features"] = self.encode_images(images["pixel_values"], images["image_grid_thw"])
        order, rows = [], []
        for row in positions[:, 0].unique().tolist():
            mine = (positions[:, 0] == row).nonzero().flatten().tolist()
            for copy in range(times):
                order += mine
                rows += [row * times + copy] * len(mine)
        repeated = self.picked(images | {"pixel_values": None}, order)
        repeated["image_positions"][:, 0] = torch.tensor(rows, device=positions.device)
        return repeated


def _mask_of(cache: CasaCache, length: int, ids: Tensor | None, config: GenerationConfig) -> Tensor:
    """bool (B, length), where no attention_mask is given: the cached text as it is known, and of the new text all but
    padding, where transformers too would take it for such.
    """
    known = cache.known[:, :length]
    new = known.new_ones(len(known), max(0, length - cache.num_text))
    stops, pad = _as_ids(config.eos_token_id), config.pad_token_id
    if ids is not None and pad is not None and pad not in stops:
        new = ids[:, cache.num_text :] != pad
    return torch.cat([known.to(new.device), new], dim=1)


def _check_beginning(cache: CasaCache, ids: Tensor, mask: Tensor) -> None:
    """UserError if a whole chat (B, L) does not begin with the text that is cached."""
    if cache.ids is None or cache.ids.shape[1] != cache.num_text:
        return
    known = cache.known
    for row, (cached, real) in enumerate(zip(cache.ids.tolist(), known.tolist(), strict=True)):
        wanted = [token for token, is_real in zip(cached, real, strict=True) if is_real]
        given = ids[row][mask[row].to(ids.device)][: len(wanted)].tolist()
        if given != wanted:
            at = next(n for n, pair in enumerate(zip(given, wanted, strict=False)) if pair[0] != pair[1])
            raise UserError(
                f"the chat in row {row} has another token than the cache at place {at} ({given[at]}, not "
                f"{wanted[at]}): an answer that is decoded and encoded again may become other tokens. Give the ids "
                "that generate returned, with the new ones behind, or leave past_key_values out."
            )


def _settle(cache: CasaCache, before: int, ids: Tensor, said: Tensor, config: GenerationConfig) -> None:
    """Notes what text a cache holds, and forgets what rows were padded with after their end.

    before: tokens it held. ids: (B, L) as given. said: (B, n) the answers; the last token of each is not cached.
    """
    fed = said[:, : max(0, said.shape[1] - 1)]
    new = cache.num_text - before - fed.shape[1]
    old = cache.ids if cache.ids is not None and cache.ids.shape[1] == before else ids[:, : ids.shape[1] - new]
    text = torch.cat([old.to(ids.device), ids[:, ids.shape[1] - new :], fed], dim=1) if new <= ids.shape[1] else ids
    cache.ids = text if text.shape[1] == cache.num_text else None
    stops, pad = config._eos_token_tensor, config._pad_token_tensor
    if stops is None or not fed.shape[1]:
        return
    index = torch.arange(said.shape[1], device=said.device)
    is_stop = torch.isin(said, stops.to(said.device))
    kept = torch.where(is_stop.any(1), is_stop.int().argmax(1) + 1, said.shape[1])
    if pad is not None and not torch.isin(pad, stops):
        kept = torch.minimum(kept, ((said != pad.to(said.device)) * (index + 1)).amax(1))
    cache.forget_last((fed.shape[1] - kept).clamp(min=0))
