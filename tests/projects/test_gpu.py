"""The one command for a GPU: every part can be begun, and one that fails or hangs does not stop the others."""

import json

import pytest
from typer.testing import CliRunner

from casa.cli.main import app
from projects.gpu import __main__ as gpu
from projects.gpu.__main__ import PARTS, Part

SLEEPS = "-c __import__('subprocess').run(['sleep','60'])"


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "REHEARSED", 1)
    parts = [
        Part("broken", 60, "-c print('so');raise(SystemExit(3))", "", writes=False),
        Part("endless", 1, SLEEPS, "", writes=False),
        Part("fine", 60, "-c print('well')", "", writes=False),
    ]
    found = gpu.run(parts, tmp_path, 100, tiny=tmp_path)
    assert [each["status"] for each in found.values()] == ["failed", "too slow", "done"]
    assert found["broken"]["said"] == "so\n"
    written = json.loads((tmp_path / "gpu-run.json").read_text())
    assert written["parts"] == found
    assert "versions" in written


def test_a_record_of_no_checkout_gets_its_commit(tmp_path):
    for name, known in (("mine", None), ("theirs", "abc")):
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps({"commit": known, "seed": 0}))
        gpu.run([Part(name, 60, "-c 0", "", writes=False)], tmp_path, 60, tmp_path, commit="0123456789ab")
    found = [json.loads((tmp_path / f"gpu-{name}.json").read_text())["commit"] for name in ("mine", "theirs")]
    assert found == ["0123456789ab", "abc"]


def test_all_parts_together_have_a_limit(tmp_path):
    parts = [Part(name, 60, SLEEPS, "", writes=False) for name in ("first", "second")]
    found = gpu.run(parts, tmp_path, 0.5, tiny=tmp_path)
    assert [each["status"] for each in found.values()] == ["too slow", "no time left"]


@pytest.mark.parametrize("part", [part for part in PARTS if part.writes], ids=lambda part: part.name)
def test_every_part_is_a_command_that_is_there(part):
    """Its options are read, up to a device that is not there."""
    _, casa, *words = part.command.split()
    found = CliRunner().invoke(app, [*words, "--device", "tpu"])
    assert casa == "casa"
    assert "'tpu' is not known" in str(found.exception)


@pytest.mark.parametrize(("given", "words"), [(["nothing"], "no part 'nothing'"), ([], "sees no CUDA device")])
def test_what_cannot_be_is_told(given, words, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(given)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command_runs_to_its_end_on_tiny_shapes(tmp_path):
    assert gpu.main(["--rehearse", "--out", str(tmp_path), "--seconds", "1200"]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"gpu-run.json"} | {f"gpu-{part.name}.json" for part in PARTS if part.writes}
