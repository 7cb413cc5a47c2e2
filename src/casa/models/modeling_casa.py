"""CasaForConditionalGeneration: a text model with eyes, as a transformers model.

Shapes: B rows, L new text tokens, N image tokens, d width of the text model, V vocabulary.

The backbone keeps its weights, under `backbone.`; beside it stand the fusion layers (`casa_layers.<block>.`) and,
if the backbone has no eyes of its own, the image encoder (`vision.`) and the projector (`projector.`).
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import TransformersKwargs, can_return_tuple

from casa.errors import UserError
from casa.layers import AttentionRecorder, CasaAttention
from casa.models.backbone_source import save_added, with_backbone
from casa.models.backbones import Decoder, InsertionVLM, decoder_of, family_of
from casa.models.cache import CasaCache
from casa.models.configuration_casa import CasaConfig
from casa.models.fusion import fuse
from casa.models.generation import CasaGeneration
from casa.models.image_side import CasaImageSide
from casa.models.inputs import TextInputs, read_image_places, read_text_inputs
from casa.models.loading import WHERE, leave_odd_shapes, load_checked
from casa.models.losses import CasaLosses
from casa.models.passes import CasaPasses
from casa.models.upkeep import CasaUpkeep
from casa.settings import near
from casa.vision import Projector, make_compressor, new_encoder, output_width


def new_backbone(config: Any) -> PreTrainedModel:
    """A text-only model or an insertion VLM with fresh weights, from its config."""
    is_vlm = issubclass(family_of(config), InsertionVLM)
    return (AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM).from_config(config)


# what transformers and its neighbours pass to any model: used here, by the blocks, or by nobody
PASSED = frozenset(TransformersKwargs.__annotations__) | {"token_type_ids", "return_dict"}
UNREAD = ("num_items_in_batch", "token_type_ids")


def _check_names(given: dict[str, Any]) -> None:
    """UserError for an argument of `forward` that nobody knows."""
    for name in given:
        if name not in PASSED:
            known = [*inspect.signature(CasaForConditionalGeneration.forward).parameters, *PASSED]
            hint = near(name, [one for one in known if one not in ("self", "kwargs")], "it takes")
            raise UserError(f"the model takes no argument {name!r}; {hint}")


class CasaForConditionalGeneration(  # type: ignore[misc]
    CasaGeneration, CasaUpkeep, CasaImageSide, CasaPasses, CasaLosses, PreTrainedModel, GenerationMixin
):
    """Text with images in, logits for the text out (paper, section 2; `FusionConfig` has the variants)."""

    config_class = CasaConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    # the backbone and the encoder add their own
    _no_split_modules = ["CasaAttention", "Projector", "QFormer", "PixelShuffle"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(
        self,
        config: CasaConfig,
        backbone: PreTrainedModel | None = None,
        vision: PreTrainedModel | None = None,
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
            self.projector = Projector(output_width(config.vision_config), width)
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

        backbone: of a folder that leaves out its backbone's weights, where they are, if not where the folder says.
        Raises UserError if the folder or its backbone is missing, or the weights are not exactly this model's.
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
            found = with_backbone(path, config, backbone, kwargs)
            name = found.pop("backbone_name")
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
        backbone: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers; or only what fusion and training added or changed.

        Args:
            save_directory: The folder.
            added_only: Leaves out the weights of the backbone that are those of its own files. The folder says where
                these are, and `from_pretrained` reads them from there.
            backbone: Where they are: a path, a hub id, or an installed package. Left out, where `adapt` read them.
            args: As in transformers.
            kwargs: As in transformers.

        Raises:
            UserError: The backbone is not named, or is another.
        """
        if added_only:
            save_added(self, save_directory, backbone, **kwargs)
        elif backbone is not None:
            raise UserError("backbone is for added_only=True; leave it out.", field=("backbone", "added_only"))
        else:
            super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def decoder(self) -> Decoder:
        """The view of the backbone's text model."""
        return decoder_of(self.backbone)

    @property
    def encoder(self) -> nn.Module:
        """The image encoder: this model's own, or the backbone's."""
        decoder = self.decoder
        return decoder.tower if isinstance(decoder, InsertionVLM) else self.vision

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

    def set_encoder(self, encoder: nn.Module, modality: str | None = None) -> None:
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

    def get_output_embeddings(self) -> Any:
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
            self.compressor.reset_parameters()  # type: ignore[operator]
        for index, layer in self.casa_layers.items():
            layer.copy_from(self.decoder.attention(int(index)), silent=self.fusion.output == "zero")  # type: ignore[operator]

    def new_cache(self) -> CasaCache:
        """An empty cache for this model."""
        replaced = self.fused_blocks if self.fusion.placement == "replace" else ()
        return CasaCache(self.config.get_text_config(decoder=True), replaced)

    def own_cache(self, given: Any) -> CasaCache:
        """The cache given, or an empty one of transformers' own kind made this model's, in place.

        Raises UserError for any other: of another kind, or filled by another model.
        """
        if isinstance(given, CasaCache):
            return given
        plain = type(given) is DynamicCache and not given.offloading
        if not plain or given.get_seq_length() > 0:
            raise UserError(
                "past_key_values must come from an earlier call of this model or from model.new_cache(), or be an "
                "empty DynamicCache; or leave it out."
            )
        return self.new_cache().take_over(given)

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V) for text; the loss too if `labels` (B, L, -100 where none) are given.

        input_ids: int64 (B, L), no placeholders for images. attention_mask: (B, cached and new tokens).
        position_ids: (B, L); several samples packed in one row restart at 0, and then no cache is kept.
        image_positions: int64 (n, 2), sorted: the row, and the index in this call's row before which the
            image stands. image_grid_thw: int64 (n, 3), patches. pixel_values: patches of all images, or
            image_features (N, d_v), what `encode_images` gave for them, or image_keys_values, from there.
        record: called with every CASA layer's queries and keys (for analysis; not while decoding).
        kwargs: of transformers' own (`output_attentions`, `num_items_in_batch`, ...). Attentions are those of the
            blocks' self-attention: None at a block where fusion replaced it.
        The loss is the mean over the labels, and 0 where all are -100.
        Raises UserError for positions, masks and images that do not fit each other, and for unknown arguments.
        """
        _check_names(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give input_ids or inputs_embeds, and not both.")
        like = input_ids if input_ids is not None else inputs_embeds
        assert like is not None
        cache = self._cache_for(past_key_values, use_cache)
        text = self._text_inputs(like, cache, attention_mask, position_ids)
        if text.packed:
            if past_key_values is not None or use_cache:
                raise UserError("packed rows cannot use a cache; pass use_cache=False or one sample per row.")
            cache = None
        images = self._image_tokens(pixel_values, image_grid_thw, image_features, image_keys_values)
        places = read_image_places(image_positions, len(images.grids) if images is not None else 0)
        source = self._source(input_ids, inputs_embeds)
        wanted = {k: True for k in ("output_hidden_states", "output_attentions") if getattr(self.config, k, False)}
        passed = wanted | {k: v for k, v in kwargs.items() if k not in UNREAD}
        if self.fusion.method == "insertion":
            output, hidden = self._run_insertion(source, text, places, images, cache, passed)
        else:
            output, hidden = self._run_fused(source, text, places, images, cache, record, passed)
        if cache is not None:
            cache.count(text.mask, places, like.shape[0], like.shape[1])
        logits = loss = None
        if labels is not None and self.loss_chunk is not None:
            loss = self._chunked_loss(hidden, labels, text, kwargs.get("num_items_in_batch"))
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.decoder.logits(hidden[:, keep])
            if labels is not None:
                loss = self._loss(logits, labels, text, kwargs)
        return CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=cache,
            hidden_states=output.hidden_states,  # type: ignore[arg-type]
            attentions=self._attentions_by_block(output.attentions),
        )

    def _attentions_by_block(self, found: tuple[Tensor, ...] | None) -> Any:
        """One entry per block; transformers leaves out those without weights, and what follows would move up."""
        replaced = self.fused_blocks if self.fusion.placement == "replace" else ()
        blocks = range(len(self.decoder.blocks))
        if not found or len(found) != len(blocks) - len(replaced):
            return found
        rest = iter(found)
        return tuple(None if block in replaced else next(rest) for block in blocks)

    @torch.compiler.disable(reason="makes a cache of lists that grow")
    def _cache_for(self, given: Any, use_cache: bool | None) -> CasaCache | None:
        if given is not None:
            return self.own_cache(given)
        if use_cache and self.training and self.checkpoints_blocks:
            raise UserError("gradient checkpointing runs blocks twice and keeps no cache; pass use_cache=False.")
        wanted = use_cache if use_cache is not None else self.config.use_cache and not self.training
        return self.new_cache() if wanted else None

    @torch.compiler.disable(reason="looks at the values of masks")
    def _text_inputs(
        self, like: Tensor, cache: CasaCache | None, mask: Tensor | None, position_ids: Tensor | None
    ) -> TextInputs:
        rows, length = like.shape[:2]
        if cache is None:
            return read_text_inputs(rows, length, 0, mask, position_ids, like.device)
        if cache.num_text and cache.num_rows != rows:
            raise UserError(f"the cache holds {cache.num_rows} rows and this call has {rows}; give one row for each.")
        mask = cache.covering(mask, length)
        text = read_text_inputs(rows, length, cache.num_text, mask, position_ids, like.device)
        if text.mask is not None:
            cache.check_mask(text.mask)
        return text
