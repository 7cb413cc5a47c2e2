"""Windows and macOS, as far as Linux can tell: the core runs with what Linux alone has taken away, and a model in
float32 makes no float64, which Apple's GPU does not have.
"""

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import casa
from casa.errors import UserError
from casa.media import sources
from casa.models.auto import pick_device
from casa.testing import PATIENCE, noise_frames, tiny_casa, tiny_processor
from casa.training import checkpoints

SOURCE = Path(casa.__file__).parent
# what one system alone has, and how a file that uses it guards it
ONLY_POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix"}

MASKED = """
import os, select, signal, sys, types, warnings
# what others do on each system is not casa's doing
import PIL.Image, av, numpy, rich, safetensors.torch, torch, typer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationMixin
for module in %r:
    sys.modules[module] = None
for name in ("sched_getaffinity", "fork", "forkpty", "getuid", "geteuid", "kill", "killpg", "sysconf", "mkfifo"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGCHLD", "SIGALRM"):
    if hasattr(signal, name):
        delattr(signal, name)
del select.poll
sys.platform = %r
sys.modules["msvcrt"] = types.SimpleNamespace(setmode=lambda *given: None) if sys.platform == "win32" else None

def away(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "not on this system", args[0])

sys.addaudithook(away)
unsaid = []
warnings.showwarning = lambda message, category, file, *_: unsaid.append(f"{file}: {message}")
warnings.simplefilter("always", EncodingWarning)

import casa
from casa.cli.main import run
from casa.media import open_source, write_captions, Caption
eyes = casa.load("casa-tiny", device="cpu")
print(eyes.ask("page.png", "Read line 1."))
session = eyes.stream(max_text_tokens=64)
with open_source("clip.mp4", fps=2, end=1.0) as frames:
    print([session.step(frame.image) for frame in frames][0])
session.save("session.safetensors")
casa.StreamingSession.load("session.safetensors", eyes.model, eyes.processor)
sys.argv = ["casa", "caption", "casa-tiny", "clip.mp4", "--end", "1", "--out", "clip.srt"]
try:
    run()
except SystemExit as end:
    print("ended", end.code)
print("-->" in open("clip.srt", encoding="utf-8").read())
print([line for line in unsaid if line.startswith(os.path.dirname(casa.__file__))])
"""


def imports_of_one_system(tree: ast.AST) -> list[str]:
    """Modules of one system that a file imports as it is imported, and not under a condition or in a function."""
    found = []
    for node in getattr(tree, "body", []):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name in ONLY_POSIX | {"msvcrt", "winreg"}]
    return found


def test_no_file_needs_one_system_to_be_imported():
    for path in SOURCE.rglob("*.py"):
        assert imports_of_one_system(ast.parse(path.read_text(encoding="utf-8"))) == [], path
    assert imports_of_one_system(ast.parse("import fcntl\nif x:\n    import msvcrt")) == ["fcntl"]


def test_texts_are_read_and_written_as_utf_8():
    """Windows takes another encoding where none is named."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", "")
            if isinstance(node, ast.Call) and name in ("read_text", "write_text"):
                given = {word.arg for word in node.keywords} | (
                    {"encoding"} if len(node.args) > (name[0] == "w") else set()
                )
                assert "encoding" in given or not isinstance(node.func, ast.Attribute), f"{path}:{node.lineno}"


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_the_core_runs_without_what_linux_alone_has(tmp_path, platform):
    for file in ("../../docs/images/page.png", "assets/demo/clip.mp4"):
        (tmp_path / Path(file).name).write_bytes((SOURCE / file).read_bytes())
    code = MASKED % (sorted(ONLY_POSIX - {"posix"}), platform)
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    told = done.stdout.splitlines()
    assert told[:2] == ["797", "707"], done.stderr
    assert told[-3:] == ["ended 0", "True", "[]"], done.stderr


def test_a_pipe_is_read_as_bytes_on_windows(monkeypatch):
    """There a pipe is text until it is told otherwise: line breaks would be changed."""
    told = []
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "O_BINARY", 32768, raising=False)
    monkeypatch.setattr(sources, "msvcrt", SimpleNamespace(setmode=lambda *given: told.append(given)), raising=False)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, fileno=lambda: 7))
    sources._Pipe("-", threading.Event())
    assert told == [(7, 32768)]


def test_windows_opens_no_folders_and_files_to_be_synced_for_writing(tmp_path, monkeypatch):
    opened = []

    def opening(path, flags):
        opened.append((path, flags))
        return os.open(path, flags)

    system = SimpleNamespace(name="nt", open=opening, fsync=os.fsync, close=os.close, O_RDWR=os.O_RDWR)
    monkeypatch.setattr(checkpoints, "os", system)
    (tmp_path / "file").write_bytes(b"1")
    checkpoints._sync(tmp_path)
    checkpoints._sync(tmp_path / "file")
    assert opened == [(tmp_path / "file", os.O_RDWR)]


def test_words_that_the_terminal_cannot_show_do_not_end_the_program():
    code = "import casa.cli.main as main; main.app = lambda arguments: print('\\u7a97'); main.run()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (0, "\\u7a97\n"), done.stderr


class NoDoubles(TorchDispatchMode):
    """Refuses every tensor of float64, as Apple's GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float64:
                raise TypeError(f"{func} made a tensor of float64")
        return out


@pytest.mark.parametrize(
    "fusion", [{}, {"placement": "replace", "every": 2}, {"history": 1}, {"method": "cross_attention"}], ids=str
)
def test_a_float32_model_makes_no_float64(fusion):
    model, processor = tiny_casa(dtype=torch.float32, **fusion), tiny_processor()
    eyes = casa.CasaPipeline(model.eval(), processor, "memory")
    frames = noise_frames(0, 3)
    with NoDoubles():
        eyes.ask(frames[0], "Hm?", max_new_tokens=3)
        session = eyes.stream(max_new_tokens=3)
        for frame in frames:
            session.step(frame)
        chat = [{"role": "user", "content": [{"type": "image", "image": frames[0]}, {"type": "text", "text": "Hm?"}]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    with pytest.raises(TypeError, match="made a tensor of float64"), NoDoubles():
        torch.ones(1).double()


def test_mps_is_a_device_that_is_asked_for(monkeypatch):
    with pytest.raises(UserError, match="no MPS device"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == "mps"
    assert pick_device("auto") in ("cpu", "cuda")
