"""The two ways through a text model's stack: beside image tokens (fusion), or with them in the stream (insertion).

Shapes: B rows, L new text tokens, N image tokens, d width of the text model, Hkv key heads, D channels of a head.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from casa.errors import UserError
from casa.layers import Ablation, AttentionRecorder, CasaAttention, DecodeStep, PackedStep, plan_call, project_images
from casa.models import insertion
from casa.models.backbones import Decoder
from casa.models.cache import CACHE, CasaCache
from casa.models.configuration_casa import FusionConfig
from casa.models.decoding import FEW, is_autocast, prepared
from casa.models.fusion import STEP, FusedStep, passed_down
from casa.models.inputs import TextInputs
from casa.vision import Grids

INSERTION = FusionConfig.insertion()
Places = list[tuple[int, int]]
"""Of each image: its row, and the index in this call's row before which it stands."""


@dataclass(frozen=True)
class ImageTokens:
    """The image tokens of a call in the text model's width.

    Attributes:
        tokens: (N, d), of all images.
        extra: k times (N, d), what joins them behind each of the first k blocks.
        keys_values: (N, Hkv, D) each, of each fusion layer, where the caller brought them; tokens is (N, 0) then.
    """

    tokens: Tensor
    grids: Grids = field(default_factory=list)
    extra: Sequence[Tensor] = ()
    keys_values: list[tuple[Tensor, Tensor]] | None = None

    @property
    def lengths(self) -> list[int]:
        return [rows * columns for rows, columns in self.grids]

    def rows_and_columns(self) -> Tensor:
        """int64 (2, N): row and column of each token in its image."""
        found = [torch.zeros(2, 0, dtype=torch.int64)]
        for rows, columns in self.grids:
            found.append(
                torch.stack([torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)])
            )
        return torch.cat(found, dim=1).to(self.tokens.device)


@dataclass(frozen=True)
class FusionLayers:
    """The fusion layers of a model beside its text model's blocks: views, which own nothing.

    Attributes:
        blocks: Those that have a layer.
        layers: One each; None where the block's self-attention is borrowed.
        ablation: What they are kept from, if anything.
    """

    decoder: Decoder
    config: FusionConfig
    blocks: tuple[int, ...]
    layers: list[CasaAttention | None]
    ablation: Ablation | None = None

    @property
    def sources(self) -> list[nn.Module]:
        """The modules whose projections make the keys and values of each layer."""
        pairs = zip(self.layers, self.blocks, strict=True)
        return [self.decoder.attention(block) if layer is None else layer for layer, block in pairs]

    def key_sizes(self) -> list[tuple[int, int]]:
        """Key heads and channels of a head, of each layer."""
        found = []
        for source in self.sources:
            width = cast(int, source.head_dim)
            found.append((cast(nn.Linear, source.get_submodule("k_proj")).out_features // width, width))
        return found

    def keys_values(self, images: ImageTokens) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (N, Hkv, D) of the image tokens in every layer, before rotary positions."""
        if images.keys_values is not None:
            return images.keys_values
        decoder, sources = self.decoder, self.sources
        check_one_device(sources)
        with fetched(decoder.blocks[block].get_submodule("input_layernorm") for block in self.blocks):
            tokens = images_by_depth(images, decoder, self.blocks, self.config.update_images)
            return project_images(tokens, sources, [decoder.image_norm(block) for block in self.blocks])

    def run(
        self,
        embeds: Tensor,
        text: TextInputs,
        places: Places,
        images: ImageTokens | None,
        cache: CasaCache | None,
        record: AttentionRecorder | None,
        kwargs: dict[str, object],
    ) -> BaseModelOutputWithPast:
        """The stack's output for text (B, L, d)."""
        decoder = self.decoder
        step = self._step(embeds, text, places, images, cache, record)
        if cache is not None and record is None and is_short(decoder, embeds, text, cache, self.ablation, kwargs):
            quick = prepared(decoder, self.config, self.blocks, self.layers)
            if quick.refusal is None:
                mask = None if text.mask is None or bool(text.mask.all()) else text.mask.bool()
                rotaries = decoder.rotaries(range(len(decoder.blocks)), embeds.device, decoder.dtype)
                hidden = quick(embeds, text.position_ids, mask, rotaries, cache, step)
                if step is not None:
                    cache.windows = step.finish()
                return BaseModelOutputWithPast(last_hidden_state=cast(torch.FloatTensor, hidden))
        if step is not None:
            silent = self.ablation.silent if self.ablation is not None else frozenset()
            kwargs = {**kwargs, STEP: FusedStep(step, list(self.layers), silent)}
        if text.sample_starts is not None:
            starts = set.intersection(*map(set, text.sample_starts))
            kwargs = {**kwargs, **passed_down(decoder, starts, embeds.shape[1])}
        # transformers recognises packed rows by their positions, and only without a mask; padding behind them has
        # positions of its own and is seen by nobody
        output: BaseModelOutputWithPast = decoder.stack(
            inputs_embeds=embeds,
            attention_mask=None if text.packed else text.mask,
            position_ids=decoder.text_positions(text.position_ids),
            **{CACHE: None if cache is None else cache.text},
            use_cache=cache is not None,
            **kwargs,
        )
        if cache is not None and step is not None:
            cache.windows = step.finish()
        seen = output.hidden_states
        if seen and self.config.placement == "before" and 0 in self.blocks:
            # the first block was handed its input with the update; the first hidden states are the text's embeddings
            output.hidden_states = (embeds, *seen[1:])  # type: ignore[assignment]
        return output

    @torch.compiler.disable(reason="lays out the windows of this one call")
    def _step(
        self,
        embeds: Tensor,
        text: TextInputs,
        places: Places,
        images: ImageTokens | None,
        cache: CasaCache | None,
        record: AttentionRecorder | None,
    ) -> PackedStep | DecodeStep | None:
        """What the layers need of this call; None if they have nothing to add."""
        config, decoder = self.config, self.decoder
        state = None if cache is None else cache.windows
        # text is worked on, or kept for later, even while no image has been seen
        text_counts = config.placement == "replace" or (config.split == "sample" and config.attend != "image")
        if images is None and state is None and not text_counts:
            return None
        device = text.valid.device
        if config.attend == "image":
            rotaries = [None for _ in self.blocks]
        else:
            rotaries = decoder.rotaries(self.blocks, device, decoder.dtype)
        is_watched = record is not None or self.ablation is not None
        if images is None and not is_watched and DecodeStep.possible(state, text.valid):
            assert state is not None
            return DecodeStep(state, rotaries, device, config.attend, text.valid.shape[1])
        if images is not None and cache is not None and not is_watched:
            step = self._frame_step(text.valid, places, images, cache, rotaries)
            if step is not None:
                return step
        if images is None:
            images = ImageTokens(embeds.new_zeros(0, embeds.shape[-1], dtype=decoder.dtype))
        plan = plan_call(
            text.valid,
            places,
            images.lengths,
            split=config.split,
            history=config.history,
            sample_starts=text.sample_starts,
            state=state,
            keep=cache is not None,
            skip_blind=config.placement != "replace" and not is_watched,
            device=device,
        )
        grid = images.rows_and_columns() if decoder.rotary_axes > 1 else None
        return PackedStep(plan, self.keys_values(images), rotaries, grid, config.attend, state, record, self.ablation)

    def _frame_step(
        self, valid: Tensor, places: Places, images: ImageTokens, cache: CasaCache, rotaries: list
    ) -> DecodeStep | None:
        """For text with images before the same token of every row, which open a window there."""
        config, (rows, length) = self.config, valid.shape
        at = places[0][1] if places else length
        pairs = list(zip(places, images.lengths, strict=True))
        counts = [sum(tokens for place, tokens in pairs if place == (row, at)) for row in range(rows)]
        orderly = 0 <= at < length and places == sorted(places) and sum(counts) == sum(images.lengths)
        alike = orderly and all(counts) and bool(valid.all())
        if torch.is_grad_enabled() or config.split != "image" or config.history or not alike:
            return None
        state = cache.windows
        # images with no text between them are one run
        apart = state is None or all(not row or row[-1].text for row in state.windows)
        if not (DecodeStep.possible(state, valid) if at else apart):
            return None
        grid = images.rows_and_columns() if self.decoder.rotary_axes > 1 and config.attend != "image" else None
        new = DecodeStep.opening(self.keys_values(images), counts, rotaries, grid, config.attend, length - at)
        return DecodeStep(state, rotaries, valid.device, config.attend, at).then(new) if at and state else new


def is_short(
    decoder: Decoder,
    embeds: Tensor,
    text: TextInputs,
    cache: CasaCache,
    ablation: Ablation | None,
    kwargs: dict[str, object],
) -> bool:
    """Whether a call feeds few tokens behind others, as generation and live sessions do, and asks for no more."""
    return (
        0 < embeds.shape[0] * embeds.shape[1] <= FEW
        and cache.num_text > 0
        and not (cache.slides or text.packed or decoder.stack.training)
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_autocast())
        and ablation is None
        and not any(value for name, value in kwargs.items() if name != "return_dict")
    )


def run_insertion(
    decoder: Decoder,
    embeds: Tensor,
    text: TextInputs,
    places: Places,
    images: ImageTokens | None,
    cache: CasaCache | None,
    ablation: Ablation | None,
    kwargs: dict[str, object],
) -> BaseModelOutputWithPast:
    """The stack's output for text (B, L, d) with image tokens in it; its last hidden states are those of the text.

    Image tokens that are hidden keep their places, and nothing looks at them.
    """
    quick = None
    if images is None and cache is not None and is_short(decoder, embeds, text, cache, ablation, kwargs):
        quick = prepared(decoder, INSERTION, (), ())
    if images is None:
        images = ImageTokens(embeds.new_zeros(0, embeds.shape[-1]))
    three = decoder.rotary_axes > 1
    stream = insertion.merge(text.valid, places, images.lengths, text.sample_starts, images.grids if three else None)
    if images.extra:
        kwargs = {**kwargs, "visual_pos_masks": stream.is_image, "deepstack_visual_embeds": images.extra}
    if ablation is not None and "images" in ablation.hidden:
        if text.packed:
            raise UserError("images cannot be hidden from packed rows under insertion; give one sample per row.")
        stream = replace(stream, mask=stream.mask & ~stream.is_image)
    past = None if cache is None else cache.stream
    after = stream.after(past)
    positions, rows = stream.positions(past), stream.embeddings(embeds, images.tokens)
    if quick is not None and quick.refusal is None and cache is not None:
        rotaries = decoder.rotaries(range(len(decoder.blocks)), embeds.device, decoder.dtype)
        mask = None if bool(after.mask.all()) else after.mask
        # text stands at one position on all axes
        hidden = stream.text_of(quick(rows, positions[0], mask, rotaries, cache, None))
        cache.stream = after
        return BaseModelOutputWithPast(last_hidden_state=cast(torch.FloatTensor, hidden))
    if three:
        # the first row is what packed samples are told apart by: without a cache, transformers takes any row whose
        # numbers do not rise one by one for several samples, and images have one time for all their tokens
        first = positions[0] if cache is not None else stream.ordinals()
        positions = torch.cat([first[None], positions])
    if text.packed:
        starts = stream.starts.all(0)
        kwargs = {**kwargs, **passed_down(decoder, starts.nonzero().flatten().tolist(), len(starts))}
    output: BaseModelOutputWithPast = decoder.stack(
        inputs_embeds=rows,
        attention_mask=None if text.packed or bool(after.mask.all()) else after.mask.long(),
        position_ids=positions if three else positions[0],
        **{CACHE: None if cache is None else cache.text},
        use_cache=cache is not None,
        **kwargs,
    )
    if cache is not None:
        cache.stream = after
    assert output.last_hidden_state is not None
    output.last_hidden_state = stream.text_of(output.last_hidden_state)  # type: ignore[assignment]
    return output


def images_by_depth(images: ImageTokens, decoder: Decoder, blocks: Sequence[int], update: bool) -> list[Tensor]:
    """What the fusion layer of each of `blocks` (rising) sees: (N, d), the same tensor where nothing has changed.

    Args:
        update: Image tokens also go through each block's feed-forward network.
    """
    tokens, found, block = images.tokens, [], 0
    for index in blocks:
        while block < index:
            if update:
                tokens = tokens + decoder.feed_forward(block, tokens)
            if block < len(images.extra):
                tokens = tokens + images.extra[block]
            block += 1
        found.append(tokens)
    return found


@contextmanager
def fetched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the modules' own weights can be read, also where accelerate keeps them on disk until they are called."""
    kept = [(module, module._hf_hook) for module in modules if hasattr(module, "_hf_hook")]
    for module, hook in kept:
        hook.pre_forward(module)  # type: ignore[operator, union-attr]
    try:
        yield
    finally:
        for module, hook in kept:
            hook.post_forward(module, None)  # type: ignore[operator, union-attr]


def check_one_device(layers: Iterable[nn.Module]) -> None:
    """Raises UserError if layers that share image keys, values and a window state run on several devices."""
    found = {p.device for layer in layers for p in layer.parameters() if p.device.type != "meta"}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise UserError(
            f"the fusion layers stand on several devices ({names}); "
            "give a device_map that keeps backbone and casa_layers on one, or on one and on disk."
        )
