"""StoppedError anywhere and resumed: the files are those of a run that was not stopped, whatever the source."""

import numpy as np
import pytest
from PIL import Image

from casa.captioning import CaptionRequest, TimedQuestion, caption, outputs
from casa.captioning import run as module
from casa.captioning.outputs import RunState
from casa.errors import UserError
from casa.media import read_captions, read_frames
from casa.streaming import FrameCaption, Sampling

KINDS = ("srt", "vtt", "jsonl")
SETTINGS = {
    "fps": 3.0,
    "max_new_tokens": 4,
    "max_text_tokens": 48,
    "save_every": 0.0,
    "questions": (TimedQuestion(1.0, "who"), TimedQuestion(9.0, "and then")),
    "sampling": Sampling(temperature=1.2, top_k=20, repetition=0.5, no_repeat_ngram_size=3),
}


class StoppedError(Exception):
    """Stands for a kill: nothing is done after it."""


def killed(*_, **__):
    raise StoppedError


@pytest.fixture
def stopping(monkeypatch):
    """Lets a run end after so many frames, at the worst moment: the captions are written, the state is not."""

    def after(frames):
        reached = RunState.reached
        left = [frames]

        def counted(self, *arguments):
            left[0] -= 1
            if left[0] < 0:
                raise StoppedError
            reached(self, *arguments)

        monkeypatch.setattr(RunState, "reached", counted)
        return lambda: monkeypatch.setattr(RunState, "reached", reached)

    return after


@pytest.fixture(scope="module")
def folder_of_pictures(film, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for frame in read_frames(film, fps=3.0):
        frame.image.save(folder / f"{frame.index}.png")
    return folder


def request_to(folder, source, resume=False, **settings):
    outs = tuple(folder / f"a.{kind}" for kind in KINDS)
    return CaptionRequest(str(source), outs, resume=resume, **(SETTINGS | settings))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def always_late(session, frames, fps, *, counts, in_real_time):
    """In place of `watch_live`: each caption comes when the next two frames are there already."""
    for frame in frames:
        counts.frames += 1
        yield FrameCaption(frame.time, session.step(frame.image), 0.7, 0.0, True)


SOURCES = ["file", "part of a file", "folder", "read from its beginning", "live pace"]


@pytest.fixture
def setting_of(film, folder_of_pictures, monkeypatch):
    """What a run is given, and its settings; the run itself finds its source as it should be."""

    def get(source):
        if source == "read from its beginning":
            plain = module.open_source
            monkeypatch.setattr(module, "open_source", lambda *a, after, **k: plain(*a, **k))
        if source == "live pace":
            monkeypatch.setattr(module, "watch_live", always_late)
            return film, {"live": True, "questions": ()}
        if source == "part of a file":
            return film, {"start": 0.4, "fps": 3.7}
        return (folder_of_pictures if source == "folder" else film), {}

    return get


@pytest.fixture(scope="module")
def without_a_stop(load, tmp_path_factory):
    """The files of each source's run that nobody stopped, made once."""
    made = {}

    def get(source, given, settings):
        if source not in made:
            folder = tmp_path_factory.mktemp("whole")
            caption(request_to(folder, given, **settings), "tiny", load)
            made[source] = files(folder)
        return made[source]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "stops", "save_every"),
    [
        *((source, stops, 0.0) for source in SOURCES for stops in ((4, 3), (17,))),
        ("file", (4, 3), 1000.0),
        ("live pace", (4, 3), 1000.0),
    ],
)
def test_the_same_as_without_a_stop(source, stops, save_every, setting_of, without_a_stop, load, stopping, tmp_path):
    """With 1,000 s between states, only the first frame of each run is known to the next."""
    given, settings = setting_of(source)
    whole = without_a_stop(source, given, settings)
    settings |= {"save_every": save_every}
    for number, frames in enumerate(stops):
        go_on = stopping(frames)
        with pytest.raises(StoppedError):
            caption(request_to(tmp_path, given, resume=number > 0, **settings), "tiny", load)
        go_on()
        assert (tmp_path / "a.srt.state").exists()
    caption(request_to(tmp_path, given, resume=True, **settings), "tiny", load)
    assert files(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("questions", [SETTINGS["questions"], ()], ids=["a question behind the end", "no question"])
@pytest.mark.parametrize("burns", [False, True], ids=["files", "and a video"])
def test_stopped_when_no_frame_is_left(questions, burns, film, load, stopping, tmp_path, monkeypatch):
    """The last answer is written and its state is not; then, twice, the video of the captions is not finished."""
    burnt = []
    monkeypatch.setattr(outputs, "burn_captions", lambda source, captions, out, fps: burnt.append(list(captions)))
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    settings = {"questions": questions, "burn": tmp_path / "a.mp4" if burns else None}
    caption(request_to(one, film, **settings), "tiny", load)
    go_on = stopping(18)
    with pytest.raises(StoppedError):
        caption(request_to(two, film, **settings), "tiny", load)
    go_on()
    with monkeypatch.context() as patched:
        patched.setattr(outputs, "burn_captions", killed)
        for _ in range(2 if burns else 0):
            with pytest.raises(StoppedError):
                caption(request_to(two, film, resume=True, **settings), "tiny", load)
    report = caption(request_to(two, film, resume=True, **settings), "tiny", load)
    assert report.count.frames == 0
    assert files(two) == files(one)
    assert burnt == [read_captions(one / "a.srt")] * 2 if burns else not burnt


@pytest.mark.slow
def test_the_video_of_a_folder_is_the_same_as_without_a_stop(folder_of_pictures, load, stopping, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    caption(request_to(one, folder_of_pictures, burn=one / "a.mp4"), "tiny", load)
    go_on = stopping(8)
    with pytest.raises(StoppedError):
        caption(request_to(two, folder_of_pictures, burn=two / "a.mp4"), "tiny", load)
    go_on()
    caption(request_to(two, folder_of_pictures, resume=True, burn=two / "a.mp4"), "tiny", load)
    assert files(two) == files(one)
    times = [frame.time for frame in read_frames(two / "a.mp4", fps=None)]
    assert times == pytest.approx([k / 3 for k in range(18)], abs=1e-3)


@pytest.mark.slow
def test_videos_after_a_resumed_run_hold_all_captions(film, load, stopping, tmp_path):
    go_on = stopping(8)
    with pytest.raises(StoppedError):
        caption(request_to(tmp_path, film), "tiny", load)
    go_on()
    caption(request_to(tmp_path, film, resume=True, track=tmp_path / "a.mkv"), "tiny", load)
    import av

    with av.open(str(tmp_path / "a.mkv")) as made:
        texts = [bytes(packet).decode() for packet in made.demux(subtitles=0) if packet.size]
    assert texts == [one.text for one in read_captions(tmp_path / "a.srt")]


@pytest.mark.slow
def test_without_a_state_it_begins_at_the_beginning(film, load, tmp_path):
    caption(request_to(tmp_path, film), "tiny", load)
    before = files(tmp_path)
    caption(request_to(tmp_path, film, resume=True), "tiny", load)
    assert files(tmp_path) == before


def test_a_run_that_is_not_resumed_forgets_the_old_state(film, load, stopping, tmp_path):
    go_on = stopping(3)
    with pytest.raises(StoppedError):
        caption(request_to(tmp_path, film), "tiny", load)
    go_on()
    RunState(request_to(tmp_path, film), "tiny")
    assert not (tmp_path / "a.srt.state").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [({"fps": 2.0}, "fps"), ({"prompt": "say"}, "prompt"), ({"seed": 1}, "seed"), ({"questions": ()}, "questions")],
)
def test_another_run_is_not_gone_on_with(film, load, stopping, tmp_path, change, word):
    go_on = stopping(3)
    with pytest.raises(StoppedError):
        caption(request_to(tmp_path, film), "tiny", load)
    go_on()
    before = files(tmp_path)
    with pytest.raises(UserError, match=f"another {word}"):
        caption(request_to(tmp_path, film, resume=True, **change), "tiny", load)
    with pytest.raises(UserError, match="another model"):
        caption(request_to(tmp_path, film, resume=True), "another", load)
    assert files(tmp_path) == before, "and nothing was touched"


def test_a_state_that_is_none(film, load, tmp_path):
    (tmp_path / "a.srt.state").write_bytes(b"no state")
    with pytest.raises(UserError, match="not a saved session"):
        caption(request_to(tmp_path, film, resume=True), "tiny", load)


def test_a_live_stream_goes_on_by_the_clock_and_keeps_what_was_said(tmp_path):
    now = [1000.0]
    request = request_to(tmp_path, "camera:0")
    (tmp_path / "a.srt").touch()

    class Session:
        notes: dict

        def save(self, path):
            path.write_text("state")

    first = RunState(request, "tiny", wall=lambda: now[0])
    assert first.offset(True) == 0.0
    first.reached(5.0, 0, Session())
    now[0] += 60
    again = RunState(request, "tiny", wall=lambda: now[0])
    again.position = first.position
    assert again.offset(True) == 60.0, "a gap of which nothing was seen"
    now[0] = 900.0
    assert again.offset(True) == 5.001, "a clock that was set back"
    assert again.offset(False) == 0.0


def test_states_are_saved_at_the_first_frame_and_then_in_time(tmp_path):
    now, saved = [0.0], []

    class Session:
        notes: dict

        def save(self, path):
            saved.append(now[0])

    progress = RunState(request_to(tmp_path, "camera:0", save_every=5.0), "tiny", clock=lambda: now[0])
    for second in range(12):
        now[0] = float(second)
        progress.reached(second, 0, Session())
    assert saved == [0.0, 5.0, 10.0]


def test_pictures_of_a_still(load, tmp_path):
    """One frame, nothing to go on with."""
    Image.fromarray(np.zeros((56, 84, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    caption(request_to(tmp_path / "out", tmp_path / "a.png"), "tiny", load)
    assert sorted(files(tmp_path / "out")) == ["a.jsonl", "a.srt", "a.vtt"]
