"""A manifest of films and pictures: each says what it says alone, a bad one costs itself, and a killed run goes on."""

import importlib.util
import json
import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

import casa
from casa.captioning import BatchRequest, caption_batch
from casa.captioning import batch as module
from casa.errors import UserError
from casa.media import open_source
from casa.pipeline import CasaPipeline
from casa.testing import tiny_checkpoint

SETTINGS: dict[str, Any] = {"fps": 2, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def eyes(load):
    return CasaPipeline(*load("tiny"))


@pytest.fixture(scope="module")
def folder(noise_film, tmp_path_factory):
    """Three films of different lengths, two pictures; one more of each is broken, another is not there."""
    made = tmp_path_factory.mktemp("batch")
    for seconds in (1, 2, 3):
        shutil.copy(noise_film(seconds), made / f"{seconds}.mp4")
    (made / "broken.mp4").write_bytes((made / "1.mp4").read_bytes()[:2000])
    noise = np.random.default_rng(1).integers(0, 255, (2, 56, 84, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(made / f"{number}.png")
    (made / "broken.png").write_bytes(b"none")
    return made


RECORDS = [
    {"video": "3.mp4"},
    {"id": "first picture", "image": "0.png", "question": "what?"},
    {"id": "bad", "video": "broken.mp4"},
    {"video": "1.mp4", "prompt": "say"},
    {"image": "broken.png"},
    {"id": "gone", "video": "gone.mp4"},
    {"image": "1.png"},
    {"video": "2.mp4"},
]
IDS = ["3.mp4", "first picture", "bad", "1.mp4", "broken.png", "gone", "1.png", "2.mp4"]


def manifest(folder, records=RECORDS, name="manifest.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / name


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_says_what_it_says_alone(eyes, folder, tmp_path):
    request = BatchRequest(manifest(folder), tmp_path / "out.jsonl", batch_size=2, **SETTINGS)
    told = []
    report = caption_batch(request, "tiny", lambda name: eyes, lambda report: told.append(report.done))
    assert (report.done, report.failed, told) == (8, 3, list(range(1, 9)))
    found = entries(tmp_path / "out.jsonl")
    assert [entry["id"] for entry in found] == IDS
    by_id = {entry["id"]: entry for entry in found}
    for name, prompt in (("1.mp4", "say"), ("2.mp4", None), ("3.mp4", None)):
        with open_source(folder / name, SETTINGS["fps"]) as source:
            session = eyes.stream(prompt, max_new_tokens=4)
            alone = [{"time": round(frame.time, 3), "text": session.step(frame.image)} for frame in source]
        assert by_id[name]["captions"] == [one for one in alone if one["text"]]
        assert by_id[name]["frames"] == len(alone)
    assert by_id["first picture"]["text"] == eyes.ask(folder / "0.png", "what?", max_new_tokens=4)
    assert by_id["1.png"]["text"] == eyes.ask(folder / "1.png", "say it", max_new_tokens=4)
    for name, word in (("bad", "broken.mp4"), ("gone", "gone.mp4"), ("broken.png", "broken.png")):
        assert by_id[name].keys() == {"id", "error"}
        assert word in by_id[name]["error"]
    assert not request.journal.exists()


def test_a_run_that_was_killed_goes_on_at_the_record(eyes, folder, tmp_path, monkeypatch):
    how = {"batch_size": 2, **SETTINGS}
    whole = tmp_path / "whole.jsonl"
    caption_batch(BatchRequest(manifest(folder), whole, **how), "tiny", lambda name: eyes)
    request = BatchRequest(manifest(folder), tmp_path / "out.jsonl", **how)

    def stopping(report):
        if report.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption_batch(request, "tiny", lambda name: eyes, stopping)
    assert len(request.journal.read_bytes().splitlines()) == 5
    # killed in the middle of a line
    request.journal.write_bytes(request.journal.read_bytes() + b'{"id": "2.mp4", "capt')
    seen = []
    run = module.caption_records
    monkeypatch.setattr(
        module, "caption_records", lambda eyes, left, request: seen.extend(left) or run(eyes, left, request)
    )
    again = BatchRequest(manifest(folder), tmp_path / "out.jsonl", resume=True, **how)
    report = caption_batch(again, "tiny", lambda name: eyes)
    assert (report.known, len(seen)) == (4, 4)
    assert (tmp_path / "out.jsonl").read_bytes() == whole.read_bytes()


def test_a_record_that_says_something_else_is_done_anew(eyes, folder, tmp_path):
    few = [{"id": "a", "image": "0.png"}, {"id": "b", "image": "1.png"}, {"id": "c", "image": "1.png"}]
    request = BatchRequest(manifest(folder, few, "few.jsonl"), tmp_path / "out.jsonl", batch_size=1, **SETTINGS)

    def stopping(report):
        if report.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption_batch(request, "tiny", lambda name: eyes, stopping)
    few[0]["question"] = "who?"
    manifest(folder, few, "few.jsonl")
    again = BatchRequest(folder / "few.jsonl", tmp_path / "out.jsonl", resume=True, **SETTINGS)
    assert caption_batch(again, "tiny", lambda name: eyes).known == 1
    assert entries(tmp_path / "out.jsonl")[0]["text"] == eyes.ask(folder / "0.png", "who?", max_new_tokens=4)


def test_other_settings_are_refused(eyes, folder, tmp_path):
    request = BatchRequest(manifest(folder), tmp_path / "out.jsonl", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        caption_batch(request, "tiny", lambda name: (_ for _ in ()).throw(KeyboardInterrupt))
    other = BatchRequest(manifest(folder), tmp_path / "out.jsonl", resume=True, fps=3, max_new_tokens=4)
    with pytest.raises(UserError, match="another fps"):
        caption_batch(other, "tiny", lambda name: eyes)


def test_parquet_holds_the_same(eyes, folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("out.jsonl", "out.parquet"):
        caption_batch(BatchRequest(manifest(folder), tmp_path / name, **SETTINGS), "tiny", lambda name: eyes)
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [{key: value for key, value in row.items() if value is not None} for row in rows] == entries(
        tmp_path / "out.jsonl"
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no json", "line 2 of .* is no JSON"),
        ('{"id": "b"}', "line 2 of .* has neither; give video or image"),
        ('{"video": "b.mp4", "image": "b.png"}', "has video and image"),
        ('{"video": "b.mp4", "fps": "2"}', "has 'fps'"),
        ('{"video": "b.mp4", "question": "who"}', "asks a question of a film"),
        ('{"video": "a.mp4"}', "has the id 'a.mp4' of an earlier one"),
        ('{"video": 3}', "no object of texts"),
    ],
)
def test_a_manifest_that_cannot_be(tmp_path, line, words):
    (tmp_path / "manifest.jsonl").write_text('{"video": "a.mp4"}\n' + line + "\n")
    with pytest.raises(UserError, match=words):
        BatchRequest(tmp_path / "manifest.jsonl", tmp_path / "out.jsonl").records()


def test_settings_that_cannot_be(tmp_path):
    wrong: dict[str, Any]
    for wrong, words in (({"out": tmp_path / "a.srt"}, "known ending"), ({"fps": 0.0}, "above 0")):
        with pytest.raises(UserError, match=words):
            BatchRequest(**({"manifest": tmp_path / "m.jsonl", "out": tmp_path / "a.jsonl"} | wrong))
    with pytest.raises(UserError, match="cannot be read"):
        BatchRequest(tmp_path / "none.jsonl", tmp_path / "a.jsonl").records()


def test_without_ray_a_cluster_is_refused(eyes, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"casa-vlm\[cluster\]"):
        caption_batch(
            BatchRequest(manifest(folder), tmp_path / "out.jsonl", **SETTINGS),
            "tiny",
            lambda name: eyes,
            cluster="local",
        )


def test_two_questions_about_a_picture_look_once(load, folder, tmp_path):
    eyes = CasaPipeline(*load("tiny"))
    asked = [{"id": str(number), "image": "0.png", "question": "what?"} for number in range(5)]
    request = BatchRequest(manifest(folder, asked, "asked.jsonl"), tmp_path / "out.jsonl", batch_size=2, **SETTINGS)
    caption_batch(request, "tiny", lambda name: eyes)
    assert eyes.image_cache is not None
    assert (eyes.image_cache.hits, eyes.image_cache.misses) == (4, 1)
    assert casa.ImageCache is type(eyes.image_cache)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_cluster_writes_the_same_file(folder, tmp_path, monkeypatch):
    """A real one on this machine: workers are processes of their own, which load the checkpoint themselves."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    model = tiny_checkpoint(tmp_path / "model")
    load = partial(casa.load, device="cpu")
    caption_batch(BatchRequest(manifest(folder), tmp_path / "out.jsonl", **SETTINGS), str(model), load)
    request = BatchRequest(manifest(folder), tmp_path / "ray.jsonl", batch_size=3, **SETTINGS)
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    try:
        report = caption_batch(request, str(model), load, cluster="auto")
    finally:
        ray.shutdown()
    assert (report.done, report.failed) == (8, 3)
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
