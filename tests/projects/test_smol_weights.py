"""The encoder as a file: what was trained is what is read back; reading with it alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from casa import FusionConfig, adapt
from casa.testing import tiny_text_model
from projects.casa_smol import read
from projects.casa_smol.canvas import Canvas
from projects.casa_smol.encoder import Run, Settings
from projects.casa_smol.fonts import CHARACTERS, kins
from projects.casa_smol.targets import targets_of
from projects.casa_smol.weights import WEIGHTS, export, learner, page_encoder

TINY = Settings(hidden_size=8, stem_sizes=(4, 4), dilations=(1, 2), score_pages=1, bf16=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of no steps, and its file."""
    folder = tmp_path_factory.mktemp("run")
    run = Run.start(TINY)
    run.step = 7
    run.keep(folder)
    told = export(folder, folder / "page.safetensors", pages=1)
    return run, folder / "page.safetensors", told


@torch.no_grad()
def test_the_file_holds_the_averaged_weights(exported):
    run, file, told = exported
    picture = torch.randint(0, 256, (1, 32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    wanted, found = run.average.eval()(picture), learner(file)(picture)
    for name, logits in wanted.items():
        torch.testing.assert_close(found[name], logits, rtol=0.05, atol=0.05)  # bfloat16
    assert told["steps"] == 7
    assert set(told["scores"]) == {"held_out", "held_out_clean", "seen"}
    assert json.loads(file.with_suffix(".json").read_text()) == json.loads(json.dumps(told))


def test_tokens_are_chosen_when_it_is_loaded_and_a_model_gets_eyes(exported):
    encoder = page_encoder(exported[1], token_size=(16, 16), token_parts=("features", "places"))
    assert encoder.config.characters == CHARACTERS
    model = adapt(tiny_text_model(dtype=torch.float32), FusionConfig(), vision=encoder)
    assert model.projector.norm.normalized_shape == (8 * 8 + 28,)


@torch.no_grad()
def test_the_weights_that_are_here_read():
    told = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert told["scores"]["held_out_clean"]["characters"] > 0.9
    canvas = Canvas((320, 48), (255, 255, 255))
    canvas.text(12, 32, "Green tea and coffee 12", kins("train")[0][0], 24, (0, 0, 0))
    row, column, wanted, _ = targets_of(canvas.found(), np.asarray(canvas.ground)).centres.T
    found = learner()(torch.from_numpy(np.array(canvas.image))[None])["classes"][0].argmax(0).numpy()
    assert (found[row, column] == wanted).mean() > 0.8


class Told:
    """An encoder that sees what it is told: characters at cells."""

    def __init__(self, rows, columns, spots):
        self.classes = torch.zeros(1, 1 + len(CHARACTERS), rows, columns)
        self.classes[:, 0] = 9.0
        self.middles = torch.full((1, 1, rows, columns), -9.0)
        for row, column, character in spots:
            self.middles[0, 0, row, column] = 9.0
            self.classes[0, 1 + CHARACTERS.index(character), row, column] = 20.0

    def __call__(self, pictures):
        assert pictures.shape[1:3] == (self.classes.shape[2] * 8, self.classes.shape[3] * 4)
        return {"classes": self.classes, "middles": self.middles}


def test_characters_become_lines_with_their_spaces():
    spots = [(2, 2 + 3 * n, letter) for n, letter in enumerate("Total: 4.20")]
    spots += [(row, 2 + 3 * n, letter) for n, (row, letter) in enumerate(zip((6, 6, 6, 7, 7), "slant", strict=True))]
    spots += [(6, 40 + 3 * n + (6 if n > 1 else 0), letter) for n, letter in enumerate("noon")]
    found = read.read(Image.new("RGB", (61 * 4 - 1, 78)), Told(10, 61, spots))
    assert [line.text for line in found] == ["Total: 4.20", "no on", "slant"]


def test_the_command_reads_a_picture(exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(read, "learner", lambda: learner(exported[1]))
    Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert read.main([str(tmp_path / "a.png")]) == 0
    assert read.main(["--score", "line", "--count", "2"]) == 0
    assert '"error_rate"' in capsys.readouterr().out
