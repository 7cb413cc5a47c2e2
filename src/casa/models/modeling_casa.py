"""CasaForConditionalGeneration: a text model with eyes, as a transformers model.

Shapes: B rows, L new text tokens, N image tokens, d width of the text model, V vocabulary.

The backbone keeps its weights, under `backbone.`; beside it stand the fusion layers (`casa_layers.<block>.`) and,
if the backbone has no eyes of its own, the image encoder (`vision.`) and the projector (`projector.`).
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import TransformersKwargs, can_return_tuple

from casa.errors import UserError
from casa.layers import AttentionRecorder, CasaAttention
from casa.models.backbone_source import save_added, with_backbone
from casa.models.backbones import Decoder, InsertionVLM, decoder_of, new_backbone
from casa.models.cache import CACHE, CasaCache
from casa.models.configuration_casa import CasaConfig
from casa.models.decoding import short_logits
from casa.models.fusion import fuse
from casa.models.generation import CasaGenerativeModel
from casa.models.inputs import count_tokens, read_image_places, read_text_inputs
from casa.models.loading import WHERE, leave_odd_shapes, load_checked
from casa.models.losses import IGNORE_INDEX, at_least_one, chunked_cross_entropy, within_samples
from casa.models.passes import FusionLayers, ImageTokens, run_insertion
from casa.settings import near
from casa.vision import (
    PROJECTORS,
    AveragePool,
    Grids,
    PixelShuffle,
    QFormer,
    encode,
    extra_depths,
    make_compressor,
    new_encoder,
    output_width,
    token_grids,
)

# what transformers and its neighbours pass to any model: used here, by the blocks, or by nobody
PASSED = frozenset(TransformersKwargs.__annotations__) | {"token_type_ids", "return_dict"}
UNREAD = ("num_items_in_batch", "token_type_ids")


def _check_names(given: Iterable[str]) -> None:
    """UserError for an argument of `forward` that nobody knows."""
    for name in given:
        if name not in PASSED:
            known = [*inspect.signature(CasaForConditionalGeneration.forward).parameters, *PASSED]
            hint = near(name, [one for one in known if one not in ("self", "kwargs")], "it takes")
            raise UserError(f"the model takes no argument {name!r}; {hint}")


class CasaForConditionalGeneration(CasaGenerativeModel):
    """Text with images in, logits for the text out (paper, section 2; `FusionConfig` has the variants)."""

    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    # the backbone and the encoder add their own
    _no_split_modules = ["CasaAttention", "Projector", "LinearProjector", "QFormer", "PixelShuffle"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    accepts_loss_kwargs = True

    # with labels, the logits of so many tokens are made at once and none are returned; None returns all of them
    loss_chunk: int | None = None
    backbone: PreTrainedModel
    vision: PreTrainedModel
    projector: nn.Module
    compressor: AveragePool | PixelShuffle | QFormer
    gist: nn.Embedding
    casa_layers: nn.ModuleDict

    def __init__(
        self, config: CasaConfig, backbone: PreTrainedModel | None = None, vision: PreTrainedModel | None = None
    ) -> None:
        """Fresh weights for all parts but the ones given, which are taken over as they are (see `adapt`)."""
        if getattr(backbone, "is_quantized", False):
            raise UserError(
                "this backbone is quantised, and fusion layers start as copies of its projections; adapt it as it was "
                "before (or backbone.dequantize(), where its kind can), save the model, and load that with "
                "quantization_config."
            )
        super().__init__(config)
        self.backbone_name: str | None = None  # where the backbone was read from
        width = config.get_text_config().hidden_size
        self.fusion = fusion = config.typed_fusion
        self.backbone = backbone if backbone is not None else new_backbone(config.text_config)
        if config.vision_config is not None:
            self.vision = vision if vision is not None else new_encoder(config.vision_config)
            self.projector = PROJECTORS[fusion.projector](output_width(config.vision_config), width)
        if fusion.compressor is not None:
            self.compressor = make_compressor(fusion.compressor, width)
        if fusion.gist:
            self.gist = nn.Embedding(fusion.gist, width)
        self.casa_layers = nn.ModuleDict()
        decoder = self.decoder
        decoder.check()
        blocks = decoder.blocks
        self.fused_blocks = fusion.blocks(len(blocks))
        if not fusion.borrows:
            for index in self.fused_blocks:
                self.casa_layers[str(index)] = CasaAttention(decoder.attention(index), fusion.gate)
        fuse(blocks, self.fused_blocks, fusion.placement, decoder.post_norm)
        tied = getattr(self.backbone, "_tied_weights_keys", None) or {}
        if config.tie_word_embeddings:
            self._tied_weights_keys = {f"backbone.{k}": f"backbone.{v}" for k, v in tied.items()}
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, backbone: str | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers, from safetensors; `casa-tiny` names the checkpoint in the package.

        Args:
            backbone: Of a folder that leaves out its backbone's weights, where they are, if not where the folder says.

        Raises:
            UserError: The folder or its backbone is missing, or the weights are not exactly this model's.
        """
        read = super().from_pretrained

        def load(path: Any, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
            if quantization_config is not None:
                kwargs["quantization_config"] = leave_odd_shapes(quantization_config, cls, path, kwargs)
            config = kwargs.get("config")
            if not isinstance(config, CasaConfig):
                config = CasaConfig.from_pretrained(config or path, **{n: kwargs[n] for n in WHERE if n in kwargs})
            if config.backbone_source is None:
                if backbone is not None:
                    raise UserError(f"{path} holds its backbone's weights; leave out backbone.", field="backbone")
                return read(path, *args, **kwargs)
            found, name = with_backbone(path, config, backbone, kwargs)
            model: Any
            model, info = read(None, *args, **kwargs | found)  # type: ignore[misc]
            model.config.backbone_source, model.backbone_name = None, name
            model.name_or_path = model.config.name_or_path = str(path)
            return model, info

        return load_checked(load, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        *args: Any,
        added_only: bool = False,
        backbone: str | Sequence[str] | None = None,
        packed: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers; or only what fusion and training added or changed.

        Args:
            save_directory: The folder.
            added_only: Leaves out the weights of the backbone that are those of its own files. The folder says where
                these are, and `from_pretrained` reads them from there.
            backbone: Where they are: a path, a hub id, or an installed package. Left out, where `adapt` read them. Of
                several, those behind the first hold the same model, in another precision perhaps, if that is missing.
            packed: The new weights in two thirds of the bytes, the same to the bit (`casa.models.packed`).
            args, kwargs: As in transformers.

        Raises:
            UserError: The backbone is not named, or is another.
        """
        if added_only:
            save_added(self, save_directory, backbone, packed, **kwargs)
        elif backbone is not None or packed:
            raise UserError("backbone and packed are for added_only=True; leave them out.", field="added_only")
        else:
            super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def decoder(self) -> Decoder:
        """The view of the backbone's text model."""
        return decoder_of(self.backbone)

    @property
    def encoder(self) -> PreTrainedModel:
        """The image encoder: this model's own, or the backbone's."""
        decoder = self.decoder
        return cast(PreTrainedModel, decoder.tower) if isinstance(decoder, InsertionVLM) else self.vision

    def get_decoder(self) -> nn.Module:
        """The text model without its head."""
        return self.decoder.stack

    def set_decoder(self, decoder: nn.Module) -> None:
        """Puts another text model in its place. Raises UserError where fusion layers are attached to the one there."""
        if self.fused_blocks and decoder is not self.decoder.stack:
            raise UserError("fusion layers belong to the blocks of this text model; adapt the other one instead.")
        self.backbone.set_submodule(self.decoder.stack_at, decoder)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The image encoder for "image" and "video"; the model itself where it has none, as in transformers."""
        if modality in ("image", "video"):
            return self.encoder
        return self if modality is None else super().get_encoder(modality)

    def set_encoder(self, encoder: PreTrainedModel, modality: str | None = None) -> None:
        """Puts another image encoder in its place, for "image" or "video". Raises UserError for anything else."""
        if modality not in ("image", "video"):
            raise UserError(f"this model has no encoder for {modality}; give modality='image'.")
        decoder = self.decoder
        if isinstance(decoder, InsertionVLM):
            self.backbone.set_submodule(decoder.tower_at, encoder)
        else:
            self.vision = encoder

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    @property
    def gist_ids(self) -> list[int]:
        """Ids of the gist tokens, behind the vocabulary; the processor writes them after every image."""
        vocabulary = self.config.get_text_config().vocab_size
        return list(range(vocabulary, vocabulary + self.fusion.gist))

    def initialise_fusion(self) -> None:
        """Makes every fusion layer a copy of the self-attention of its block (paper, "Initialisation")."""
        if self.fusion.compressor is not None:
            # transformers' own initialisation has been over it
            self.compressor.reset_parameters()
        for block, layer in zip(self.fused_blocks, self.fusion_layers.layers, strict=True):
            if layer is not None:
                layer.copy_from(self.decoder.attention(block), silent=self.fusion.output == "zero")

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; the backbone's own config follows.

        Raises UserError for a model with gist tokens: their ids stand behind the vocabulary, and would move.
        """
        if self.fusion.gist and (new_num_tokens is not None or pad_to_multiple_of is not None):
            raise UserError(
                "this model's gist tokens have ids behind its vocabulary, which would move; "
                "resize the backbone before adapt."
            )
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for config in (self.backbone.config, self.backbone.config.get_text_config(decoder=True)):
            if hasattr(config, "vocab_size"):
                config.vocab_size = self.config.get_text_config().vocab_size
        return embedding

    def _cast_adapter_dtype(self, *args: object, **kwargs: object) -> None:
        """Asked by PEFT of a model that it wraps as it is, which its prompt methods do, to refuse them in time."""
        raise UserError(
            "PEFT's prompt methods (prompt tuning, p-tuning, prefix tuning, CPT, cartridges) put virtual tokens before "
            "the text, where the places of images do not count them; use one that changes weights: LoRA, DoRA, IA3."
        )

    @property
    def checkpoints_blocks(self) -> bool:
        """Whether blocks of the text model run again in the backward pass instead of keeping their activations."""
        return any(getattr(block, "gradient_checkpointing", False) for block in self.decoder.blocks)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, *args: int, **kwargs: int
    ) -> None:
        """Image keys and values reach a block beside its arguments, which reentrant checkpointing cannot follow."""
        asked = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
        if enable and asked:
            raise UserError("use_reentrant=True loses the gradients of images; leave it out, or pass False.")
        if enable and asked is None:
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)

    # The image side depends on no text, so any of it may be done ahead, kept, and used again.

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """(N, d_v): the encoder's tokens. They can be kept and passed as `image_features` with any text."""
        return encode(self.encoder, pixel_values.to(self.encoder.dtype), image_grid_thw)

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: object
    ) -> BaseModelOutputWithPooling:
        """As VLMs of transformers have it: what a picture becomes for the text model.

        Returns last_hidden_state, (N, d_v), what `encode_images` gives, and pooler_output, for each image (n, d).
        """
        features = self.encode_images(pixel_values, image_grid_thw)
        images = self.image_tokens(features, token_grids(self.config.encoder_config, image_grid_thw))
        each = images.tokens.split(images.lengths)
        return BaseModelOutputWithPooling(
            last_hidden_state=cast(torch.FloatTensor, features), pooler_output=cast(torch.FloatTensor, each)
        )

    def image_keys_values(self, image_features: Tensor, image_grid_thw: Tensor) -> Tensor:
        """(N, K): keys and values of image tokens in all fusion layers, side by side, before rotary positions.

        They depend on nothing but the image and can be kept, or made while text is still being generated, and passed
        as `image_keys_values` in place of pixels. N counts tokens after compression; K is twice the layers' key heads
        times their channels. UserError under insertion, which has none.
        """
        if self.fusion.method == "insertion":
            raise UserError("an insertion model has no fusion layers; pass image_features.")
        images = self.image_tokens(image_features, token_grids(self.config.encoder_config, image_grid_thw))
        pairs = self.fusion_layers.keys_values(images)
        return torch.cat([part.flatten(1) for pair in pairs for part in pair], dim=-1)

    @property
    def fusion_layers(self) -> FusionLayers:
        """The view of the fusion layers, beside their blocks."""
        own = {int(block): cast(CasaAttention, layer) for block, layer in self.casa_layers.items()}
        layers = [own.get(block) for block in self.fused_blocks]
        return FusionLayers(self.decoder, self.fusion, self.fused_blocks, layers, self.ablation)

    @torch.compiler.disable(reason="depends on the values of grids; encoders compile by themselves")
    def _read_images(
        self, pixel_values: Tensor | None, grid: Tensor | None, features: Tensor | None, keys_values: Tensor | None
    ) -> ImageTokens | None:
        """This call's image tokens; None if it has no images."""
        if pixel_values is None and features is None and keys_values is None:
            return None
        if grid is None:
            raise UserError("pixel_values come with image_grid_thw; the processor makes both.")
        grids = token_grids(self.config.encoder_config, grid)
        if keys_values is not None:
            return self._projected_tokens(keys_values, grids)
        if pixel_values is not None and features is None:
            features = self.encode_images(pixel_values, grid)
        return None if features is None else self.image_tokens(features, grids)

    def image_tokens(self, features: Tensor, grids: Grids) -> ImageTokens:
        """The encoder's tokens (N, d_v) behind connector or projector, and compressor: (N', d)."""
        config, decoder = self.config.encoder_config, self.decoder
        if features.shape[0] != count_tokens(grids):
            raise UserError(f"image_grid_thw does not describe the {features.shape[0]} image tokens given.")
        # a backbone and a tower from different places may differ in dtype
        parts = features.to(decoder.dtype).chunk(1 + extra_depths(config), dim=-1)
        if isinstance(decoder, InsertionVLM):
            tokens = [decoder.connect(part, grids) for part in parts]
        else:
            tokens = [self.projector(part, grids) for part in parts]
        if self.fusion.compressor is not None:
            joined = self.joined_grids(grids)
            tokens = [self.compressor(part, joined)[0] for part in tokens]
        return ImageTokens(tokens[0], self.final_grids(grids), tokens[1:])

    def _projected_tokens(self, keys_values: Tensor, grids: Grids) -> ImageTokens:
        """Image tokens of which only the keys and values (N, K) are at hand."""
        if self.fusion.method == "insertion":
            raise UserError("an insertion model takes no image_keys_values; pass image_features.")
        grids = self.final_grids(grids)
        sizes = self.fusion_layers.key_sizes()
        if keys_values.shape != (count_tokens(grids), sum(2 * heads * width for heads, width in sizes)):
            raise UserError(f"image_grid_thw does not describe image_keys_values of shape {tuple(keys_values.shape)}.")
        parts = keys_values.split([heads * width for heads, width in sizes for _ in range(2)], dim=-1)
        pairs = [
            (key.unflatten(-1, size), value.unflatten(-1, size))
            for key, value, size in zip(parts[::2], parts[1::2], sizes, strict=True)
        ]
        return ImageTokens(keys_values[:, :0], grids, keys_values=pairs)

    def joined_grids(self, grids: Grids) -> Grids:
        """The tower's grids behind the VLM's own connector, if it has one."""
        decoder = self.decoder
        return decoder.connected(grids) if isinstance(decoder, InsertionVLM) else grids

    def final_grids(self, grids: Grids) -> Grids:
        """The tower's grids behind the connector and the compressor: one cell is one image token."""
        grids = self.joined_grids(grids)
        return grids if self.fusion.compressor is None else self.compressor.grids(grids)

    @can_return_tuple
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
        image_keys_values: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        record: AttentionRecorder | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V) for text; the loss too if `labels` (B, L, -100 where none) are given.

        Args:
            input_ids: int64 (B, L), no placeholders for images.
            attention_mask: (B, cached and new tokens).
            position_ids: (B, L); several samples packed in one row restart at 0, and then no cache is kept.
            image_positions: int64 (n, 2), sorted: the row, and the index in this call's row before which the image
                stands.
            image_grid_thw: int64 (n, 3), patches.
            pixel_values: Patches of all images, or image_features (N, d_v), what `encode_images` gave for them, or
                image_keys_values, from there.
            record: Called with every CASA layer's queries and keys (for analysis; not while decoding).
            cache: As `past_key_values`; the name in transformers from 5.24 on.
            kwargs: Of transformers' own (`output_attentions`, `num_items_in_batch`, ...). Attentions are those of the
                blocks' self-attention: None at a block where fusion replaced it.

        Raises:
            UserError: Positions, masks and images do not fit each other, or an argument is unknown.
        """
        _check_names(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give input_ids or inputs_embeds, and not both.")
        embeds = self._embedded(input_ids) if input_ids is not None else cast(Tensor, inputs_embeds)
        given = past_key_values if cache is None else cache
        cache = self._cache_for(given, use_cache)
        text = read_text_inputs(embeds, cache, attention_mask, position_ids)
        if text.packed:
            if given is not None or use_cache:
                raise UserError("packed rows cannot use a cache; pass use_cache=False or one sample per row.")
            cache = None
        images = self._read_images(pixel_values, image_grid_thw, image_features, image_keys_values)
        places = read_image_places(image_positions, len(images.grids) if images is not None else 0)
        asked = {key: True for key in ("output_hidden_states", "output_attentions") if getattr(self.config, key, False)}
        passed: dict[str, object] = asked | {name: value for name, value in kwargs.items() if name not in UNREAD}
        if self.fusion.method == "insertion":
            output = run_insertion(self.decoder, embeds, text, places, images, cache, self.ablation, passed)
        else:
            output = self.fusion_layers.run(embeds, text, places, images, cache, record, passed)
        if cache is not None:
            cache.count(text.mask, places, *embeds.shape[:2])
        hidden = cast(Tensor, output.last_hidden_state)
        logits, loss, count = None, None, kwargs.get("num_items_in_batch")
        if labels is not None:
            labels = within_samples(labels, text.sample_starts)
        if labels is not None and self.loss_chunk is not None:
            before, wanted = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(hidden.device)
            loss = chunked_cross_entropy(before, wanted, self.decoder.logits, self.loss_chunk, count)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            goes_on = cache is not None and cache.num_text > hidden.shape[1]
            logits = short_logits(self.decoder, hidden[:, keep], goes_on)
            if labels is not None:
                count = at_least_one((labels[:, 1:] != IGNORE_INDEX).sum() if count is None else count, logits.device)
                size = self.config.get_text_config().vocab_size
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, num_items_in_batch=count)
        return CausalLMOutputWithPast(
            loss=cast("torch.FloatTensor | None", loss),
            logits=cast("torch.FloatTensor | None", logits),
            **{CACHE: cache},
            hidden_states=output.hidden_states,
            attentions=self._attentions_by_block(output.attentions),
        )

    def _embedded(self, input_ids: Tensor) -> Tensor:
        """(B, L, d): the text's embeddings; gist tokens have ids behind the vocabulary and embeddings here."""
        embedding = self.decoder.embedding
        if not self.fusion.gist:
            return embedding(input_ids)
        is_gist = input_ids >= (vocabulary := self.config.get_text_config().vocab_size)
        embeds = embedding(input_ids.masked_fill(is_gist, 0))
        gist = self.gist((input_ids - vocabulary).clamp(min=0))
        return torch.where(is_gist[..., None], gist.to(embeds.dtype), embeds)

    def _attentions_by_block(self, found: tuple[Tensor, ...] | None) -> tuple[torch.FloatTensor, ...] | None:
        """One entry per block; transformers leaves out those without weights, and what follows would move up."""
        replaced = self.fused_blocks if self.fusion.placement == "replace" else ()
        blocks = range(len(self.decoder.blocks))
        if not found or len(found) != len(blocks) - len(replaced):
            return cast("tuple[torch.FloatTensor, ...] | None", found)
        rest = iter(found)
        return cast("tuple[torch.FloatTensor, ...]", tuple(None if b in replaced else next(rest) for b in blocks))

    @torch.compiler.disable(reason="makes a cache of lists that grow")
    def _cache_for(self, given: Cache | None, use_cache: bool | None) -> CasaCache | None:
        if given is not None:
            return self.own_cache(given)
        if use_cache and self.training and self.checkpoints_blocks:
            raise UserError("gradient checkpointing runs blocks twice and keeps no cache; pass use_cache=False.")
        wanted = use_cache if use_cache is not None else self.config.use_cache and not self.training
        return self.new_cache() if wanted else None
