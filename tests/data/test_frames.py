"""Frames of real small videos as pictures with times."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from casa.data import BadRecord, open_records, parse_data_settings
from casa.data.frames import CachedFrames, video_frames
from casa.errors import UserError
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


def cut_off(path, part):
    """A film with its index in front, of which a part is there."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as made:
        stream = made.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj420p"
        for picture in np.random.default_rng(0).integers(0, 256, (20, 32, 64, 3), dtype=np.uint8):
            made.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        made.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def test_of_a_clip_no_great_part_may_be_missing(tmp_path, caplog):
    how = (10.0, 0.0, None, 448, 480, False)
    cut_off(tmp_path / "half.mp4", 0.5)
    with pytest.raises(BadRecord, match=r"half\.mp4 is damaged or cut off \(\d+ packets or frames") as refused:
        video_frames(tmp_path / "half.mp4", *how)
    assert refused.value.reason == "damaged-video"
    # the part that is asked for is whole
    assert len(video_frames(tmp_path / "half.mp4", 10.0, 0.0, 0.3, 448, 480, False)) == 3
    assert not caplog.records
    cut_off(tmp_path / "most.mp4", 0.97)
    assert len(video_frames(tmp_path / "most.mp4", *how)) >= 18
    assert "most.mp4: " in caplog.text


def test_a_clip_whose_frames_carry_exif_is_a_clip(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    held = io.BytesIO()
    Image.new("RGB", (64, 32)).save(held, "JPEG", exif=exif)
    (tmp_path / "a.mjpeg").write_bytes(10 * held.getvalue())
    frames = video_frames(tmp_path / "a.mjpeg", 25.0, 0.0, None, 448, 480, False)
    assert [Image.open(io.BytesIO(frame.source)).size for frame in frames] == [(32, 64)] * 10


def test_a_clip_that_does_not_say_how_long_it_is(tmp_path):
    pictures = [Image.new("RGB", (64, 32), (20 * k, 0, 0)) for k in range(6)]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100)
    assert len(video_frames(tmp_path / "a.png", 10.0, 0.0, None, 448, 480, False)) == 6
    with pytest.raises(BadRecord, match="more than 4 frames"):
        video_frames(tmp_path / "a.png", 10.0, 0.0, None, 448, 4, False)


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


class TestKept:
    """Frames in a folder are those of the video, read once."""

    def test_a_video_is_decoded_once(self, video, tmp_path):
        folder, how = tmp_path / "frames", (2.0, 0.0, None, 32, 480, False)
        wanted = video_frames(video, *how)
        first, other = CachedFrames(folder), CachedFrames(folder)
        assert first(video, *how) == wanted == first(video, *how) == other(video, *how)
        assert (first.decoded, first.found, other.decoded, other.found) == (1, 1, 0, 1)
        # another span, another size
        assert first(video, 2.0, 0.5, 1.5, 32, 480, False) == wanted[1:3]
        assert first(video, 2.0, 0.0, None, 64, 480, False) != wanted
        assert first.decoded == 3

    def test_a_video_that_was_written_anew_is_another_one(self, video, tmp_path):
        how = (2.0, 0.0, None, 32, 480, False)
        kept = CachedFrames(tmp_path / "frames")
        before = kept(video, *how)
        with VideoWriter(video, (64, 32), 10.0) as writer:
            for k in range(10):
                writer.write(Image.new("RGB", (64, 32), (0, 20 * k, 0)), time=k / 10)
        assert kept(video, *how) == video_frames(video, *how) != before

    @pytest.mark.slow
    def test_what_is_wrong_is_not_kept(self, video, tmp_path, caplog):
        how = (2.0, 0.0, None, 32, 480, False)
        kept = CachedFrames(tmp_path / "frames")
        with pytest.raises(BadRecord, match="over before start"):
            kept(video, 2.0, 5.0, None, 32, 480, False)
        wanted = kept(video, *how)
        (file,) = (tmp_path / "frames").rglob("*.npz")
        whole = file.read_bytes()
        # the lengths of both, with whom they begin, and how they were packed, as the zip's directory says it
        at = whole.rindex(b"PK\x01\x02")
        flipped = [whole[: at + n] + bytes([whole[at + n] ^ 0xFF]) + whole[at + n + 1 :] for n in range(46)]
        for damaged in (b"", whole[: len(whole) // 2], b"not a zip", *flipped):
            file.write_bytes(damaged)
            assert kept(video, *how) == wanted
        assert file.read_bytes() == whole
        gone = tmp_path / "gone.mp4"
        with pytest.raises(BadRecord, match="gone"):
            kept(gone, *how)
        assert not caplog.records

    def test_a_full_disk_stops_the_keeping_alone(self, video, tmp_path, monkeypatch, caplog):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        kept = CachedFrames(tmp_path / "frames")
        monkeypatch.setattr(np, "savez", full)
        how = (2.0, 0.0, None, 32, 480, False)
        assert kept(video, *how) == kept(video, *how) == video_frames(video, *how)
        assert [record.message for record in caplog.records] == [
            f"frames are no longer kept in {tmp_path / 'frames'}: [Errno 28] No space left on device"
        ]
        assert not list((tmp_path / "frames").rglob("*.npz"))
        with pytest.raises(UserError, match="name another keep_frames"):
            CachedFrames(video / "frames")

    def test_records_are_the_same(self, video, tmp_path, monkeypatch):
        (tmp_path / "rows.jsonl").write_text('{"video": "v.mp4", "words": [[0.1, 0.4, "407"]], "video_end": 2.0}\n')
        settings = parse_data_settings({"sources": [{"path": str(tmp_path / "rows.jsonl")}], "exhausted": "stop"})
        (wanted,) = open_records(settings)
        assert list(open_records(settings, keep_frames=tmp_path / "frames")) == [wanted]
        assert len(list((tmp_path / "frames").rglob("*.npz"))) == 1
        monkeypatch.setattr("casa.data.frames.video_frames", None)
        assert list(open_records(settings, keep_frames=tmp_path / "frames")) == [wanted]
