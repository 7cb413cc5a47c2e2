"""Every verb does what its help says, on a tiny random checkpoint."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from casa.cli.main import app
from casa.media import VideoWriter, probe, read_srt
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


def test_caption_prints_and_writes(casa, checkpoint, video, tmp_path):
    files = [tmp_path / f"captions.{kind}" for kind in ("srt", "vtt", "jsonl")]
    burned = tmp_path / "captioned.mp4"
    outs = [part for path in files for part in ("--out", path)]
    result = casa("caption", checkpoint, video, "--fps", 5, *outs, "--burn", burned, "--max-text-tokens", 60)
    assert (result.status, result.err) == (0, "")
    captions = read_srt(files[0])
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
