"""A tiny random model that always has something to say, a small film, and a run over it."""

import pytest
import torch

from casa.captioning import CaptionRequest, caption
from casa.testing import tiny_casa, tiny_processor


@pytest.fixture(scope="session")
def load():
    """As `caption` wants it: any name gives the tiny model."""
    model = tiny_casa(dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    # captions of different lengths, also empty ones: the stop token comes up now and then
    torch.manual_seed(0)
    model.backbone.lm_head.weight.data[2] = model.backbone.lm_head.weight.data[3:].mean(0) * 3
    loaded = model, tiny_processor()
    return lambda name: loaded


@pytest.fixture(scope="session")
def film(noise_film):
    return noise_film(6)


@pytest.fixture
def run(load):
    """Runs a request; its report, and what was told: [(second, text)]."""

    def call(source, *out, **settings):
        told = []
        request = CaptionRequest(str(source), tuple(out), max_new_tokens=4, **settings)
        return caption(request, "tiny", load, lambda at, text: told.append((at, text))), told

    return call
