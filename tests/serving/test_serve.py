"""`casa serve`: the verb parses, loads and says where it is; what is missing or wrong is one sentence."""

import sys

import pytest
import torch

from casa.cli.main import run
from casa.errors import UserError
from casa.serving import extra, server
from casa.testing import tiny_casa, tiny_processor


@pytest.fixture
def casa(monkeypatch, capsys):
    """Runs `casa serve` with arguments: status, and what it printed."""

    def call(*arguments):
        capsys.readouterr()  # what making the checkpoint printed
        monkeypatch.setattr(sys, "argv", ["casa", "serve", *map(str, arguments)])
        status = 0
        try:
            run()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny_casa(dtype=torch.float32)
    model.save_pretrained(tmp_path / "mine")
    tiny_processor().save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_it_says_where_it_is(casa, checkpoint, monkeypatch):
    served = []

    def run_no_longer(self):
        served.append(self)
        self._socket.close()

    monkeypatch.setattr(server.Server, "run", run_no_longer)
    status, out, err = casa(checkpoint, "--port", 0, "--sessions", 3, "--fps", 4, "--device", "cpu")
    assert (status, err) == (0, "")
    state = served[0]._state
    assert out == f"mine is at http://127.0.0.1:{served[0].port}/  (Ctrl-C stops it)\n"
    assert (state.name, state.worker.engine.most_sessions, state.fps, state.token) == ("mine", 3, 4.0, None)
    monkeypatch.setenv("CASA_TOKEN", "secret")
    status, out, err = casa(checkpoint, "--port", 0, "--host", "0.0.0.0")
    assert "/#token=secret" in out
    assert err == ""
    monkeypatch.delenv("CASA_TOKEN")
    _, _, err = casa(checkpoint, "--port", 0, "--host", "0.0.0.0")
    assert "--token" in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--fps", 0], "fps"), (["--host", "203.0.113.7"], "--host"), (["--device", "tpu"], "tpu")],
)
def test_what_is_wrong_is_one_sentence(casa, checkpoint, arguments, word):
    status, out, err = casa(checkpoint, "--port", 0, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("casa: ")
    assert err.count("\n") == 1
    assert word in err


def test_the_extra_is_named_where_it_is_missing(casa, checkpoint, monkeypatch):
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UserError, match="uvicorn"):
        extra.check_installed()
    status, _, err = casa(checkpoint)
    assert status == 2
    assert "casa-vlm[serve]" in err
