"""The variants that sessions are tried on, alone and in company, and what makes two sessions the same."""

import pytest
import torch

from casa.models import CasaForConditionalGeneration, CasaProcessor, FusionConfig, adapt
from casa.streaming import StreamingSession
from casa.testing import tiny_backbone, tiny_encoder, tiny_processor, tiny_speaker
from casa.testing.tiny import spread

VARIANTS = {
    "parallel": {},
    "before": {"placement": "before"},
    "replace": {"placement": "replace", "every": 2},
    "cross-attention": {"method": "cross_attention"},
    "history": {"history": 2},
    "sample": {"split": "sample"},
    "insertion": {"method": "insertion"},
}
IN_COMPANY = {
    "parallel": {},
    "replace in sample": {"placement": "replace", "every": 2, "split": "sample"},
    "history": {"history": 1},
    "cross-attention": {"method": "cross_attention"},
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


@pytest.fixture(params=IN_COMPANY, scope="module")
def shared(request) -> CasaForConditionalGeneration:
    """A model for several sessions, of every kind whose caches differ."""
    return tiny_speaker(**IN_COMPANY[request.param])


@pytest.fixture(scope="module")
def sliding() -> CasaForConditionalGeneration:
    """A model whose blocks keep the newest 16 tokens of text."""
    backbone = tiny_backbone("mistral")
    backbone.config.sliding_window = 16
    model = adapt(backbone, FusionConfig(), vision=tiny_encoder())
    spread(model.projector)
    model.generation_config.eos_token_id = 2
    return model.eval()


@pytest.fixture(scope="session")
def same_state():
    """Holds two sessions to the same state: sizes exactly, keys but for the order of sums."""

    def check(one: StreamingSession, other: StreamingSession) -> None:
        assert (one.usage, one.frames) == (other.usage, other.frames)
        for mine, theirs in zip(one._cache.text.layers, other._cache.text.layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-9, atol=1e-9)

    return check


@pytest.fixture
def turns(monkeypatch):
    """A processor with which each frame is a turn."""
    processor = tiny_processor()
    monkeypatch.setattr(processor, "stream_turns", True)
    return processor


@pytest.fixture(scope="module", params=[True, False], ids=["delimited", "bare"])
def processor(request) -> CasaProcessor:
    return tiny_processor(request.param)
