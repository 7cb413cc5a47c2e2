"""From a source to its outputs: the same captions from a file, a folder and a pipe, questions, videos, counts."""

import json
import threading
import time

import av
import pytest
from PIL import Image

from casa.captioning import CaptionReport, CaptionRequest, TimedQuestion, caption
from casa.captioning import run as module
from casa.errors import UserError
from casa.media import SourceCounts, probe, read_captions, read_frames
from casa.streaming import Sampling, StreamingSession, WatchCounts


def test_every_sampled_frame_of_a_file_is_watched(run, film, load, tmp_path):
    outs = [tmp_path / f"a.{kind}" for kind in ("srt", "vtt", "jsonl")]
    report, told = run(film, *outs)
    session = StreamingSession(*load(""), max_new_tokens=4)
    wanted = [(frame.time, session.step(frame.image)) for frame in read_frames(film)]
    assert told == [(time, text) for time, text in wanted if text]
    assert (report.count.frames, report.said, report.is_clean) == (12, len(told), True)
    assert not report.live
    assert read_captions(outs[0]) == read_captions(outs[1]) == read_captions(outs[2])
    assert read_captions(outs[0])[-1].end <= 6.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.srt", "a.vtt"]


@pytest.mark.slow
def test_a_folder_of_pictures(run, film, tmp_path):
    (tmp_path / "pictures").mkdir()
    for frame in read_frames(film):
        frame.image.save(tmp_path / "pictures" / f"{frame.index}.png")
    assert run(tmp_path / "pictures")[1] == run(film)[1]


def as_matroska(film, path):
    """The same packets in a container that can be read from a pipe."""
    with av.open(str(film)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    return path


@pytest.mark.slow
def test_a_pipe(run, film, tmp_path, monkeypatch):
    with as_matroska(film, tmp_path / "film.mkv").open("rb") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert run("-")[1] == run(film)[1]


def test_part_of_a_film(run, film):
    _, told = run(film, start=2.0, end=4.0)
    assert {2.0 <= at < 4.0 for at, _ in told} == {True}


@pytest.mark.slow
def test_questions_are_asked_at_their_second_and_once(run, film, load):
    questions = (TimedQuestion(2.2, "who"), TimedQuestion(99.0, "and then"))
    _, told = run(film, questions=questions)
    session, wanted = StreamingSession(*load(""), max_new_tokens=4), []
    for frame in read_frames(film):
        text = session.step(frame.image)
        wanted += [(frame.time, text)] if text else []
        if frame.time in (2.5, 5.5):
            question = "who" if frame.time == 2.5 else "and then"
            wanted.append((frame.time, f"{question} {session.ask(question) or '(no answer)'}"))
    assert told == wanted


def test_each_question_is_asked_once_in_order_whatever_the_order_given(run, film):
    questions = (TimedQuestion(2, "b"), TimedQuestion(0, "a"), TimedQuestion(2, "c"), TimedQuestion(99, "d"))
    _, told = run(film, questions=questions)
    answers = [(at, text[0]) for at, text in told if text[:2] in ("a ", "b ", "c ", "d ")]
    assert answers == [(0.0, "a"), (2.0, "b"), (2.0, "c"), (5.5, "d")]


@pytest.mark.slow
def test_sampling_reaches_the_session(run, film):
    drawn = [run(film, sampling=Sampling(temperature=1.5, top_k=20), seed=seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_a_video_with_captions_drawn_in_and_one_with_a_text_track(run, film, tmp_path):
    report, told = run(film, tmp_path / "a.srt", burn=tmp_path / "burnt.mp4", track=tmp_path / "track.mkv")
    assert report.said == len(told)
    assert probe(tmp_path / "burnt.mp4").frames == 60
    with av.open(str(tmp_path / "track.mkv")) as made:
        texts = [bytes(packet).decode() for packet in made.demux(subtitles=0) if packet.size]
    assert texts == [one.text for one in read_captions(tmp_path / "a.srt")]


@pytest.mark.parametrize("output", ["track", "burn"])
def test_what_an_output_needs_is_asked_before_the_first_frame(load, tmp_path, monkeypatch, output):
    """And before the model is there, and before anything is replaced."""
    with av.open(str(tmp_path / "film.webm"), "w") as made:
        stream = made.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        for _ in range(3):
            made.mux(stream.encode(av.VideoFrame(84, 56, "yuv420p")))
        made.mux(stream.encode())
    (tmp_path / "a.srt").write_text("what was there")
    if output == "burn":
        monkeypatch.setattr(av, "codecs_available", set())
    request = CaptionRequest(str(tmp_path / "film.webm"), (tmp_path / "a.srt",), **{output: tmp_path / "a.mp4"})
    with pytest.raises(UserError, match=r"write \.mkv instead" if output == "track" else "cannot write libx264"):
        caption(request, "tiny", None)
    assert (tmp_path / "a.srt").read_text() == "what was there"
    assert not (tmp_path / "a.mp4").exists()


def test_a_folder_becomes_a_video_with_its_captions(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    for k in range(4):
        Image.new("RGB", (84, 56), (200, 0, 0)).save(tmp_path / "pictures" / f"{k}.png")
    report, told = run(tmp_path / "pictures", burn=tmp_path / "seen.mp4")
    assert told[0][0] == 0.0
    assert report.recording is None, "it was not recorded as it was watched"
    frames = list(read_frames(tmp_path / "seen.mp4", fps=None))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.5, 1, 1.5], abs=1e-3)
    assert frames[0].picture[-4:].mean() < frames[0].picture[:4].mean() - 10, "a dark band at the foot"


def test_what_comes_only_once_is_recorded_with_its_captions(run, film, tmp_path, monkeypatch):
    with as_matroska(film, tmp_path / "film.mkv").open("rb") as file:
        monkeypatch.setattr("sys.stdin", file)
        report, told = run("-", burn=tmp_path / "seen.mkv")
    assert told[0][0] == 0.0
    assert report.recording == tmp_path / "seen.mkv"
    frames = list(read_frames(report.recording, fps=None))
    assert [frame.time for frame in frames] == pytest.approx([k / 2 for k in range(12)], abs=2e-3)
    assert frames[0].picture[-4:].mean() < frames[0].picture[:4].mean() - 10, "a dark band at the foot"


@pytest.mark.slow
def test_in_live_pace_the_counts_add_up(run, film):
    report, told = run(film, live=True, fps=20.0, end=1.0)
    count = report.count
    assert report.live
    assert count.frames + count.dropped + count.skipped == 10, "one for every frame of the film"
    assert count.frames >= 1
    assert report.said == len(told)
    assert report.longest_lag >= report.last_lag > 0


@pytest.mark.slow
def test_live_captions_say_by_how_much_they_came_later(run, film, tmp_path):
    report, told = run(film, tmp_path / "a.jsonl", live=True, fps=20.0, end=1.0)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert told
    assert all(0 < row["lag"] <= round(report.longest_lag, 3) for row in rows)
    run(film, tmp_path / "b.jsonl", end=1.0)
    assert "lag" not in (tmp_path / "b.jsonl").read_text(), "a film at its own pace has no clock"


@pytest.mark.slow
@pytest.mark.parametrize("cue", [None, "said", "frame"])
def test_in_live_pace_captions_begin_when_they_were_said(run, film, tmp_path, cue):
    questions = (TimedQuestion(0.0, "who"), TimedQuestion(0.5, "and then"))
    run(film, tmp_path / "a.jsonl", live=True, fps=20.0, end=1.0, cue=cue, questions=questions)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows
    frames = [row["start"] - (0 if cue == "frame" else row["lag"]) for row in rows]
    assert frames == pytest.approx([round(20 * seconds) / 20 for seconds in frames], abs=2e-3), "looked at 20 times/s"


def test_without_a_clock_nothing_begins_when_it_was_said(run, film, tmp_path):
    (tmp_path / "a.srt").write_text("what was there")
    with pytest.raises(UserError, match="live pace"):
        run(film, tmp_path / "a.srt", cue="said")
    assert (tmp_path / "a.srt").read_text() == "what was there"


def test_in_live_pace_an_answer_has_a_budget_too(load, film, tmp_path, monkeypatch):
    picks = []

    class Dawdling(Sampling):
        """Never stops by itself, and takes its time."""

        def pick(self, logits, said, *_):
            picks.append(len(said))
            time.sleep(0.002)
            return 7

    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.1)
    questions = (TimedQuestion(0.0, "who"), TimedQuestion(9.0, "and then"))
    request = CaptionRequest(
        str(film), live=True, fps=20.0, end=0.3, max_new_tokens=2000, sampling=Dawdling(), questions=questions
    )
    report = caption(request, "tiny", load)
    # two answers of 2,000 tokens each would have been whole; captions are cut at a twentieth of a second
    assert report.count.truncated == report.count.frames + 2
    assert max(picks) < 200


def test_ctrl_c_ends_live_pace_and_its_counts_are_told(load, film, tmp_path):
    def stop(at, text):
        raise KeyboardInterrupt

    request = CaptionRequest(str(film), (tmp_path / "a.srt",), live=True, fps=20.0, max_new_tokens=4)
    report = caption(request, "tiny", load, stop)
    assert report.stopped
    assert read_captions(tmp_path / "a.srt")


@pytest.mark.slow
def test_damage_is_counted_and_passed_over(run, film, tmp_path):
    data = bytearray(film.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "damaged.mp4").write_bytes(data)
    report, told = run(tmp_path / "damaged.mp4", fps=10.0)
    assert report.damaged > 0
    assert told
    assert "damaged" in report.sentence()


class Camera:
    """Live: the first four frames of a film, then an error."""

    is_live, duration = True, None

    def __init__(self, film, error):
        self.film, self.error = film, error
        self.counts = SourceCounts()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        pass

    def __iter__(self):
        yield from list(read_frames(self.film))[:4]
        raise self.error


@pytest.mark.parametrize(
    ("source", "live", "asked"),
    [
        ("http://here/a.ts", True, None),
        ("http://here/a.ts", False, False),
        ("http://here/a.ts", None, None),
        ("-", True, True),
    ],
)
def test_what_lies_on_a_server_is_live_only_if_it_is(load, monkeypatch, source, live, asked):
    """In live pace, a film there is watched by the clock, as one on disk is."""
    given = []

    def opened(*_, **settings):
        given.append(settings["live"])
        raise UserError("nobody there.")

    monkeypatch.setattr(module, "open_source", opened)
    with pytest.raises(UserError, match="nobody"):
        caption(CaptionRequest(source, live=live), "tiny", load)
    assert given == [asked]


def test_a_source_that_breaks_leaves_what_was_said_and_a_state(load, tmp_path, monkeypatch, film):
    """A camera that is pulled out, or Ctrl-C."""
    for number, error in enumerate([UserError("the camera is gone."), KeyboardInterrupt()]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.setattr(module, "open_source", lambda *_, error=error, **__: Camera(film, error))
        request = CaptionRequest("camera:0", (folder / "a.srt",), burn=folder / "a.mkv", live=False, max_new_tokens=4)
        with pytest.raises(type(error)):
            caption(request, "tiny", load)
        assert read_captions(folder / "a.srt")
        assert (folder / "a.srt.state").exists()
        assert len(list(read_frames(folder / "a.mkv", fps=None))) == 4, "what was seen until then"


def test_no_run_replaces_what_another_recorded(load, tmp_path, monkeypatch, film):
    """Broken off, gone on with, and begun anew."""
    monkeypatch.setattr(module, "open_source", lambda *_, **__: Camera(film, UserError("the camera is gone.")))
    recorded = {}
    for name, resume in {"a.mkv": False, "a.2.mkv": True, "a.3.mkv": False}.items():
        settings = {"live": False, "max_new_tokens": 4, "save_every": 0.0, "resume": resume}
        with pytest.raises(UserError, match="the camera is gone"):
            caption(
                CaptionRequest("camera:0", (tmp_path / "a.srt",), burn=tmp_path / "a.mkv", **settings), "tiny", load
            )
        assert len(list(read_frames(tmp_path / name, fps=None))) == 4
        assert {path: path.read_bytes() for path in recorded} == recorded
        recorded[tmp_path / name] = (tmp_path / name).read_bytes()


def test_a_report_tells_all_it_knows():
    report = CaptionReport(True, WatchCounts(4, 3, 2, 1), 4, 0.9, 1.0, 0.25, damaged=5, reconnects=6)
    for part in ("4 frames", "3 dropped", "2 cut", "0.25 s on average", "0.90 s at most", "5 damaged", "6 times"):
        assert part in report.sentence()
    assert not report.is_clean


def test_nothing_is_left_open(run, film):
    before = threading.active_count()
    run(film, live=True, fps=50.0, end=0.5)
    for _ in range(400):
        if threading.active_count() == before:
            return
        threading.Event().wait(0.01)
    raise AssertionError("a thread is left")


def test_a_film_without_a_picture_that_is_read(load, tmp_path):
    with pytest.raises(UserError, match="no file"):
        caption(CaptionRequest(str(tmp_path / "none.mp4"), (tmp_path / "a.srt",)), "tiny", load)
    assert not list(tmp_path.iterdir())


def test_live_pace_that_a_machine_cannot_keep_is_told_with_what_to_do():
    assert "too slow" in CaptionReport(True, WatchCounts(4, 3, 0, 0)).sentence()
    assert "fewer frames a second" in CaptionReport(True, WatchCounts(4, 3, 0, 0)).sentence()
    for fine in (CaptionReport(True, WatchCounts(40, 3, 0, 0)), CaptionReport(False, WatchCounts(4, 0, 4, 0))):
        assert "slow" not in fine.sentence()
