"""Every verb does what its help says, on a tiny random checkpoint."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command

import casa as package
from casa.cli.main import app
from casa.errors import UserError
from casa.media import VideoWriter, probe, read_captions
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.testing import tiny_encoder, tiny_processor, tiny_text_model


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "page.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 112, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    with VideoWriter(path, (84, 56), fps=10) as writer:
        for level in range(20):
            writer.write(np.full((56, 84, 3), 10 * level, dtype=np.uint8))
    return path


def verbs(command, path=()):
    """The words of a command, and of every one below it."""
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs(below, (*path, name))


VERBS = list(verbs(get_command(app)))


def test_verbs_below_others_are_found():
    assert {("serve",), ("export",), ("data", "check"), ("bench", "train")} < set(VERBS)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(("casa", *verb)))
def test_help_shows_an_example(casa, verb):
    result = casa(*verb, "--help")
    assert result.status == 0
    assert f"Example: {' '.join(('casa', *verb))}" in result.out


def test_ask_prints_the_bare_answer(casa, checkpoint, picture):
    plain = casa("ask", checkpoint, picture, "what?", "--max-new-tokens", 5)
    assert (plain.status, plain.err) == (0, "")
    as_json = casa("ask", checkpoint, picture, "what?", "--max-new-tokens", 5, "--json")
    assert plain.out == json.loads(as_json.out)["answer"] + "\n"


def test_ask_takes_words_like_special_tokens(casa, checkpoint, picture):
    said = casa("ask", checkpoint, picture, "is <image> a <end>?", "--max-new-tokens", 5)
    assert (said.status, said.err) == (0, "")


@pytest.mark.slow
def test_ask_takes_several_pictures_and_draws_words(casa, checkpoint, picture, tmp_path, monkeypatch):
    Image.new("RGB", (56, 84), "green").save(tmp_path / "other.png")
    one, other = str(picture), str(tmp_path / "other.png")

    def ask(*words):
        result = casa("ask", checkpoint, *words, "--max-new-tokens", 6)
        assert (result.status, result.err) == (0, "")
        return result.out

    apart = {pictures: ask(*pictures, "which?") for pictures in ((one,), (other,), (one, other), (other, one))}
    eyes = package.load(checkpoint)
    for pictures in ((one, other), (other, one)):
        assert apart[pictures] == eyes.ask([*pictures], "which?", max_new_tokens=6) + "\n"
    warm = ("which?", "--temperature", 3, "--top-p", 0.95, "--top-k", 40)
    asked = {seed: ask(one, *warm, "--seed", seed) for seed in range(4)}
    assert asked == {seed: ask(one, *warm, "--seed", seed) for seed in range(4)}
    assert len(set(asked.values())) > 1
    # without a seed, every answer is drawn anew, and the numbers of the process stay as they were
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len({ask(one, *warm) for _ in range(6)}) > 1
    assert torch.equal(torch.get_rng_state(), before)
    # a file that comes first is no model
    monkeypatch.setattr("casa.pipeline.load", lambda name, **_: (_ for _ in ()).throw(UserError(name)))
    assert casa("ask", one, other, "which?").err == "casa: casa-tiny\n"
    assert casa("ask", "some-model", other, "which?").err == "casa: some-model\n"
    assert "There is no file slip.png" in casa("ask", "slip.png", other, "which?").err
    assert "--top-p" in casa("ask", one, "which?", "--top-p", 0).err


def test_the_version_is_told_by_the_program_and_the_module(casa):
    told = f"casa {package.__version__}\n"
    assert casa("--version").out == told
    run = subprocess.run([sys.executable, "-m", "casa", "--version"], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == (told, "")


def test_a_bound_on_text_means_the_same_for_every_verb():
    """Tokens that are remembered, 0 being none, and one default within a verb."""
    found = {}
    for verb in VERBS:
        command = get_command(app)
        for word in verb:
            command = command.commands[word]
        for option in command.params:
            if "--max-text-tokens" in option.opts:
                found[" ".join(verb)] = (option.help, option.min, option.default)
    assert {"caption", "bench stream", "bench soak", "bench live", "bench memory"} == set(found)
    assert {(told, least) for told, least, _ in found.values()} == {
        ("Bound on the text remembered, in tokens; 0: none.", 0)
    }
    assert all(isinstance(default, int) for _, _, default in found.values())


@pytest.mark.slow
def test_caption_prints_and_writes(casa, checkpoint, video, tmp_path):
    files = [tmp_path / f"captions.{kind}" for kind in ("srt", "vtt", "jsonl")]
    burned = tmp_path / "captioned.mp4"
    outs = [part for path in files for part in ("--out", path)]
    result = casa("caption", checkpoint, video, "--fps", 5, *outs, "--burn", burned, "--max-text-tokens", 60)
    assert (result.status, result.err) == (0, "")
    unbounded = casa("caption", checkpoint, video, "--fps", 5, "--max-text-tokens", 0)
    assert (unbounded.status, unbounded.err) == (0, "")
    captions = read_captions(files[0])
    assert [caption.text for caption in captions]
    assert all(path.read_text() for path in files)
    assert probe(burned).frames == 20


def test_adapt_joins_two_folders(casa, tmp_path):
    tiny_text_model().save_pretrained(tmp_path / "text")
    tiny_processor().tokenizer.save_pretrained(tmp_path / "text")
    tiny_encoder().save_pretrained(tmp_path / "tower")
    out = tmp_path / "casa"
    result = casa("adapt", tmp_path / "text", "--vision", tmp_path / "tower", "--out", out, "--every", 2)
    assert (result.status, result.err) == (0, "")
    assert "[1]" in result.out
    assert CasaForConditionalGeneration.from_pretrained(out).fused_blocks == (1,)
    assert CasaProcessor.from_pretrained(out).image_token == "<image>"


@pytest.mark.slow
def test_eval_prints_one_json_object(casa, checkpoint, tmp_path):
    kept = tmp_path / "scores.json"
    result = casa(
        "eval", checkpoint, "--tasks", "pages,scenes,stream", "--seed", 3, "--limit", 1, "--json", "--out", kept
    )
    assert result.status == 0
    scores = json.loads(result.out)
    assert set(scores) == {"pages", "scenes", "stream"}
    assert set(scores["pages"]) == {"digits", "lines", "n"}
    assert set(scores["stream"]) == {"wer", "n"}
    record = json.loads(kept.read_text())
    assert record["scores"] == scores
    assert {"seed", "commit", "versions"} <= set(record)


@pytest.mark.parametrize(
    "line",
    [
        ("eval", "casa-tiny", "--out"),
        ("bench", "attention", "--out"),
        ("bench", "stream", "--plot"),
        ("bench", "soak", "--out"),
        ("bench", "train", "--out"),
        ("demo", "--record"),
    ],
    ids=lambda line: " ".join(line),
)
def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(casa, tmp_path, monkeypatch, line):
    def measured(*_, **__):
        raise AssertionError("it was begun")

    for name in (
        "casa.pipeline.load",
        "casa.models.auto.load_pretrained",
        "casa.models.auto.pick_device",
        "casa.demo.run_demo",
    ):
        monkeypatch.setattr(name, measured)
    result = casa(*line, tmp_path / "none" / "a.json")
    assert (result.status, result.out) == (2, "")
    assert "a.json does not exist: create it, or write elsewhere" in result.err
