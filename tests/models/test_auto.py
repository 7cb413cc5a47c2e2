"""The device at hand: what this machine does not have is refused in one sentence."""

import pytest
import torch

from casa.errors import UserError
from casa.models.auto import pick_device


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_the_gpu_if_there_is_one(monkeypatch):
    gpus(monkeypatch, 0)
    assert [pick_device(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    gpus(monkeypatch, 2)
    given = ("auto", "cpu", "cuda", "cuda:0", "cuda:1")
    assert [pick_device(name) for name in given] == ["cuda", "cpu", "cuda", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("device", "count", "words"),
    [
        ("cuda", 0, "no CUDA device"),
        ("cuda:7", 0, "no CUDA device"),
        ("cuda:7", 1, "no cuda:7, only cuda:0"),
        ("cuda:2", 2, "no cuda:2, only cuda:0, cuda:1"),
        ("cpux", 1, "'cpux' is not known"),
        ("cudax", 1, "'cudax' is not known"),
        ("cuda:x", 1, "'cuda:x' is not known"),
        ("mps", 1, "no MPS device"),
        ("meta", 1, "'meta' is not known"),
        ("", 1, "'' is not known"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, device, count, words):
    gpus(monkeypatch, count)
    with pytest.raises(UserError, match=words):
        pick_device(device)
