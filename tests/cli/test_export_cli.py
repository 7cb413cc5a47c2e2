"""`casa export` and `casa bench train`: what they write, and what they refuse with status 2."""

import json

import pytest

from casa.models import CasaForConditionalGeneration, CasaProcessor


def test_every_method_is_named_in_the_help(casa):
    from casa.benchmarks.train import METHODS

    told = casa("bench", "train", "--help").out
    assert all(method in told for method in METHODS)


def test_a_checkpoint_becomes_a_model(casa, checkpoint, tmp_path):
    taken = tmp_path / "checkpoint-7"
    CasaForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(taken)
    CasaProcessor.from_pretrained(checkpoint).save_pretrained(taken)
    (taken / "trainer_state.json").write_text("{}")
    result = casa("export", taken, tmp_path / "out", "--dtype", "bfloat16")
    assert (result.status, result.out) == (0, f"{tmp_path / 'out'}: the weights of checkpoint-7\n")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_target_that_is_there_is_refused_before_anything_is_read(casa, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    taken = tmp_path / "checkpoint-7"
    taken.mkdir()
    (taken / "trainer_state.json").write_text("{}")  # nothing else: reading it would fail
    result = casa("export", taken, tmp_path / "out")
    assert (result.status, result.err) == (2, f"casa: {tmp_path / 'out'} exists already; name a new folder.\n")
    assert casa("export", "nowhere", tmp_path / "out").err == result.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("export", "nowhere", "out"), "there is no checkpoint"),
        (("export", "nowhere", "out", "--dtype", "int4"), "give one of"),
        (("bench", "train", "--parts", "memry"), "choose among"),
        (("bench", "train", "--parts", "memory", "--image-tokens", "many"), "whole numbers"),
        (("bench", "train", "--parts", "memory", "--methods", "casa,insert"), "methods has 'insert'; choose among"),
        (("bench", "train", "--parts", "memory", "--image-tokens", "64,66"), "multiples of 4"),
        (("bench", "train", "--parts", "memory", "--device", "cpu", "--image-tokens", "64"), "two or more"),
    ],
)
def test_what_cannot_be_is_refused(casa, arguments, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = casa(*arguments)
    assert result.status == 2
    assert sentence in result.err
    assert result.err.count("\n") == 1


@pytest.mark.slow
def test_packing_alone(casa, tmp_path):
    result = casa("bench", "train", "--parts", "packing", "--json", "--out", tmp_path / "train.json")
    found = json.loads(result.out)
    assert found == json.loads((tmp_path / "train.json").read_text())
    assert found["bench"] == "train"
    assert found["versions"]["torch"]
    assert {"in proportion", "image", "video", "live"} == set(found["packing"])
