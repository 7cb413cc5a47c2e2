"""How long to wait before asking again: longer each time, never the same for all, and for ever only if told so."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from casa.errors import UserError


@dataclass(frozen=True)
class Backoff:
    """Seconds between attempts: `first`, then doubled each time up to `most`, less a random part of it.

    attempts: connections tried in a row without a single frame before the source is given up. seconds: for how long
    they are tried, from when it broke off. math.inf is without end, for both. jitter: the largest part of a delay that
    chance may take away, so that a thousand viewers do not come back in the same instant. rng: uniform in 0..1.
    Raises UserError for settings that make no sense.
    """

    first: float = 0.5
    most: float = 30.0
    attempts: float = 10
    jitter: float = 0.5
    rng: Callable[[], float] = random.random
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.most:
            raise UserError(f"Waiting {self.first} to {self.most} s: give a first delay above 0, at most the longest.")
        if not self.attempts >= 0:
            raise UserError(f"attempts is {self.attempts}: give 0 or more.")
        if not self.seconds >= 0:
            raise UserError(f"Connecting again for {self.seconds} s: give 0 seconds or more.")
        if not 0 <= self.jitter <= 1:
            raise UserError(f"jitter is {self.jitter}: give a part from 0 to 1.")

    def delay(self, attempt: int) -> float:
        """Seconds to wait before the `attempt`-th connection in a row, counted from 1."""
        # the exponent is bounded before it is taken: 2.0 ** 5000 is an error
        full = min(self.most, self.first * 2.0 ** min(attempt - 1, 60))
        return full * (1 - self.jitter * self.rng())
