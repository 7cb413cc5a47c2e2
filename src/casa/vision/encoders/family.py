"""What casa must know about an image encoder of transformers: the protocol that every family fills in.

Shapes: n images, N image tokens of all images, k extra feature sets per token, d_v width of one set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Family:
    """One image encoder of transformers.

    model: its class, a PreTrainedModel; or its name, where it is in `module`, below `transformers.models`, which is
        imported when asked for.
    pictures: how its pixels come. "patches": (P, channels of a patch), in squares of merged patches, as the
        Qwen towers have it; "flexible": (P, p * p * channels), plain reading order; "squares": (n, 3, H, W);
        "own": as the encoder's own image processor makes them, with one row of pixel_values per patch.
    run: encoder, pixels, int64 (n, 3) patch grids to (N, (1 + k) * d_v), images in order, each in reading order.
    width: d_v. merge: patches per side of one token. depths: k.
    resample: the filter its pictures were resized with, by its PIL name. clip_colours: whether colours were
        normalised by CLIP's means and deviations; else they run from -1 to 1.
    image_processor: for "own", config and a bound for a picture's area (None: the encoder's own) to a transformers
        image processor. It makes `pixel_values` and `image_grid_thw`, int64 (n, 3), (1, rows, columns) in patches, and
        says more, so that a picture's cost is known before it is opened: `max_pixels`; `patch_grid(height, width,
        **bound)`, its rows and columns; `at_most(patches)`, the `bound` under which no picture has more patches.
    flops: encoder, rows and columns of patches to its operations for one picture; left out, those of a transformer.
    """

    model: Any
    pictures: str
    run: Callable[[Any, Tensor, Tensor], Tensor]
    module: str = ""
    width: Callable[[Any], int] = lambda config: config.hidden_size
    merge: Callable[[Any], int] = lambda config: 1
    depths: Callable[[Any], int] = lambda config: 0
    resample: str = "bicubic"
    clip_colours: bool = False
    image_processor: Callable[[Any, int | None], Any] | None = None
    flops: Callable[[Any, int, int], int] | None = None

    @property
    def model_class(self) -> Any:
        """The class, a PreTrainedModel."""
        if not isinstance(self.model, str):
            return self.model
        return getattr(import_module(f"transformers.models.{self.module}"), self.model)
