"""`casa serve`: the verb parses, loads and says where it is; what is missing or wrong is one sentence."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from casa.cli.main import run
from casa.errors import UserError
from casa.serving import limits, server
from casa.testing import PATIENCE, tiny_casa, tiny_processor


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


@pytest.mark.slow
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
    assert (state.name, state.worker.engine.max_sessions, state.fps, state.token) == ("mine", 3, 4.0, None)
    monkeypatch.setenv("CASA_TOKEN", "secret")
    status, out, err = casa(checkpoint, "--port", 0, "--host", "0.0.0.0")
    assert "/#token=secret" in out
    assert err == ""
    monkeypatch.delenv("CASA_TOKEN")
    _, _, err = casa(checkpoint, "--port", 0, "--host", "0.0.0.0", "--limit", "sessions=5")
    assert "--token" in err
    assert served[-1]._state.worker.engine.max_sessions == 5


def listening_addresses(port):
    """Where this machine listens at that port, IPv4 and IPv6, as the system writes it (hexadecimal)."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        lines = Path(table).read_text().splitlines()[1:] if Path(table).exists() else []
        for local, _, state in (line.split()[1:4] for line in lines):
            address, number = local.split(":")
            if int(number, 16) == port and state == "0A":
                found.add(address)
    return found


@pytest.mark.slow
def test_the_command_itself_serves_this_machine_only_until_ctrl_c(checkpoint):
    command = [sys.executable, "-c", "from casa.cli.main import run; run()", "serve", str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            line = running.stdout.readline()
            port = int(re.fullmatch(r"mine is at http://127\.0\.0\.1:(\d+)/  \(Ctrl-C stops it\)\n", line)[1])
            # the socket listens already, and waits for the app to be there
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
                connection.request("GET", "/health")
                answer = connection.getresponse()
                assert answer.status == 200
                assert json.loads(answer.read())["status"] == "ok"
            if Path("/proc/net/tcp").exists():
                assert listening_addresses(port) == {"0100007F"}
            # any address of this network but that one
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=PATIENCE).close()
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=PATIENCE)
        finally:
            running.kill()
    assert (running.returncode, out, err) == (0, "", "")


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
    monkeypatch.setattr(limits, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UserError, match="uvicorn"):
        limits.check_installed()
    status, _, err = casa(checkpoint)
    assert status == 2
    assert "casa-vlm[serve]" in err
