"""Pacing: every frame of a file; of a live stream the newest, within its budget, with nothing queueing up."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest

from casa.errors import UserError
from casa.streaming import Sampling, StreamingSession, WatchCounts, watch, watch_live
from casa.streaming.pacing import Box
from casa.testing import PATIENCE, tiny_casa, tiny_processor


@dataclass
class Frame:
    image: object
    time: float


class Slow:
    """A session that takes a turn only when the test lets it; it says the frame it was shown."""

    def __init__(self):
        self.turns = threading.Semaphore(0)
        self.started = threading.Semaphore(0)

    def check(self, frame):
        if frame == "bad":
            raise ValueError("no picture")
        return frame

    def encode(self, frame):
        return frame

    def step(self, frame, should_stop=None):
        self.started.release()
        assert self.turns.acquire(timeout=PATIENCE)
        return str(frame)


def noise(seed, count):
    generator = np.random.default_rng(seed)
    return [Frame(generator.integers(0, 255, (56, 56, 3), dtype=np.uint8), n / 2) for n in range(count)]


def test_a_file_is_watched_frame_by_frame():
    count, session = WatchCounts(), Slow()
    for _ in range(5):
        session.turns.release()
    moments = list(watch(session, [Frame(n, n / 2) for n in range(5)], count))
    assert [(m.time, m.text) for m in moments] == [(n / 2, str(n)) for n in range(5)]
    assert (count.frames, count.dropped) == (5, 0)


def test_live_the_newest_frame_wins_and_the_last_is_never_dropped():
    session, count = Slow(), WatchCounts()
    gate = threading.Semaphore(0)

    def source():
        for n in range(10):
            assert gate.acquire(timeout=PATIENCE)
            yield Frame(n, n / 2)

    heard = []
    watching = threading.Thread(target=lambda: heard.extend(watch_live(session, source(), fps=2, counts=count)))
    watching.start()
    gate.release()
    assert session.started.acquire(timeout=PATIENCE)  # frame 0 is being talked about
    for _ in range(9):
        gate.release()
    while count.dropped + 2 < 10:  # all but the one in hand and the newest have been replaced
        threading.Event().wait(0.005)
    session.turns.release()
    session.turns.release()
    watching.join(timeout=PATIENCE)
    assert [moment.text for moment in heard] == ["0", "9"]
    assert (count.frames, count.dropped) == (2, 8)


def test_frames_dropped_while_another_is_looked_at_are_counted():
    """Two threads count: what the reader drops while the looker is at work, and what the looker drops itself."""
    session, count, gate = Slow(), WatchCounts(), threading.Semaphore(0)

    def encode(frame):
        if frame == 1:  # until frames 2 and 3 have been replaced
            for _ in range(3):
                gate.release()
            while count.dropped < 2:
                threading.Event().wait(0.005)
        return frame

    def source():
        yield Frame(0, 0.0)
        assert session.started.acquire(timeout=PATIENCE)
        yield Frame(1, 0.5)
        for n in (2, 3, 4):
            assert gate.acquire(timeout=PATIENCE)
            yield Frame(n, n / 2)

    session.encode = encode
    for _ in range(5):
        session.turns.release()
    heard = list(watch_live(session, source(), fps=2, counts=count))
    assert (heard[-1].text, count.frames + count.dropped) == ("4", 5)
    assert count.dropped >= 2


def test_a_caption_is_cut_at_its_budget():
    now = [0.0]

    class Talker(Slow):
        def step(self, frame, should_stop=None):
            words = []
            now[0] += 30.0  # of looking at it, which is no time of the caption's
            while not should_stop():
                words.append("word")
                now[0] += 0.2
            return " ".join(words)

    count = WatchCounts()
    (moment,) = watch_live(Talker(), [Frame(0, 0.0)], fps=2, counts=count, clock=lambda: now[0])
    assert moment.text == "word word word"
    assert not moment.complete
    assert moment.latency == pytest.approx(30.6)
    assert count.truncated == 1


def test_a_machine_too_slow_for_any_word_says_one_of_every_frame_that_it_watches():
    model, now = tiny_casa(), [0.0]

    def computed(*_):
        now[0] += 10.0

    handle = model.register_forward_hook(computed)
    session = StreamingSession(model, tiny_processor(), max_new_tokens=5, sampling=Sampling(stop_bias=-1e4))
    count = WatchCounts()
    moments = list(watch_live(session, noise(0, 4), fps=20, counts=count, clock=lambda: now[0]))
    handle.remove()
    assert moments
    assert all(moment.text and not moment.complete for moment in moments)
    assert count.frames == count.truncated == session.usage.truncated == len(moments)
    assert count.frames + count.dropped == 4


def test_in_real_time_frames_of_a_file_come_at_their_time():
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    session = Slow()
    for _ in range(4):
        session.turns.release()
    moments = list(
        watch_live(
            session,
            [Frame(n, 5 + n / 2) for n in range(4)],
            fps=2,
            in_real_time=True,
            clock=lambda: now[0],
            sleep=sleep,
        )
    )
    assert sum(slept) == pytest.approx(1.5)
    assert moments[-1].text == "3"


def test_what_is_no_picture_is_skipped_and_counted():
    session, count = Slow(), WatchCounts()
    session.turns.release()
    session.turns.release()

    def source():
        yield Frame("bad", 0.0)
        while not count.skipped:
            threading.Event().wait(0.005)
        yield Frame("good", 0.5)

    assert [m.text for m in watch_live(session, source(), fps=2, counts=count)] == ["good"]
    assert count.skipped == 1


def one_by_one(frames, count):
    """The next only when the last was found to be no picture: live, it would take its place."""
    for number, frame in enumerate(frames):
        for _ in range(4000):
            if count.skipped >= number:
                break
            threading.Event().wait(0.005)
        yield frame


WATCHED = {
    "ahead": lambda session, frames, count: watch(session, one_by_one(frames, count), count),
    "in turn": lambda session, frames, count: watch(session, one_by_one(frames, count), count, prefetch=False),
    "live": lambda session, frames, count: watch_live(session, one_by_one(frames, count), fps=2, counts=count),
}


@pytest.mark.parametrize("watched", WATCHED.values(), ids=WATCHED)
@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_a_model_that_fails_is_no_bad_picture(watched, error):
    class Broken(Slow):
        def step(self, frame, should_stop=None):
            raise error("the model is broken")

    count = WatchCounts()
    with pytest.raises(error, match="broken"):
        list(watched(Broken(), [Frame("bad", 0.0), Frame("fine", 0.5)], count))
    assert (count.frames, count.skipped) == (0, 1)


@pytest.mark.parametrize("watched", [WATCHED["ahead"], WATCHED["live"]])
def test_a_tower_that_fails_ahead_is_no_bad_picture(watched):
    class Blind(Slow):
        def encode(self, frame):
            raise ValueError("the tower is broken")

    count = WatchCounts()
    with pytest.raises(ValueError, match="tower"):
        list(watched(Blind(), [Frame("fine", 0.0)], count))
    assert count.skipped == 0


@pytest.mark.parametrize("watched", WATCHED.values(), ids=WATCHED)
def test_a_session_passes_over_what_is_no_picture(watched):
    session = StreamingSession(
        tiny_casa(), tiny_processor(), max_new_tokens=2, sampling=Sampling(temperature=1, top_k=3, stop_bias=1)
    )
    given, count = noise(0, 2), WatchCounts()
    bad = [Frame(np.zeros((4, 4)), 0.0), Frame("no picture", 0.1), Frame(np.zeros((1, 900, 3), np.uint8), 0.2)]
    moments = list(watched(session, [*bad, given[0]], count))
    assert [moment.time for moment in moments] == [given[0].time]
    assert (count.frames, count.skipped) == (1, 3)


class SharedClock:
    """One clock for the thread that reads and the one that talks: it moves only where both wait."""

    def __init__(self):
        self.now, self.over = 0.0, False
        self._due: float | None = None  # what the reader waits for
        self._changed = threading.Condition()

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        """The reader's."""
        with self._changed:
            self._due = self.now + seconds
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._due is None or self.now >= self._due, PATIENCE)
            self._due = None

    def end(self):
        with self._changed:
            self.over = True
            self._changed.notify_all()

    def talk(self, seconds):
        """The talker's: the reader reads whatever comes meanwhile."""
        until = self.now + seconds
        with self._changed:
            while not self.over:
                assert self._changed.wait_for(lambda: self._due is not None or self.over, PATIENCE)
                if self._due is None or self._due > until:
                    break
                self.now, self._due = max(self.now, self._due), None
                self._changed.notify_all()
            self.now = until


def test_lag_does_not_accumulate_when_every_step_is_too_slow():
    """Three frames come while one is talked about, and nobody minds the budget."""
    clock = SharedClock()

    class Late(Slow):
        def step(self, frame, should_stop=None):
            clock.talk(0.06)
            return str(frame)

    def source():
        yield from (Frame(n, n / 50) for n in range(75))
        clock.end()

    counts = WatchCounts()
    watched = watch_live(Late(), source(), 50, counts=counts, in_real_time=True, clock=clock, sleep=clock.sleep)
    found = list(watched)
    assert counts.frames + counts.dropped == 75
    assert counts.frames == len(found)
    assert counts.dropped > 30
    assert max(one.lag for one in found) <= 3 * 0.06 + 1e-9, "a step, and what came during the one before"
    assert {round(one.latency, 6) for one in found} == {0.06}


def test_an_error_of_the_source_comes_after_the_captions_before_it():
    def source():
        yield Frame("fine", 0.0)
        assert session.started.acquire(timeout=PATIENCE)
        raise UserError("the camera is gone.")

    session = Slow()
    session.turns.release()
    watching = watch_live(session, source(), fps=2)
    assert next(watching).text == "fine"
    with pytest.raises(UserError, match="camera is gone"):
        next(watching)


def test_leaving_early_ends_the_threads():
    before = threading.active_count()
    session = Slow()
    for _ in range(3):
        session.turns.release()
    watching = watch_live(session, (Frame(n, 0.0) for n in range(3)), fps=2)
    next(watching)
    watching.close()
    for _ in range(400):
        if threading.active_count() == before:
            return
        threading.Event().wait(0.01)
    raise AssertionError("a thread is left")


@pytest.mark.parametrize("fps", [0, -1, float("nan")])
def test_a_rate_that_is_none_is_refused(fps):
    with pytest.raises(UserError, match="above 0"):
        next(watch_live(Slow(), [], fps=fps))


def test_a_box_holds_the_newest():
    box = Box()
    assert [box.put(n) for n in (1, 2, 3)] == [0, 1, 1]
    assert box.take() == 3
    box.put(4)
    box.close()
    assert (box.take(), box.take()) == (4, None)


def test_a_frame_encoded_ahead_is_the_frame_itself():
    model = tiny_casa()
    frames = [frame.image for frame in noise(1, 3)]
    one, two = (StreamingSession(model, tiny_processor(), max_new_tokens=4) for _ in range(2))
    assert [one.step(frame) for frame in frames] == [two.step(two.encode(frame)) for frame in frames]
    assert one.usage == two.usage


def test_a_session_watches_live_what_it_watches_frame_by_frame():
    """Slowly enough that nothing is dropped, both say the same."""
    model, frames = tiny_casa(), noise(2, 4)
    wanted = [m.text for m in watch(StreamingSession(model, tiny_processor(), max_new_tokens=4), frames)]
    done = threading.Semaphore(1)

    def source():
        for frame in frames:
            assert done.acquire(timeout=PATIENCE)
            yield frame

    session, heard = StreamingSession(model, tiny_processor(), max_new_tokens=4), []
    for moment in watch_live(session, source(), fps=0.01):
        heard.append(moment.text)
        done.release()
    assert heard == wanted


def test_of_a_file_the_next_frames_are_looked_at_ahead_and_no_further():
    """While words are found for one frame, one waits and one is being looked at; the source is asked for no more."""
    session, asked, looked = Slow(), [], threading.Semaphore(0)
    look = session.encode

    def frames():
        for n in range(8):
            asked.append(n)
            yield Frame(n, n / 2)

    def looking(frame):
        looked.release()
        return look(frame)

    session.encode = looking
    heard = []
    watching = threading.Thread(target=lambda: heard.extend(m.text for m in watch(session, frames())))
    watching.start()
    assert session.started.acquire(timeout=PATIENCE)
    for _ in range(3):
        assert looked.acquire(timeout=PATIENCE)
    assert not looked.acquire(timeout=0.2)
    assert asked == [0, 1, 2]
    for _ in range(8):
        session.turns.release()
    watching.join(timeout=PATIENCE)
    assert heard == [str(n) for n in range(8)]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_source_that_breaks_off_is_told_after_what_came_before(ahead):
    def frames():
        yield Frame("a", 0.0)
        yield Frame("b", 0.5)
        raise OSError("cable")

    session, heard = Slow(), []
    session.turns = threading.Semaphore(2)
    watching = watch(session, frames(), prefetch=ahead)
    heard += [next(watching).text, next(watching).text]
    with pytest.raises(OSError, match="cable"):
        next(watching)
    assert heard == ["a", "b"]


def test_watching_may_be_given_up_in_the_middle():
    session = Slow()
    session.turns = threading.Semaphore(1)
    watching = watch(session, (Frame(n, n / 2) for n in range(100)))
    assert next(watching).text == "0"
    watching.close()
    assert not any(thread.name == "casa-prefetch" for thread in threading.enumerate())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["casa", "cross_attention", "insertion"])
def test_ahead_says_the_same(method):
    model, processor = tiny_casa(method=method), tiny_processor()
    one, other = (StreamingSession(model, processor, max_new_tokens=4) for _ in range(2))
    frames = noise(0, 6)
    said = [moment.text for moment in watch(one, frames)]
    assert said == [moment.text for moment in watch(other, frames, prefetch=False)]
    assert one.usage == other.usage


@pytest.mark.parametrize(
    ("count", "found"),
    [
        (WatchCounts(), False),
        (WatchCounts(frames=1, dropped=2), False),
        (WatchCounts(frames=1, dropped=3), True),
        (WatchCounts(frames=90, dropped=10, truncated=10), False),
        (WatchCounts(frames=90, dropped=10, truncated=11), True),
        (WatchCounts(frames=10, truncated=3), True),
        (WatchCounts(frames=10, skipped=50), False),
    ],
)
def test_more_than_a_machine_can_do(count, found):
    assert count.is_too_much is found
