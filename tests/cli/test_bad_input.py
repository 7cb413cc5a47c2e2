"""What a user can get wrong: one plain sentence on stderr, status 2, no traceback, nothing half-written."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.fixture
def bad(tmp_path):
    """Paths of things that are not what they seem."""
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(whole)
    files = {
        "empty": b"",
        "cut": whole.read_bytes()[:400],
        "text": b"this is not a picture\n" * 10,
        "huge": png_header(60_000, 60_000),
        "thin": None,
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / f"{name}.png").write_bytes(content)
    Image.new("RGB", (804, 4)).save(tmp_path / "thin.png")
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 10)
    return tmp_path


def assert_sentence(result, *words: str) -> None:
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("casa: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(
    ("name", "word"),
    [("none", "no file"), ("empty", "empty"), ("cut", "cut off"), ("text", "text"), ("huge", "60"), ("thin", "200")],
)
def test_pictures(casa, checkpoint, bad, name, word):
    assert_sentence(casa("ask", checkpoint, bad / f"{name}.png", "what?"), word)


def test_videos_write_nothing(casa, checkpoint, bad, tmp_path):
    out = tmp_path / "captions.srt"
    assert_sentence(casa("caption", checkpoint, bad / "text.mp4", "--out", out), "text")
    assert_sentence(casa("caption", checkpoint, bad / "none.mp4", "--out", out), "no file")
    assert_sentence(casa("caption", checkpoint, bad / "whole.png", "--fps", 0, "--out", out), "fps")
    assert_sentence(casa("caption", checkpoint, bad / "whole.png", "--out", tmp_path / "captions.txt"), ".srt")
    assert not list(tmp_path.glob("captions*"))


def test_models_that_are_not_there(casa, bad):
    for name in (bad / "nowhere", bad / "text.mp4", bad, "casa-tinny"):
        assert_sentence(casa("ask", name, bad / "whole.png", "what?"))


@pytest.mark.parametrize("change", ["missing", "surplus", "misshapen"])
def test_checkpoints_with_other_weights(casa, checkpoint, bad, tmp_path, change):
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = "casa_layers.0.q_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "surplus":
        weights["casa_layers.9.q_proj.weight"] = weights[name].clone()
    else:
        weights[name] = weights[name][:3].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_sentence(casa("ask", folder, bad / "whole.png", "what?"), "casa_layers.")


def test_a_config_of_nonsense(casa, checkpoint, bad, tmp_path):
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text("{not json")
    assert_sentence(casa("ask", folder, bad / "whole.png", "what?"))
    config = json.loads((checkpoint / "config.json").read_text())
    config["fusion"]["placment"] = "before"
    (folder / "config.json").write_text(json.dumps(config))
    assert_sentence(casa("ask", folder, bad / "whole.png", "what?"), "placement")


def test_recipes(casa, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sed: 3\n")
    assert_sentence(casa("train", recipe, "--out", tmp_path / "run"), "did you mean")
    recipe.write_text("!!python/object/apply:os.system ['touch hacked']\n")
    assert_sentence(casa("train", recipe, "--out", tmp_path / "run"))
    recipe.write_text("a: [1\n")
    assert_sentence(casa("train", recipe, "--out", tmp_path / "run"))
    assert_sentence(casa("train", tmp_path / "none.yaml", "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "hacked").exists()


def test_tasks_devices_and_words(casa, checkpoint, bad):
    assert_sentence(casa("eval", checkpoint, "--tasks", "pagse"), "pages")
    assert_sentence(casa("eval", checkpoint, "--limit", 0), "limit")
    assert_sentence(casa("ask", checkpoint, bad / "whole.png", "what?", "--device", "tpu"), "tpu")
    assert_sentence(casa("ask", "one"), "ask takes")
    assert_sentence(casa("bench", "attention", "--impls", "spda"), "spda")


def test_debug_shows_the_traceback(casa, checkpoint, bad):
    with pytest.raises(ValueError, match="empty"):
        casa("ask", checkpoint, bad / "empty.png", "what?", "--debug")


class OutOfMemoryError(RuntimeError):
    """By the name of torch's for GPUs."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["Python", "GPU", "CPU"],
)
def test_memory_that_runs_out(casa, monkeypatch, error):
    def fail(arguments):
        raise error

    monkeypatch.setattr("casa.cli.main.app", fail)
    assert_sentence(casa("ask"), "not enough memory")
    with pytest.raises(type(error)):
        casa("ask", "--debug")


def test_an_error_of_the_program_itself_keeps_its_traceback(casa, monkeypatch):
    def fail(arguments):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr("casa.cli.main.app", fail)
    with pytest.raises(RuntimeError, match="shape"):
        casa("ask")
