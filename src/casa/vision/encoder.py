"""Image encoders behind one function: pixels in, the image tokens the text model may look at out.

Shapes: P patches, N image tokens (after the encoder's own merge), d_v width of the encoder's output.
"""

from typing import Any

from torch import Tensor, nn

from casa.errors import UserError


def output_width(config: Any) -> int:
    """d_v of an encoder, from its config."""
    return getattr(config, "out_hidden_size", None) or config.hidden_size


def token_grids(config: Any, image_grid_thw: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of tokens of each image. `image_grid_thw` is int64 (n, 3), in patches.

    Raises UserError for several frames in one entry: video is read frame by frame (paper, "Set-up").
    """
    merge = getattr(config, "spatial_merge_size", 1)
    grids = []
    for frames, height, width in image_grid_thw.tolist():
        if frames != 1:
            raise UserError(f"an image has {frames} frames; give a video frame by frame, one image each.")
        grids.append((height // merge, width // merge))
    return grids


def encode(encoder: nn.Module, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
    """(N, d_v): tokens of all images, each image's in reading order. `pixel_values` is (P, channels of a patch)."""
    return encoder(pixel_values, grid_thw=image_grid_thw).pooler_output
