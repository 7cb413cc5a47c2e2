"""A hand-held camera over a sheet of paper: slow pan and zoom, a little roll, small fast shakes.

Everything is a smooth function of time.

Legend: t seconds; sheet and frame coordinates in px, x right and y down. Zoom 1 shows the sheet as it is.
"""

import math
from dataclasses import dataclass

import numpy as np

LEAST_ZOOM = math.exp(-0.1)

_PAN = 0.06  # of the frame's side, to each side
_ROLL = math.radians(1.5)
_SHAKE = 1.2  # px
_MARGIN = 1.36  # sheet over frame: covers pan, least zoom, roll and shake


@dataclass(frozen=True)
class _Waves:
    """A sum of sine waves: smooth, never leaves +-1, and defined for every t."""

    hertz: tuple[float, ...]
    phase: tuple[float, ...]

    @staticmethod
    def draw(rng: np.random.Generator, slowest: float, fastest: float) -> "_Waves":
        hertz, phase = rng.uniform(slowest, fastest, 2), rng.uniform(0, 2 * math.pi, 2)
        return _Waves(tuple(hertz.tolist()), tuple(phase.tolist()))

    def __call__(self, t: float) -> float:
        waves = (math.sin(2 * math.pi * f * t + p) for f, p in zip(self.hertz, self.phase, strict=True))
        return sum(waves) / len(self.hertz)


@dataclass(frozen=True)
class Camera:
    """The view of a frame of `height` x `width` px on a larger sheet, as a function of time."""

    height: int
    width: int
    pan: tuple[_Waves, _Waves]
    shake: tuple[_Waves, _Waves]
    zoom: _Waves
    roll: _Waves

    @staticmethod
    def draw(height: int, width: int, rng: np.random.Generator) -> "Camera":
        return Camera(
            height,
            width,
            pan=(_Waves.draw(rng, 0.03, 0.16), _Waves.draw(rng, 0.03, 0.16)),
            shake=(_Waves.draw(rng, 1.5, 7.0), _Waves.draw(rng, 1.5, 7.0)),
            zoom=_Waves.draw(rng, 0.03, 0.12),
            roll=_Waves.draw(rng, 0.05, 0.3),
        )

    @property
    def sheet_size(self) -> tuple[int, int]:
        """Height and width of a sheet that no view ever leaves, px."""
        return math.ceil(self.height * _MARGIN) + 4, math.ceil(self.width * _MARGIN) + 4

    def scale(self, t: float) -> float:
        """Frame px per sheet px."""
        return math.exp(0.1 * self.zoom(t))

    def affine(self, t: float) -> tuple[float, float, float, float, float, float]:
        """Frame to sheet: x' = a x + b y + c, y' = d x + e y + f. Pillow's order and direction."""
        angle, scale = _ROLL * self.roll(t), self.scale(t)
        a, b = math.cos(angle) / scale, math.sin(angle) / scale
        sheet_h, sheet_w = self.sheet_size
        x = sheet_w / 2 + _PAN * self.width * self.pan[0](t) + _SHAKE * self.shake[0](t)
        y = sheet_h / 2 + _PAN * self.height * self.pan[1](t) + _SHAKE * self.shake[1](t)
        return (
            *(a, b, x - a * self.width / 2 - b * self.height / 2),
            *(-b, a, y + b * self.width / 2 - a * self.height / 2),
        )

    def to_sheet(self, x: float, y: float, t: float) -> tuple[float, float]:
        """Where on the sheet the frame's point (x, y) lies at time t."""
        a, b, c, d, e, f = self.affine(t)
        return a * x + b * y + c, d * x + e * y + f

    def to_frame(self, x: float, y: float, t: float) -> tuple[float, float]:
        """Where in the frame the sheet's point (x, y) appears at time t."""
        a, b, c, d, e, f = self.affine(t)
        x, y, size = x - c, y - f, a * e - b * d
        return (e * x - b * y) / size, (a * y - d * x) / size
