"""CasaForConditionalGeneration: a text model with eyes, as a transformers model.

Shapes: B rows, L new text tokens, N image tokens, d width of the text model, V vocabulary.

The backbone keeps its weights, under `backbone.`; beside it stand the image encoder (`vision.`), the
projector (`projector.`) and the fusion layers (`casa_layers.<block>.`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from casa.errors import UserError
from casa.layers import (
    CasaAttention,
    DecodeStep,
    PackedStep,
    Record,
    plan_call,
    project_images,
)
from casa.models import insertion
from casa.models.backbone import decoder_of
from casa.models.cache import CasaCache
from casa.models.config import CasaConfig
from casa.models.fusing import STEP, FusedStep, fuse
from casa.models.generation import CasaGeneration
from casa.models.inputs import TextInputs, read_image_places, read_text_inputs
from casa.models.loading import load_checked
from casa.vision import Projector, encode, output_width, token_grids

# encoders that transformers does not list under AutoModel
ENCODERS: dict[str, type[PreTrainedModel]] = {"qwen2_5_vl_vision": Qwen2_5_VisionTransformerPretrainedModel}


def new_encoder(config: Any) -> PreTrainedModel:
    """An image encoder with fresh weights, from its config."""
    known = ENCODERS.get(config.model_type)
    return known._from_config(config) if known is not None else AutoModel.from_config(config)


class CasaForConditionalGeneration(CasaGeneration, PreTrainedModel, GenerationMixin):
    """Text with images in, logits for the text out (paper, section 2; `FusionConfig` has the variants)."""

    config_class = CasaConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(
        self,
        config: CasaConfig,
        backbone: PreTrainedModel | None = None,
        vision: PreTrainedModel | None = None,
    ) -> None:
        """Fresh weights for all parts but the ones given, which are taken over as they are (see `adapt`)."""
        super().__init__(config)
        text, encoder = config.text_config, config.vision_config
        self.backbone = backbone if backbone is not None else AutoModelForCausalLM.from_config(text)
        self.vision = vision if vision is not None else new_encoder(encoder)
        self.projector = Projector(output_width(encoder), text.hidden_size)
        self.fusion = config.typed_fusion
        self.casa_layers = nn.ModuleDict()
        blocks = self.decoder.blocks
        self.fused_blocks = self.fusion.blocks(len(blocks))
        if not self.fusion.borrows:
            for index in self.fused_blocks:
                attention = blocks[index].get_submodule("self_attn")
                self.casa_layers[str(index)] = CasaAttention(attention, self.fusion.gate)
        fuse(blocks, self.fused_blocks, self.fusion.placement)
        tied = getattr(self.backbone, "_tied_weights_keys", None) or {}
        if text.tie_word_embeddings:
            self._tied_weights_keys = {f"backbone.{k}": f"backbone.{v}" for k, v in tied.items()}
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, from safetensors; `casa-tiny` names the checkpoint in the package.

        Raises UserError if the folder is missing or its weights are not exactly this model's.
        """
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    @property
    def decoder(self) -> Any:
        return decoder_of(self.backbone)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def initialise_fusion(self) -> None:
        """Makes every fusion layer a copy of the self-attention of its block (paper, "Initialisation")."""
        for index, layer in self.casa_layers.items():
            layer.copy_from(self.decoder.blocks[int(index)].get_submodule("self_attn"))  # type: ignore[operator]

    def new_cache(self) -> CasaCache:
        """An empty cache for this model."""
        gone = set(self.fused_blocks) if self.fusion.placement == "replace" else set()
        counter = next(index for index in range(len(self.decoder.blocks)) if index not in gone)
        return CasaCache(self.config.get_text_config(decoder=True), counter)

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """(N, d_v): the encoder's tokens. They can be kept and passed as `image_features` with any text."""
        return encode(self.vision, pixel_values.to(self.vision.dtype), image_grid_thw)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_positions: Tensor | None = None,
        image_features: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        record: Record | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V) for text; the loss too if `labels` (B, L, -100 where none) are given.

        input_ids: int64 (B, L), no placeholders for images. attention_mask: (B, cached and new tokens).
        position_ids: (B, L); several samples packed in one row restart at 0, and then no cache is kept.
        image_positions: int64 (n, 2), sorted: the row, and the index in this call's row before which the
            image stands. image_grid_thw: int64 (n, 3), patches. pixel_values: patches of all images, or
            image_features (N, d_v), what `encode_images` gave for them.
        record: called with every CASA layer's queries and keys (for analysis; not while decoding).
        Raises UserError for positions, masks and images that do not fit each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give input_ids or inputs_embeds, and not both.")
        like = input_ids if input_ids is not None else inputs_embeds
        assert like is not None
        cache = self._cache_for(past_key_values, use_cache)
        text = read_text_inputs(
            like.shape[0],
            like.shape[1],
            cache.num_text if cache is not None else 0,
            attention_mask,
            position_ids,
            like.device,
        )
        if text.packed:
            if past_key_values is not None or use_cache:
                raise UserError("packed rows cannot use a cache; pass use_cache=False or one sample per row.")
            cache = None
        images, grids = self._image_tokens(pixel_values, image_grid_thw, image_features)
        places = read_image_places(image_positions, len(grids))
        lengths = [rows * columns for rows, columns in grids]
        source = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        if self.fusion.method == "insertion":
            output, logits = self._run_insertion(source, text, places, lengths, images, cache, logits_to_keep, kwargs)
        else:
            output, logits = self._run_fused(
                source, text, places, lengths, images, cache, logits_to_keep, record, kwargs
            )
        if cache is not None:
            cache.num_text += like.shape[1]
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, text, kwargs)
        return CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=cache,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _cache_for(self, given: Cache | None, use_cache: bool | None) -> CasaCache | None:
        if isinstance(given, CasaCache):
            return given
        if given is not None and (given.is_compileable or given.get_seq_length() > 0):
            raise UserError("past_key_values must come from an earlier call of this model, or be left out.")
        wanted = use_cache if use_cache is not None else self.config.use_cache and not self.training
        return self.new_cache() if wanted else None

    def _image_tokens(
        self, pixel_values: Tensor | None, grid: Tensor | None, features: Tensor | None
    ) -> tuple[Tensor | None, list[tuple[int, int]]]:
        """Projected image tokens (N, d) and the rows and columns of each image."""
        if pixel_values is None and features is None:
            return None, []
        if grid is None:
            raise UserError("pixel_values come with image_grid_thw; the processor makes both.")
        grids = token_grids(self.config.vision_config, grid)
        if features is None:
            assert pixel_values is not None
            features = self.encode_images(pixel_values, grid)
        if features.shape[0] != sum(rows * columns for rows, columns in grids):
            raise UserError(f"image_grid_thw does not describe the {features.shape[0]} image tokens given.")
        return self.projector(features, grids), grids

    def _run_fused(
        self,
        source: dict[str, Any],
        text: TextInputs,
        places: list[tuple[int, int]],
        lengths: list[int],
        images: Tensor | None,
        cache: CasaCache | None,
        logits_to_keep: int | Tensor,
        record: Record | None,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor]:
        step = self._step(text, places, lengths, images, cache, record)
        if step is not None:
            layers = [self._layer(index) for index in self.fused_blocks]
            kwargs = {**kwargs, STEP: FusedStep(step, layers)}
        mask = text.mask
        if text.packed:
            # transformers recognises packed rows by their positions, and only without a mask; padding behind
            # them has positions of its own and is seen by nobody
            mask = None
        output = self.backbone(
            **source,
            attention_mask=mask,
            position_ids=text.position_ids,
            past_key_values=cache.text if cache is not None else None,
            use_cache=cache is not None,
            logits_to_keep=logits_to_keep,
            **_without_loss(kwargs),
        )
        if cache is not None and isinstance(step, PackedStep):
            cache.windows = step.next_state
        elif isinstance(step, DecodeStep):
            step.finish()
        return output, output.logits

    def _layer(self, index: int) -> nn.Module | None:
        name = str(index)
        return self.casa_layers[name] if name in self.casa_layers else None  # noqa: SIM401 (a ModuleDict has no get)

    def _step(
        self,
        text: TextInputs,
        places: list[tuple[int, int]],
        lengths: list[int],
        images: Tensor | None,
        cache: CasaCache | None,
        record: Record | None,
    ) -> PackedStep | DecodeStep | None:
        """What the layers need of this call; None if they have nothing to add."""
        fusion = self.fusion
        state = cache.windows if cache is not None else None
        embedding: Any = self.get_input_embeddings()
        dtype, device = embedding.weight.dtype, text.valid.device
        rotary = None if fusion.attend == "image" else self.decoder.rotary(device, dtype)
        # text is worked on, or kept for later, even while no image has been seen
        text_counts = fusion.placement == "replace" or (fusion.split == "sample" and fusion.attend != "image")
        if images is None and state is None and not text_counts:
            return None
        if images is None and record is None and DecodeStep.possible(state, text.valid, fusion.history):
            assert state is not None
            return DecodeStep(state, rotary, device, fusion.attend)
        plan = plan_call(
            text.valid,
            places,
            lengths,
            split=fusion.split,
            history=fusion.history,
            sample_starts=text.sample_starts,
            state=state,
            keep=cache is not None,
            device=device,
        )
        if images is None:
            images = torch.zeros(0, self.config.text_config.hidden_size, dtype=dtype, device=device)
        decoder = self.decoder
        sources = [self._layer(i) or decoder.blocks[i].get_submodule("self_attn") for i in self.fused_blocks]
        norms = [decoder.image_norm(index) for index in self.fused_blocks]
        projected = project_images(images, sources, norms)
        return PackedStep(plan, projected, rotary, fusion.attend, "auto", state, record)

    def _run_insertion(
        self,
        source: dict[str, Any],
        text: TextInputs,
        places: list[tuple[int, int]],
        lengths: list[int],
        images: Tensor | None,
        cache: CasaCache | None,
        logits_to_keep: int | Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor]:
        embeds = source.get("inputs_embeds")
        if embeds is None:
            embeds = self.get_input_embeddings()(source["input_ids"])
        inserted = images if images is not None else embeds.new_zeros(0, embeds.shape[-1])
        stream = insertion.merge(text.valid, places, lengths, text.sample_starts)
        past = cache.stream_mask if cache is not None else None
        mask = stream.mask if past is None else torch.cat([past, stream.mask], dim=1)
        output = self.backbone.model(
            inputs_embeds=stream.embeddings(embeds, inserted),
            attention_mask=None if text.packed or bool(mask.all()) else mask.long(),
            position_ids=stream.positions(past),
            past_key_values=cache.text if cache is not None else None,
            use_cache=cache is not None,
            **_without_loss(kwargs),
        )
        if cache is not None:
            cache.stream_mask = mask
        hidden = stream.text_of(output.last_hidden_state)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return output, self.get_output_embeddings()(hidden[:, keep])

    def _loss(self, logits: Tensor, labels: Tensor, text: TextInputs, kwargs: dict[str, Any]) -> Tensor:
        if text.sample_starts is not None:
            # the first token of a packed sample is not for the last one of the sample before it to predict
            labels = labels.clone()
            for row, starts in enumerate(text.sample_starts):
                labels[row, starts] = -100
        counted = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
        vocabulary = self.config.get_text_config().vocab_size
        return self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **counted)


def _without_loss(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in ("num_items_in_batch", "return_dict")}
