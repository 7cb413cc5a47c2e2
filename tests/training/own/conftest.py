"""Each recipe that is shipped for data of one's own."""

from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture(
    params=sorted(path for path in RECIPES.rglob("*.yaml") if path.stem != "casa-tiny"), ids=lambda p: p.stem
)
def shipped(request):
    """Each recipe for data of one's own, as its file."""
    return request.param
