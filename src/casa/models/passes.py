"""The two ways through a text model's stack: beside image tokens (CASA, cross-attention), or with them in the stream.

Shapes: B rows, L new text tokens, d width of the text model.
"""

from typing import Any

import torch
from torch import Tensor

from casa.layers import AttentionRecorder, DecodeStep, PackedStep, plan_call
from casa.models import insertion
from casa.models.cache import CasaCache
from casa.models.fusion import STEP, FusedStep, passed_down
from casa.models.image_tokens import ImageTokens
from casa.models.inputs import TextInputs


class CasaPasses:
    """Mixed into CasaForConditionalGeneration, whose attributes these are."""

    config: Any
    fusion: Any
    decoder: Any
    gist: Any
    fused_blocks: Any
    get_input_embeddings: Any
    _layer: Any
    _project: Any

    def _source(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> dict[str, Any]:
        """Where the stack takes its text from; gist tokens have ids behind the vocabulary and embeddings here."""
        if input_ids is None:
            return {"inputs_embeds": inputs_embeds}
        if not self.fusion.gist:
            return {"input_ids": input_ids}
        vocabulary = self.config.get_text_config().vocab_size
        is_gist = input_ids >= vocabulary
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_gist, 0))
        gist = self.gist((input_ids - vocabulary).clamp(min=0))
        return {"inputs_embeds": torch.where(is_gist[..., None], gist.to(embeds.dtype), embeds)}

    def _run_fused(
        self,
        source: dict[str, Any],
        text: TextInputs,
        places: list[tuple[int, int]],
        images: ImageTokens | None,
        cache: CasaCache | None,
        record: AttentionRecorder | None,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor]:
        """The stack's output, and its last hidden states (B, L, d)."""
        decoder = self.decoder
        step = self._step(text, places, images, cache, record)
        if step is not None:
            kwargs = {**kwargs, STEP: FusedStep(step, [self._layer(index) for index in self.fused_blocks])}
        if text.sample_starts is not None:
            starts = set.intersection(*map(set, text.sample_starts))
            kwargs = {**kwargs, **passed_down(decoder, starts, text.valid.shape[1])}
        # transformers recognises packed rows by their positions, and only without a mask; padding behind them has
        # positions of its own and is seen by nobody
        output = decoder.stack(
            **source,
            attention_mask=None if text.packed else text.mask,
            position_ids=decoder.text_positions(text.position_ids),
            past_key_values=cache.text if cache is not None else None,
            use_cache=cache is not None,
            **kwargs,
        )
        if cache is not None and isinstance(step, PackedStep):
            cache.windows = step.next_state
        elif isinstance(step, DecodeStep):
            step.finish()
        seen = getattr(output, "hidden_states", None)
        if seen and seen[0] is not None and self.fusion.placement == "before" and 0 in self.fused_blocks:
            # the first block was handed its input with the update; the first hidden states are the text's embeddings
            embeds = source.get("inputs_embeds")
            embeds = embeds if embeds is not None else self.get_input_embeddings()(source["input_ids"])
            output.hidden_states = (embeds, *seen[1:])
        return output, output.last_hidden_state

    @torch.compiler.disable(reason="lays out the windows of this one call")
    def _step(
        self,
        text: TextInputs,
        places: list[tuple[int, int]],
        images: ImageTokens | None,
        cache: CasaCache | None,
        record: AttentionRecorder | None,
    ) -> PackedStep | DecodeStep | None:
        """What the layers need of this call; None if they have nothing to add."""
        fusion, decoder = self.fusion, self.decoder
        state = cache.windows if cache is not None else None
        # text is worked on, or kept for later, even while no image has been seen
        text_counts = fusion.placement == "replace" or (fusion.split == "sample" and fusion.attend != "image")
        if images is None and state is None and not text_counts:
            return None
        embedding: Any = self.get_input_embeddings()
        dtype, device = embedding.weight.dtype, text.valid.device
        if fusion.attend == "image":
            rotaries = [None for _ in self.fused_blocks]
        else:
            rotaries = decoder.rotaries(self.fused_blocks, device, dtype)
        if images is None and record is None and DecodeStep.possible(state, text.valid, fusion.history):
            assert state is not None
            return DecodeStep(state, rotaries, device, fusion.attend)
        if images is None:
            images = ImageTokens.none(self.config.get_text_config().hidden_size, dtype, device)
        plan = plan_call(
            text.valid,
            places,
            images.lengths,
            split=fusion.split,
            history=fusion.history,
            sample_starts=text.sample_starts,
            state=state,
            keep=cache is not None,
            device=device,
        )
        projected = self._project(images)
        grid = images.places() if decoder.rotary_axes > 1 else None
        return PackedStep(plan, projected, rotaries, grid, fusion.attend, "auto", state, record)

    def _run_insertion(
        self,
        source: dict[str, Any],
        text: TextInputs,
        places: list[tuple[int, int]],
        images: ImageTokens | None,
        cache: CasaCache | None,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor]:
        """The stack's output, and its last hidden states at text positions (B, L, d)."""
        decoder = self.decoder
        embeds = source.get("inputs_embeds")
        if embeds is None:
            embeds = self.get_input_embeddings()(source["input_ids"])
        if images is None:
            images = ImageTokens.none(embeds.shape[-1], embeds.dtype, embeds.device)
        three = decoder.rotary_axes > 1
        stream = insertion.merge(
            text.valid, places, images.lengths, text.sample_starts, images.grids if three else None
        )
        past = cache.stream if cache is not None else None
        after = stream.after(past)
        positions = stream.positions(past)
        if three:
            # the first row is what packed samples are told apart by: without a cache, transformers takes any row whose
            # numbers do not rise one by one for several samples, and images have one time for all their tokens
            first = positions[0] if cache is not None else stream.ordinals()
            positions = torch.cat([first[None], positions])
        if images.extra:
            kwargs = {**kwargs, "visual_pos_masks": stream.is_image, "deepstack_visual_embeds": images.extra}
        if text.packed:
            starts = stream.starts.all(0)
            kwargs = {**kwargs, **passed_down(decoder, starts.nonzero().flatten().tolist(), len(starts))}
        output = decoder.stack(
            inputs_embeds=stream.embeddings(embeds, images.tokens),
            attention_mask=None if text.packed or bool(after.mask.all()) else after.mask.long(),
            position_ids=positions if three else positions[0],
            past_key_values=cache.text if cache is not None else None,
            use_cache=cache is not None,
            **kwargs,
        )
        if cache is not None:
            cache.stream = after
        return output, stream.text_of(output.last_hidden_state)
