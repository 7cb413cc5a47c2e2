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
from projects.casa_smol.weights import WEIGHTS, export, page_encoder

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
    pixels = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    average, encoder = run.average.eval(), page_encoder(file)
    cells, found = average.encoder(pixels), encoder(pixels)
    close = {"rtol": 0.05, "atol": 0.05}  # bfloat16
    torch.testing.assert_close(found, cells, **close)
    torch.testing.assert_close(encoder.middles(found), average.heads.middles(cells), **close)
    torch.testing.assert_close(encoder.around(found.movedim(1, 3)), average.around(cells.movedim(1, 3)), **close)
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
    encoder = page_encoder()
    pixels = torch.from_numpy(np.array(canvas.image)).permute(2, 0, 1)[None] / 127.5 - 1
    found = encoder.classifier(encoder(pixels))[0].argmax(0).numpy()
    assert (found[row, column] == wanted).mean() > 0.8
    (line,) = read.read(canvas.image, encoder)
    assert line.text == "Green tea and coffee 12"


def test_the_command_reads_a_picture(exported, tmp_path, capsys):
    known = ["--encoder", str(exported[1])]
    Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert read.main([str(tmp_path / "a.png"), *known]) == 0
    assert read.main(["--score", "line", "--count", "2", *known]) == 0
    assert '"error_rate"' in capsys.readouterr().out
