"""Which frames are looked at. Those of files are tested through real videos in test_video.py."""

from casa.media.sampling import as_they_come, on_screen, spans
from casa.media.source import SourceCounts


def timed(*times):
    return iter([(time, f"{time}", 0.1) for time in times])


def test_a_live_frame_is_given_before_the_next_one_is_asked_for():
    asked = []

    def stream():
        for time in (0.0, 0.1, 0.2, 0.5, 0.6):
            asked.append(time)
            yield time, time, 0.1

    sampled = as_they_come(stream(), 2)
    assert next(sampled) == (0.0, 0.0)
    assert asked == [0.0]
    assert next(sampled) == (0.5, 0.5)
    assert asked == [0.0, 0.1, 0.2, 0.5]


def test_live_frames_are_the_first_of_their_moment():
    assert [t for t, _ in as_they_come(timed(0.2, 0.4, 0.4995, 0.7, 1.1, 1.3, 4.0, 4.1), 2)] == [0.2, 0.4995, 1.1, 4.0]
    # slower than it is looked at: every one
    assert [t for t, _ in as_they_come(timed(0, 2, 4), 2)] == [0, 2, 4]
    assert list(as_they_come(timed(), 2)) == []


def test_a_file_shows_what_is_on_screen():
    counts = SourceCounts()
    shown = spans(timed(0, 0.3, 0.2, 1.2), counts)  # 0.2 comes too late
    assert list(on_screen(shown, 2, 0.0, 99)) == [(0, "0"), (0.5, "0.3")]
    assert counts.skipped == 1
