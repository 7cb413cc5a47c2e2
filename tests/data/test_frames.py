"""Frames of real small videos as pictures with times."""

import io

import numpy as np
import pytest
from PIL import Image

from casa.data import BadRecord, open_records, parse_data_settings
from casa.data.frames import video_frames
from casa.media import VideoWriter


@pytest.fixture
def video(tmp_path):
    """Two seconds at 10 frames a second, 64 x 32 px, each frame a little lighter."""
    with VideoWriter(tmp_path / "v.mp4", (64, 32), 10.0) as writer:
        for k in range(20):
            writer.write(Image.new("RGB", (64, 32), (10 * k, 10 * k, 10 * k)), time=k / 10)
    return tmp_path / "v.mp4"


def test_frames_come_at_their_times_and_size(video):
    frames = video_frames(video, 2.0, 0.0, None, 32, 480, False)
    assert [frame.time for frame in frames] == [0.0, 0.5, 1.0, 1.5]
    shades = [np.asarray(Image.open(io.BytesIO(frame.source))).mean() for frame in frames]
    assert shades == pytest.approx([0, 50, 100, 150], abs=4)
    assert Image.open(io.BytesIO(frames[0].source)).size == (32, 16)


def test_a_part_of_a_video(video):
    assert [frame.time for frame in video_frames(video, 5.0, 0.4, 1.0, 448, 480, False)] == pytest.approx(
        [0.4, 0.6, 0.8]
    )


def test_a_long_video_is_looked_at_less_often_or_refused(video):
    thin = video_frames(video, 10.0, 0.0, None, 448, 4, True)
    assert [frame.time for frame in thin] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    with pytest.raises(BadRecord, match="more than 4 frames") as refused:
        video_frames(video, 10.0, 0.0, None, 448, 4, False)
    assert refused.value.reason == "too-long"


@pytest.mark.parametrize("damage", ["cut", "text", "late"])
def test_a_video_that_cannot_be_read_is_a_bad_record(video, damage):
    if damage == "cut":
        video.write_bytes(video.read_bytes()[:200])
    if damage == "text":
        video.write_text("no video")
    with pytest.raises(BadRecord) as refused:
        video_frames(video, 2.0, 50.0 if damage == "late" else 0.0, None, 448, 480, True)
    assert refused.value.reason == "unreadable-video"


def test_from_the_row_to_the_record(video, tmp_path, written, told):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It grows light."}]
    rows = [
        {"video": "v.mp4", "conversations": turns},
        {"video": "v.mp4", "words": [[0.1, 0.4, "dark"], [1.6, 1.9, "light"]], "video_end": 2.0},
    ]
    path = written(tmp_path / "rows.jsonl", rows)
    values = {"sources": [{"path": str(path), "fps": 1.0}], "exhausted": "leave", "shuffle": 0}
    talk, live = open_records(parse_data_settings(values))
    assert told(talk) == [("user", [0.0, 1.0, "What?"]), ("assistant", ["It grows light."])]
    assert told(live)[1] == ("assistant", [0.0, ("dark", 0.1, 0.4), 1.0, ("light", 1.6, 1.9)])
