"""The checkpoint in the package: small, found by its name, and able to see."""

import pytest
import torch

import casa
from casa.models import CasaConfig, CasaForConditionalGeneration, CasaProcessor
from casa.models.loading import ASSETS

SEED = 77


@pytest.fixture(scope="module")
def tiny():
    return CasaForConditionalGeneration.from_pretrained("casa-tiny").eval(), CasaProcessor.from_pretrained("casa-tiny")


def test_it_is_small_and_holds_no_code():
    files = [path for path in (ASSETS / "casa-tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 1000 * 1000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}


def test_every_from_pretrained_knows_its_name(tiny):
    config = CasaConfig.from_pretrained("casa-tiny")
    assert (config.fusion["method"], config.fusion["placement"]) == ("casa", "parallel")
    assert tiny[0].config.fusion == config.fusion
    assert tiny[0].dtype == torch.float32


@pytest.mark.slow
def test_it_sees(tiny):
    """A small sample of the offline tasks; docs/results has the large one. The bars leave room for chance."""
    eyes = casa.CasaPipeline(*tiny)
    scores = {}
    for tasks, limit in ((("pages", "scenes"), 12), (("stream",), 24)):
        scores |= casa.evaluate(eyes, tasks, seed=SEED, limit=limit)
    assert scores["pages"]["digits"] >= 0.8
    assert scores["pages"]["lines"] >= 0.65
    assert scores["scenes"]["accuracy"] >= 0.8
    assert scores["stream"]["wer"] <= 0.3
