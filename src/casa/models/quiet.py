"""transformers' own progress bars and reports, left out while something is loaded for a person who did not ask."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quietly(reports: bool = True) -> Iterator[None]:
    """No progress bars inside, and afterwards as before. reports: warnings stay; without them, errors alone."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not reports:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
