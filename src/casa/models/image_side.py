"""The image side of a model: pixels to image tokens, and these to the keys and values of all fusion layers.

Nothing here depends on text, so any of it may be done ahead, kept, and used again (DESIGN: the image side runs ahead).

Shapes: N image tokens of all images, d_v width of the encoder's output, d of the text model, Hkv key heads, D channels
of a head, K keys and values of all fusion layers side by side.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from casa.errors import UserError
from casa.layers import IMAGE_PROJECTIONS, project_images
from casa.models.backbones import InsertionVLM
from casa.models.image_tokens import ImageTokens, by_depth, count_tokens
from casa.models.placement import check_one_device, fetched
from casa.vision import Grids, encode, extra_depths, spec_of, token_grids


class CasaImageSide:
    """Mixed into CasaForConditionalGeneration, whose attributes these are."""

    config: Any
    fusion: Any
    decoder: Any
    encoder: Any
    projector: Any
    compressor: Any
    fused_blocks: Any
    casa_layers: Any
    get_input_embeddings: Any

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """(N, d_v): the encoder's tokens. They can be kept and passed as `image_features` with any text."""
        encoder: Any = self.encoder
        return encode(encoder, pixel_values.to(encoder.dtype), image_grid_thw)

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any) -> Any:
        """As VLMs of transformers have it: what a picture becomes for the text model.

        Returns last_hidden_state, (N, d_v), what `encode_images` gives, and pooler_output, for each image (n, d).
        """
        features = self.encode_images(pixel_values, image_grid_thw)
        images = self._image_tokens(None, image_grid_thw, features)
        assert images is not None
        return BaseModelOutputWithPooling(
            last_hidden_state=features,  # type: ignore[arg-type]
            pooler_output=images.tokens.split(images.lengths),  # type: ignore[arg-type]
        )

    def image_keys_values(self, image_features: Tensor, image_grid_thw: Tensor) -> Tensor:
        """(N, K): keys and values of image tokens in all fusion layers, side by side, before rotary positions.

        They depend on nothing but the image and can be kept, or made while text is still being generated, and passed
        as `image_keys_values` in place of pixels. N counts tokens after compression; K is twice the layers' key heads
        times their channels. UserError under insertion, which has none.
        """
        if self.fusion.method == "insertion":
            raise UserError("an insertion model has no fusion layers; pass image_features.")
        images = self._image_tokens(None, image_grid_thw, image_features)
        assert images is not None
        return torch.cat([part.flatten(1) for pair in self._project(images) for part in pair], dim=-1)

    @torch.compiler.disable(reason="depends on the values of grids; encoders compile by themselves")
    def _image_tokens(
        self, pixel_values: Tensor | None, grid: Tensor | None, features: Tensor | None, projected: Tensor | None = None
    ) -> ImageTokens | None:
        """This call's image tokens in the text model's width, or None if it has no images."""
        if pixel_values is None and features is None and projected is None:
            return None
        if grid is None:
            raise UserError("pixel_values come with image_grid_thw; the processor makes both.")
        config = self.config.encoder_config
        grids = token_grids(config, grid)
        if projected is not None:
            return self._projected_already(projected, grids)
        if features is None:
            assert pixel_values is not None
            features = self.encode_images(pixel_values, grid)
        if features.shape[0] != count_tokens(grids):
            raise UserError(f"image_grid_thw does not describe the {features.shape[0]} image tokens given.")
        # a backbone and a tower from different places may differ in dtype
        features = features.to(self.get_input_embeddings().weight.dtype)
        decoder = self.decoder
        join = decoder.connect if isinstance(decoder, InsertionVLM) else self.projector
        found = [join(part, grids) for part in features.chunk(1 + extra_depths(config), dim=-1)]
        if self.fusion.compressor is not None:
            joined = self.joined_grids(grids)
            found = [self.compressor(tokens, joined)[0] for tokens in found]
        return ImageTokens(found[0], found[1:], self.final_grids(grids))

    def _projected_already(self, projected: Tensor, grids: Grids) -> ImageTokens:
        """Image tokens of which only the keys and values (N, K) are at hand."""
        if self.fusion.method == "insertion":
            raise UserError("an insertion model takes no image_keys_values; pass image_features.")
        grids = self.final_grids(grids)
        layers: list[Any] = self._sources()
        widths = [layer.get_submodule(name).out_features for layer in layers for name in IMAGE_PROJECTIONS]
        if projected.shape != (count_tokens(grids), sum(widths)):
            raise UserError(f"image_grid_thw does not describe image_keys_values of shape {tuple(projected.shape)}.")
        parts = [
            part.unflatten(-1, (-1, layers[n // 2].head_dim)) for n, part in enumerate(projected.split(widths, -1))
        ]
        return ImageTokens(projected[:, :0], [], grids, list(zip(parts[::2], parts[1::2], strict=True)))

    def picked(self, images: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
        """Of a call's image inputs, those of the images numbered `order`; nothing if there are none."""
        if not order:
            return {}
        grid = images["image_grid_thw"]
        grids = token_grids(self.config.encoder_config, grid)
        squares = spec_of(self.config.encoder_config).pictures == "squares"
        rows_of = {
            "pixel_values": [1] * len(grids) if squares else grid.prod(-1).tolist(),
            "image_features": [rows * columns for rows, columns in grids],
            "image_keys_values": [rows * columns for rows, columns in self.final_grids(grids)],
        }
        found = {name: images[name][list(order)] for name in ("image_grid_thw", "image_positions")}
        for name, lengths in rows_of.items():
            if (given := images.get(name)) is not None:
                if len(given) != sum(lengths):
                    raise UserError(f"image_grid_thw does not describe {name} of shape {tuple(given.shape)}.")
                each = given.split(lengths)
                found[name] = torch.cat([each[number] for number in order])
        return found

    def joined_grids(self, grids: Grids) -> Grids:
        """The tower's grids behind the VLM's own connector, if it has one."""
        return self.decoder.connected(grids) if isinstance(self.decoder, InsertionVLM) else grids

    def final_grids(self, grids: Grids) -> Grids:
        """The tower's grids behind the connector and the compressor: one cell is one image token."""
        joined = self.joined_grids(grids)
        return joined if self.fusion.compressor is None else self.compressor.grids(joined)  # type: ignore[operator]

    def _layer(self, index: int) -> nn.Module | None:
        name = str(index)
        return self.casa_layers[name] if name in self.casa_layers else None  # noqa: SIM401 (a ModuleDict has no get)

    def _sources(self) -> list[nn.Module]:
        """Per fusion layer, the module whose projections make its keys and values."""
        return [self._layer(index) or self.decoder.attention(index) for index in self.fused_blocks]

    def _project(self, images: ImageTokens) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (N, Hkv, D) of the image tokens in every fusion layer."""
        if images.projected is not None:
            return images.projected
        decoder, layers = self.decoder, self._sources()
        check_one_device(layers)
        with fetched(decoder.blocks[index].get_submodule("input_layernorm") for index in self.fused_blocks):
            return project_images(
                by_depth(images, decoder, self.fused_blocks, self.fusion.update_images),
                layers,
                [decoder.image_norm(index) for index in self.fused_blocks],
            )
