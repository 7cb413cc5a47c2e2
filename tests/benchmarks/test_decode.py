"""What a token costs: all contestants are there, each timed beside the backbone's own. No test asserts a time."""

import pytest
from click.testing import Result
from typer.testing import CliRunner

from casa.benchmarks.decode import ALL, FLOOR, INSERTED, OWN, TEXT, bench_decode, summary
from casa.benchmarks.settings import DecodeSettings
from casa.cli.main import app
from casa.errors import UserError
from casa.testing import tiny_text_model


def test_a_busy_machine_slows_all_alike():
    own, other = iter([1.0, 10.0, 100.0, 10.0]), iter([1.0, 5.0, 50.0, 5.0])
    found = summary({OWN: lambda: next(own), "other": lambda: next(other)}, rounds=3)
    assert found["other"]["ratio"] == 0.5
    assert found[OWN] == {"ms": 10.0, "spread": 4.5, "ratio": 1.0}


@pytest.mark.slow
def test_all_take_part(tmp_path):
    tiny_text_model().save_pretrained(tmp_path)
    settings = DecodeSettings(str(tmp_path), 4, 8, 2, 2, (1, 2), 2, (0, 1), ("int8", "bf16"), cpu_time=True)
    found = bench_decode(settings)
    assert set(found.figures) == {"int8", "bf16", "quality"}
    quality = found.figures["quality"]
    assert 0 < quality["kl"] < 0.1
    assert quality["perplexity"] == pytest.approx(quality["perplexity_whole"], rel=0.1)
    parts = found.figures["bf16"]
    assert set(parts) == {"token", "token, 2 rows", "first token of a frame", "prompt"}
    names = {FLOOR, OWN, TEXT, "CASA every 2", "CASA every 2, history 1", ALL, INSERTED}
    assert set(parts["token"]) == set(parts["token, 2 rows"]) == names
    assert found.table.count("first token of a frame") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtypes", "int3"], "dtypes has 'int3'; choose among: bf16, int8, fp32"),
        (["--rows", "0"], "rows are 1 or more"),
    ],
)
def test_what_cannot_be_is_told(options, words):
    found: Result = CliRunner().invoke(app, ["bench", "decode", *options])
    assert isinstance(found.exception, UserError | SystemExit)
    assert words in str(found.exception) + found.output
