"""The variants that sessions are tried on, and processors with and without a delimiter behind each frame."""

import pytest

from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.testing import tiny_processor, tiny_speaker

VARIANTS = {
    "parallel": {},
    "before": {"placement": "before"},
    "replace": {"placement": "replace", "every": 2},
    "cross-attention": {"method": "cross_attention"},
    "history": {"history": 2},
    "sample": {"split": "sample"},
    "insertion": {"method": "insertion"},
}
FORGETTING = ("parallel", "replace", "cross-attention", "history")


@pytest.fixture(params=VARIANTS, scope="module")
def model(request) -> CasaForConditionalGeneration:
    """Every variant in turn."""
    return tiny_speaker(**VARIANTS[request.param])


@pytest.fixture(params=FORGETTING, scope="module")
def forgetting(request) -> CasaForConditionalGeneration:
    """One of each kind that can have a bound on its text and sees the newest windows only."""
    return tiny_speaker(**VARIANTS[request.param])


@pytest.fixture(scope="module", params=[True, False], ids=["delimited", "bare"])
def processor(request) -> CasaProcessor:
    return tiny_processor(request.param)
