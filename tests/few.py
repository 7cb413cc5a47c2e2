"""Of many parameters, the few that `make test-fast` tries: one of each kind. `make test` tries all."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def few_first(values: Iterable[Any], few: Container[Any]) -> list[Any]:
    """The values as parameters, all but the few marked as slow."""
    return [value if value in few else pytest.param(value, marks=pytest.mark.slow) for value in values]
