"""Where drawn examples come from: callables that the caller passes in, so that this package knows no task.

A picture source draws one example: source(rng, size) with size = (height, width) in px, or None for any, gives an
object with `image` (PIL, of that size), `turns` (objects with `question` and `answer`) and `dense` (channel ->
int64 (rows, columns), one class per cell of 28 x 28 px). A clip source gives an object with `height`, `width`,
`frames()` (pictures) and `captions()` (one text per frame, "" being silence).

With worker processes, sources must be picklable: functions, or dataclasses, at module level.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

PictureSource = Callable[[np.random.Generator, tuple[int, int] | None], Any]
ClipSource = Callable[[np.random.Generator], Any]
