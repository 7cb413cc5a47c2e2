"""Is the loss still one that should be learned from? Says so before the weights are changed."""

import math
from collections import deque
from statistics import median

from casa.training.trainer.settings import WatchSettings


class LossWatch:
    """Remembers recent losses, and compares the next one with them."""

    def __init__(self, settings: WatchSettings) -> None:
        self._settings = settings
        self.recent: deque[float] = deque(maxlen=settings.window)

    def fault(self, loss: float) -> str | None:
        """What is wrong with this step's loss, or None; only a loss with nothing wrong is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        settings = self._settings
        if settings.spike is not None and len(self.recent) >= settings.window // 2:
            usual = median(self.recent)
            if loss > settings.spike * usual and loss > usual + settings.least:
                return f"the loss jumped to {loss:.4g}, from about {usual:.4g}"
        self.recent.append(loss)
        return None
